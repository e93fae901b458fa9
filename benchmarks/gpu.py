"""Measure every CUDA figure in one call; see gpu.sh, which sets the environment.

Makes a checkpoint of random weights, runs each part of gpu_parts.py in a process with a time limit, saves its result or
error, and ends with a line for docs/log.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `benchmarks` is a package here, unlike in a wheel

ROOT = Path(__file__).parents[1]
FP8_SHAPE = "qwen3-reranker-4b"
MARK = "RESULT "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="qwen3-reranker-0.6b")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--limit", type=float, default=520, help="time limit of the whole run in seconds")
    parser.add_argument("--only", type=lambda names: names.split(","), help="parts to run, as gpu_tests,latency")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(options, Path(folder))
    print(line_for_the_log(results))


def run_part(options: argparse.Namespace) -> None:
    """Make the checkpoint or run one part, in this process, and print the result."""
    import torch

    from benchmarks.gpu_parts import PARTS, Setting
    from benchmarks.gpu_setup import make_checkpoint

    device = torch.device(options.device)
    if options.part == "checkpoint":
        make_checkpoint(options.folder, options.shape, device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(MARK + json.dumps({"device": name, "versions": versions()}))
        return
    setting = Setting(options.folder, options.shape, device, quick=device.type == "cpu")
    print(MARK + json.dumps(PARTS[options.part][0](setting)))


def run_all(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.gpu_parts import PARTS

    end = time.monotonic() + options.limit
    shapes = {options.shape: folder / "model"}
    results: dict[str, Any] = {"date": str(datetime.date.today()), "shape": options.shape}
    results |= child(options, "checkpoint", options.shape, shapes[options.shape], 120)
    if options.device != "cpu" and (options.only is None or "gpu_tests" in options.only):
        results["gpu_tests"] = gpu_tests(min(90.0, end - time.monotonic()))
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for part, (_, limit) in PARTS.items():
        if options.only is not None and part not in options.only:
            continue
        shape = FP8_SHAPE if part == "fp8" and options.device != "cpu" else options.shape
        left = end - time.monotonic()
        if shape not in shapes and left > 90:
            shapes[shape] = folder / shape
            child(options, "checkpoint", shape, shapes[shape], 90)
            left = end - time.monotonic()
        start = time.monotonic()
        if left < 20 or shape not in shapes:
            results[part] = {"failed": "out of time"}
        else:
            results[part] = child(options, part, shape, shapes[shape], min(limit, left))
        print(f"{part} ({time.monotonic() - start:.0f} s): {json.dumps(results[part])}")
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def child(options: argparse.Namespace, part: str, shape: str, folder: Path, limit: float) -> dict[str, Any]:
    """Run a part in a process; returns its result or its error."""
    command = [sys.executable, __file__, "--part", part, "--device", options.device]
    command += ["--shape", shape, "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {limit:.0f} s"}
    said = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not said:
        return {"failed": "\n".join(done.stderr.strip().splitlines()[-12:])}
    answer: dict[str, Any] = json.loads(said[-1].removeprefix(MARK))
    return answer


def gpu_tests(limit: float) -> dict[str, Any]:
    """Run the tests that need a GPU, to check that the measured kernels are correct."""
    files = [str(ROOT / "tests" / "engine" / "cuda")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", *files]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "0"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {limit:.0f} s"}
    tail = [*done.stdout.strip().splitlines()[-12:], *done.stderr.strip().splitlines()[-12:]]
    print("\n".join(tail))
    return {"passed": done.returncode == 0, "said": tail}


def versions() -> dict[str, str]:
    from importlib import metadata

    names = ("torch", "transformers", "sentence-transformers", "triton")
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def line_for_the_log(results: dict[str, Any]) -> str:
    """Put the figures in one sentence."""

    def figure(part: str, text: str) -> str:
        values = results.get(part, {"failed": "not run"})
        if "failed" in values or "not_here" in values:
            return f"{part}: no figure"
        return text.format(**values)

    best = {"pairs_per_second": 0.0, "p99_ms": 0.0}
    for load in results.get("serving", {}).values():
        if isinstance(load, dict) and load["p99_ms"] < 500 and load["pairs_per_second"] > best["pairs_per_second"]:
            best = load
    parts = [
        figure("throughput", "{useful_tflops:.1f} useful of {gemm_ceiling_tflops:.1f} TFLOP/s ({share_of_ceiling:.0%}) "
               "at 300 tokens, {pairs_per_second:.0f} pairs/s, log-odds within {largest_difference:.2g} of fp32"),
        f"served {best['pairs_per_second']:.0f} pairs/s at a P99 of {best['p99_ms']:.0f} ms",
        figure("latency", "ten passages in {default[p50_ms]:.1f} ms (p50)"),
        figure("peer", "passages {ratio:.1f}x sentence-transformers {version}"),
        figure("fp8", "fp8 {speedup:.2f}x bf16"),
    ]  # fmt: skip
    return f"{results['date']}, {results.get('device')}, {results['shape']}, bf16: {'; '.join(parts)}"


if __name__ == "__main__":
    main()
