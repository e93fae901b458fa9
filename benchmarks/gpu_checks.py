"""The parts of gpu.py that check: kernels beside torch, the tests, memory beside its estimate, the memory checker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import Qwen3Config

from benchmarks.gpu_pack import ROOT
from benchmarks.gpu_setup import SHAPES, Result, Setting, loaded, pairs_of_300, product_shapes
from local_rerank.engine.cuda.fp8 import Fp8Linear
from local_rerank.engine.cuda.layers import kernel_differences, why_not_fused
from local_rerank.engine.engine import Engine
from local_rerank.engine.out_of_memory import LayerShape, bytes_per_token, release_cached
from local_rerank.errors import OutOfMemory
from local_rerank.requests.pair import num_batch_tokens

MAX_FP8_ERROR = 0.05  # relative, of a product with both factors in e4m3
MAX_FP8_ERROR_INTERPRETED = 0.15  # Triton's interpreter rounds some numbers to half their value
NUM_ROWS = 300  # of these products; no multiple of a tile
SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
OF_TESTS = re.compile(r"(\S+::\S+) (PASSED|FAILED|SKIPPED|ERROR)")
OF_CHECKER = re.compile(r"ERROR SUMMARY: (\d+) error|\"passed\": (true|false)")  # its own, and that of `kernels`


@torch.inference_mode()
def kernels(setting: Setting) -> Iterator[Result]:
    """Compare every kernel with torch's operators in the model's widths, and fp8 products with nn.Linear."""
    sizes, on_gpu = SHAPES[setting.shape], setting.device.type == "cuda"
    has_fp8 = not on_gpu or torch.cuda.get_device_capability(setting.device) >= (8, 9)
    config = SimpleNamespace(**sizes, hidden_act="silu")
    failed = []
    # Triton's interpreter has no bf16
    dtypes = {torch.bfloat16: has_fp8, torch.float16: False} if on_gpu else {torch.float32: False, torch.float16: True}
    for dtype, fp8 in dtypes.items():
        kind = str(dtype).removeprefix("torch.")
        # the interpreter rounds to fp8 wrongly, so that there the kernels for it are only run
        why_not = why_not_fused(config, setting.device, dtype, fp8=fp8 and on_gpu)
        yield {f"used in {kind}": why_not or "yes"}
        if why_not:
            failed.append(f"{why_not} ({kind})")
        try:
            differences = kernel_differences(config, setting.device, dtype, fp8=fp8)
        except Exception as error:  # whatever Triton raises, and torch 2.11 on a CPU, which lacks the product in fp8
            traceback.print_exc()
            failed.append(f"{type(error).__name__} ({kind})")
            continue
        for name, value in differences.items():
            yield {f"{name} {kind}": value}
    for inputs, outputs in product_shapes(sizes) if has_fp8 else []:
        linear = nn.Linear(inputs, outputs, bias=False, device=setting.device, dtype=torch.bfloat16)
        x = torch.randn(8 if setting.quick else NUM_ROWS, inputs, device=setting.device).bfloat16()
        name = f"fp8 product {inputs} to {outputs}"
        try:
            ours = Fp8Linear(linear)(x)
        except (RuntimeError, NotImplementedError) as error:  # a CPU, or a torch without the kernel for this GPU
            yield {name: str(error).splitlines()[0]}
            failed.append(name)
            continue
        exact = linear.float()(x.float())
        error_here = float((ours.float() - exact).norm() / exact.norm())
        yield {name: error_here}
        if not error_here < (MAX_FP8_ERROR if on_gpu else MAX_FP8_ERROR_INTERPRETED):
            failed.append(name)
    yield {"passed": not failed, "failed": failed}


def gpu_tests(setting: Setting) -> Iterator[Result]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-W", "default", "tests/engine/cuda"]  # a warning of other versions is no failure
    interpreted = {} if setting.quick else {"TRITON_INTERPRET": "0"}
    counts = {"PASSED": 0, "FAILED": 0, "SKIPPED": 0, "ERROR": 0}
    failed = []
    with started(command, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **interpreted) as process:
        for found in outcomes(process, OF_TESTS):
            counts[found[2]] += 1
            if found[2] in ("FAILED", "ERROR"):
                failed.append(found[1])
            yield {found[2].lower(): counts[found[2]]}
    status = process.returncode
    yield {"passed_all": status == 0 and counts["PASSED"] > 0, "status": status, "failures": failed}


def memory(setting: Setting) -> Iterator[Result]:
    """Measure the peak of a full batch and the memory of graphs beside their estimates, and go through an OOM."""
    on_gpu, cuda = setting.device.type == "cuda", torch.cuda
    estimate = bytes_per_token(LayerShape.of(Qwen3Config(**SHAPES[setting.shape])), 2)
    with loaded(setting, max_batch_tokens=None) as reranker:
        pairs = pairs_of_300(setting, reranker)
        yield {"max_batch_tokens": reranker.max_batch_tokens, "estimated_bytes_per_token": estimate}
        with_graphs = reranker.engine if on_gpu else with_stand_ins(setting)
        engine, graphs = with_graphs.with_kernel(with_graphs.kernel), with_graphs.graphs
        assert graphs is not None
        engine.score(pairs)
        if on_gpu:
            cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        engine.score(pairs)
        peak = cuda.max_memory_allocated() - before
        yield {"peak_bytes": peak, "peak_bytes_per_token": peak / num_batch_tokens(pairs)}
        graphs.forget_all()  # those of the start
        release_cached()
        before = cuda.memory_reserved()
        with_graphs.capture_graphs()
        release_cached()
        yield {
            "num_graphs": len(graphs.sizes),
            "bytes_held_by_graphs": cuda.memory_reserved() - before,
            "estimated_bytes_of_graphs": estimate * reranker.max_batch_tokens,
        }
        if on_gpu:
            cuda.set_per_process_memory_fraction(0.05)
        try:
            with_graphs.score(pairs * (40 if on_gpu else 2))
            refused = "nothing: it fitted"
        except OutOfMemory as error:
            refused = str(error)
        if on_gpu:
            cuda.set_per_process_memory_fraction(1.0)
        yield {"too_large_a_batch": refused}
        with_graphs.score(pairs)
        yield {"scores_after_it": True}


def with_stand_ins(setting: Setting) -> Engine:
    """Our decoder on a CPU, as in tests: kernels in torch, and graphs that repeat the pass."""
    import pytest

    from tests.engine.cuda.test_graphs import runner
    from tests.engine.cuda.test_layers import engine_of
    from tests.triton_reference import in_torch

    in_torch(pytest.MonkeyPatch())
    engine = engine_of(setting.folder, fused=True, kernel="cuda-tiles")
    engine.graphs = runner(engine)
    return engine


def sanitizer(setting: Setting) -> Iterator[Result]:
    """Run the part `kernels` under compute-sanitizer's memcheck, without torch's caching allocator."""
    tool = shutil.which("compute-sanitizer") or next((path for path in SANITIZERS if Path(path).is_file()), None)
    if tool is None and not setting.quick:
        yield {"not_here": "there is no compute-sanitizer"}
        return
    # a library that asks the driver for newer functions is no error
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--print-limit", "20", "--error-exitcode", "9"]
    checked = [] if tool is None else [tool, *options]
    part = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--part", "kernels", "--shape", setting.shape]
    part += ["--device", str(setting.device), "--folder", str(setting.folder)]
    with started([*checked, *part], PYTORCH_NO_CUDA_MEMORY_CACHING="1") as process:
        for found in outcomes(process, OF_CHECKER):
            yield {"errors": int(found[1])} if found[1] else {"kernels_agree": found[2] == "true"}
    yield {"status": process.returncode}


def started(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def outcomes(process: subprocess.Popen[str], kind: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Print what a process prints, indented, so that its lines are no figures; yield the outcomes of a kind."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        if found := kind.search(line):
            yield found
