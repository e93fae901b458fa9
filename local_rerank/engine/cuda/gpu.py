"""What torch says about a GPU: its name, its compute capability, and whether this build of torch has kernels for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

Capability = tuple[int, int]
"""NVIDIA's compute capability, such as (8, 0) for an A100."""

OLDEST_IN_CUDA_13 = (7, 5)  # torch's builds for CUDA 12.6 are the last with kernels for older GPUs, from 5.0 on
BUILDS = "https://pytorch.org/get-started/locally/"  # where PyTorch chooses the build by system, package tool and CUDA


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: Capability

    def __str__(self) -> str:
        return f"{self.name} (compute capability {dotted(self.capability)})"

    def why_too_old(self, least: Capability) -> str | None:
        """What this GPU lacks for something that needs the capability `least`; None if it lacks nothing."""
        if self.capability >= least:
            return None
        return f"compute capability {dotted(least)} or newer; {self.name} has {dotted(self.capability)}"


def gpu_of(device: torch.device, *, is_spread: bool = False) -> Gpu | None:
    """The GPU that `device` is, or None. With `is_spread` the oldest of all, because a model is split over them."""
    if device.type != "cuda":
        return None
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if is_spread else [device]
    gpus = [Gpu(torch.cuda.get_device_name(each), torch.cuda.get_device_capability(each)) for each in devices]
    return min(gpus, key=lambda gpu: gpu.capability)


def why_unusable(device: torch.device) -> str | None:
    """Why torch cannot compute on a CUDA device, and what to do; None if it can."""
    if not torch.cuda.is_available():  # device_count() counts GPUs with a driver too old for torch, too: it asks NVML
        return why_no_gpu()
    try:
        gpu = gpu_of(device)
    except RuntimeError as error:  # another process has it alone, or all of its memory
        return f"torch {torch.__version__} cannot use {device}: {_reason(error)}; nvidia-smi must list it as free"
    return None if gpu is None else why_no_kernels(gpu)


def why_no_kernels(gpu: Gpu) -> str | None:
    """Why this build of torch cannot use a GPU, and what to install; None if it can.

    Machine code ("sm_86") runs on the same major version, from its minor version on. The driver compiles PTX
    ("compute_90") for every newer GPU. AMD's architectures have other names and are not judged.
    """
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in torch.cuda.get_arch_list()]
    codes = [(match[1], (int(match[2]), int(match[3]))) for match in built if match is not None]
    for kind, code in codes:
        if code <= gpu.capability and (kind == "compute" or code[0] == gpu.capability[0]):
            return None
    if not codes:
        return None
    known = ", ".join(map(dotted, sorted({code for _, code in codes})))
    remedy = "its build for CUDA 12.6" if gpu.capability < OLDEST_IN_CUDA_13 else "a newer one"
    return f"torch {torch.__version__} has no kernels for {gpu}, only for {known}; install {remedy} ({BUILDS})"


def why_no_gpu() -> str:
    """Why torch sees no GPU, in torch's own words if its build could use one, and what to do."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA; for a GPU install a build with CUDA ({BUILDS})"
    sees = f"torch {torch.__version__} sees no GPU"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # no driver, a driver older than the build, no device
        sees = f"{sees}: {_reason(error)}"
    if torch.version.cuda is None:
        return f"{sees}; rocminfo must list one"
    return (
        f"{sees}; nvidia-smi must list one, its driver must support CUDA {torch.version.cuda}, and "
        "CUDA_VISIBLE_DEVICES must not hide it"
    )


def _reason(error: Exception) -> str:
    """torch's first sentence, and the driver's error ("Error 802: system not ..."), which torch puts after a guess."""
    what = re.split(r"\. |\n", str(error))[0].rstrip(".")
    of_driver = re.search(r"(?<=\. |\? )Error \d+: .*", str(error))
    return what if of_driver is None else f"{what}: {of_driver[0]}"


def dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
