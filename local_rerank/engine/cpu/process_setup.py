"""Process-wide settings: OpenMP's wait policy, oneDNN's kernel caches and glibc's malloc.

By default malloc returns blocks as large as a layer's tensors with munmap and maps them again, which costs 50,000 page
faults or more for 2,300 tokens in six layers, a tenth of the time in int8. So we make malloc keep them. `MALLOC_*` or
`GLIBC_TUNABLES` in the environment take precedence, and other allocators are not touched.
"""

from __future__ import annotations

import ctypes
import os
import sys

OPENMP_VARIABLES = {  # libgomp reads them when torch is imported
    "OMP_WAIT_POLICY": "passive",  # active spinning made a request of 32 tokens take 350 ms beside other work
    "GOMP_SPINCOUNT": "20000",  # spin for about 10 µs before sleeping: a wake-up costs more than computing a block
}

# oneDNN's kernel cache: the default is 1,024 entries of about 0.5 MB; a prompt of 8,192 tokens needs 190
CACHE_VARIABLES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "16",  # torch's cache in front of oneDNN's
}

KERNEL_VARIABLES = (  # they change what kernels compute, and how fast
    "ATEN_CPU_CAPABILITY", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip

NO_HOME = "/"  # as docker sets it; without one, libraries raise errors for caches that they only look for

KEPT_BYTES = 2**30  # free memory kept at the top of the heap (M_TRIM_THRESHOLD); a layer's tensors take less
MAPPED_BYTES = 2**25  # larger blocks are mapped one by one (M_MMAP_THRESHOLD); the maximum of old glibc versions

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_is_owned = False


def configure_process() -> None:
    """Configure a process that we own. Call before importing torch.

    Sets OpenMP's wait policy and oneDNN's kernel-cache size, unless the environment does, and a single malloc arena,
    before a thread starts that would get another one. A user without a home folder, as containers have, gets `NO_HOME`.
    """
    global _is_owned
    _is_owned = True
    use_one_arena()
    if os.path.expanduser("~") == "~":  # noqa: PTH111  # pathlib raises an error
        os.environ["HOME"] = NO_HOME
    if not OPENMP_VARIABLES.keys() & os.environ.keys():
        os.environ.update(OPENMP_VARIABLES)
    for name, value in CACHE_VARIABLES.items():
        os.environ.setdefault(name, value)


def owns_process() -> bool:
    """Whether this is our own command, so that we may change process-wide settings; False in a program that uses us."""
    return _is_owned


def use_one_arena() -> None:
    """Make threads that start from now on use malloc's main arena; other arenas have heaps of at most 64 MiB."""
    _set((_M_ARENA_MAX, 1))


def keep_freed_memory() -> None:
    """Make malloc keep freed memory. Call after loading, so that memory freed by loading still goes to the kernel."""
    _set((_M_MMAP_THRESHOLD, MAPPED_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES))


def return_freed_memory() -> None:
    """Make malloc return all free pages to the kernel, those between used ones included. Call after freeing a model."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # musl has none
        library.malloc_trim(0)


def _set(*options: tuple[int, int]) -> None:
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # musl has none
        for option in options:
            library.mallopt(*option)
