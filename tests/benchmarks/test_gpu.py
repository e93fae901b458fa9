"""The scripts that measure on a bare GPU machine, as far as a CPU shows them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu, gpu_pack
from benchmarks.gpu import CALLS, PLAN, Results, figures_of, read, run_all
from benchmarks.gpu_table import ROWS, table

ROOT = Path(__file__).parents[2]
NOT_THERE = "fastapi fastokens limits msgspec prometheus_client pydantic rich starlette uvicorn".split()
COLLECT = f"""
import sys
import pytest
sys.modules |= dict.fromkeys({NOT_THERE!r})
sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", "tests/engine/cuda"]))
"""


@pytest.mark.slow
def test_the_tests_for_gpus_are_collected_on_a_machine_without_the_servers_packages() -> None:
    """benchmarks/bare stands in for two that the library itself imports."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "server", ROOT / "benchmarks/bare")))
    alone = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_scores_on_a_gpu_stay_near_fp32[fp8-False]" in done.stdout


def test_a_part_that_reaches_its_limit_keeps_its_figures_and_leaves_no_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = """
import subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("about to measure", flush=True)
print('FIGURE {"helper": %d, "ms": 1.5}' % helper.pid, flush=True)
time.sleep(60)
"""
    figures = figures_of([sys.executable, "-c", code], limit=1.0)
    first, last = next(figures), None
    for last in figures:  # noqa: B007
        pass
    assert first["ms"] == 1.5
    assert last == {"end": "cut off", "seconds": pytest.approx(1.0, abs=1.5)}
    assert "about to measure" in capfd.readouterr().out
    for _ in range(100):  # a killed process may still be there for an instant
        if not psutil.pid_exists(first["helper"]) or psutil.Process(first["helper"]).status() == "zombie":
            return
        time.sleep(0.02)
    raise AssertionError("the helper outlived its part")


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("print('FIGURE {\"a\": 1}')", "done"),
        ("print('FIGURE {\"a\": a warning')", "done"),
        ("raise SystemExit(3)", "failed"),
    ],
)
def test_how_a_part_ended_is_its_last_figure(code: str, end: str) -> None:
    assert list(figures_of([sys.executable, "-c", code], limit=60.0))[-1]["end"] == end


def test_the_limits_of_the_parts_add_up_to_the_two_calls() -> None:
    again = next(part.limit for part in PLAN if part.name == "checkpoint")  # the second call's machine has none
    sums = [sum(part.limit for part in PLAN if part.call == call) for call in (1, 2)]
    assert sums[0] <= CALLS[0]
    assert sums[1] + again <= CALLS[1]
    assert {row.part for row in ROWS} <= {part.name for part in PLAN if part.call < 3}


class Ran(list[str]):
    """The parts that run, each in no time; the test for kernels fails."""

    def __init__(self) -> None:
        self.limits: dict[str, float] = {}
        self.end = "done"

    def run(self, part: gpu.Part, shape: str, folder: Path, limit: float, *others: Any) -> float:
        self.append(part.name)
        self.limits[part.name] = limit
        others[-1].add(part.name, {"passed": False, "passed_all": True, "end": self.end})
        return 0.0


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    ran = Ran()
    monkeypatch.setattr(gpu, "run", ran.run)
    return ran


def options(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"dry": False, "only": None, "limit": 600.0, "shape": "tiny"} | changed)


def test_a_later_call_runs_what_an_earlier_one_did_not_finish_and_keeps_its_figures(ran: Ran, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    lines = [f'{{"part": "{part.name}", "end": "done"}}\n' for part in PLAN if part.call == 1]
    earlier.write_text("".join(lines) + '{"part": "peer", "ratio": 4.5}\n{"part": "peer", "end": "cut off"}\n')
    with Results(tmp_path / "out", earlier) as results:
        run_all(options(), tmp_path, results)
    left = [part.name for part in PLAN if part.call > 1]
    assert ran == ["checkpoint", "peer", *left[:1], "checkpoint", *left[1:]]  # the 4B shape has one of its own
    assert read(tmp_path / "out")["peer"] == {"ratio": 4.5, "passed": False, "passed_all": True, "end": "done"}


def test_wrong_kernels_are_followed_by_the_memory_checker_and_a_part_without_time_is_not_begun(
    ran: Ran, tmp_path: Path
) -> None:
    with Results(tmp_path / "out", None) as results:
        run_all(options(), tmp_path, results)
        assert ran[:3] == ["checkpoint", "kernels", "sanitizer"]
    ran.clear()
    with Results(tmp_path / "out", None) as results:
        run_all(options(limit=5.0), tmp_path, results)
        assert ran == []
        assert results.figures["peer"]["end"] == "no time left"


def test_a_part_may_exceed_its_limit_by_half_while_time_is_left(ran: Ran, tmp_path: Path) -> None:
    limits = {part.name: part.limit for part in PLAN}
    with Results(tmp_path / "out", None) as results:
        run_all(options(only=["serving", "peer"], limit=limits["serving"] * 1.2), tmp_path, results)
    assert ran.limits["checkpoint"] == 1.5 * limits["checkpoint"]
    assert ran.limits["serving"] == pytest.approx(1.2 * limits["serving"], abs=5)


def test_without_a_checkpoint_no_other_part_is_tried(ran: Ran, tmp_path: Path) -> None:
    ran.end = "cut off"
    with Results(tmp_path / "out", None) as results, pytest.raises(SystemExit, match="there is no checkpoint"):
        run_all(options(), tmp_path, results)
    assert ran == ["checkpoint"]


def test_a_pack_that_is_too_large_to_be_sent_with_the_tree_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"ROOT": tmp_path, "PACK": tmp_path / "pack", "MAX_MIB": 2}.items():
        monkeypatch.setattr(gpu_pack, name, value)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "pack").mkdir()
    (tmp_path / ".gitignore").write_text("pack\nignored\n")
    for name in ("pack/wheel", "ignored"):
        (tmp_path / name).write_bytes(bytes(2**20))
    gpu_pack.check_size()
    assert capsys.readouterr().out == "pack: 1.0 MiB, with the tree 1.0, for Python 3.12\n"
    (tmp_path / "new").write_bytes(bytes(2**20))
    with pytest.raises(SystemExit, match="may have 2 MiB"):
        gpu_pack.check_size()


@pytest.mark.slow  # imports torch
def test_the_memory_checker_counts_memory_errors_and_says_whether_the_kernels_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gpu_checks
    from benchmarks.gpu_setup import Setting

    tool = tmp_path / "compute-sanitizer"
    says = ["$*", '  FIGURE {"passed": true}', "========= ERROR SUMMARY: 2 errors"]
    tool.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in says), "exit 9"]))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    setting = Setting(tmp_path, "tiny", gpu_checks.torch.device("cpu"), quick=True)
    assert list(gpu_checks.sanitizer(setting)) == [{"kernels_agree": True}, {"errors": 2}, {"status": 9}]


def test_the_table_says_what_met_its_bar_what_missed_it_and_what_has_no_figure() -> None:
    load = {"pairs_per_second": 1900.0, "share_of_batch_after_batch": 0.93, "p99_ms": 410.0}
    served = {"clients": "over HTTP", "batch_after_batch_pairs_per_second": 2040.0, "cold_start_seconds": 21.0}
    figures: dict[str, dict[str, Any]] = {
        "latency": {"p50_ms": 8.2, "p99_ms": 8.9, "end": "done"},
        "serving": {**served, "16 clients": load, "64 clients": load | {"p99_ms": 501.0}, "end": "cut off"},
        "sanitizer": {"errors": 0},
        "peer": {"not_here": "there is no sentence-transformers"},
    }
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table(figures).splitlines()}
    assert lines["ten passages, p50"] == "| ten passages, p50 | 8.2 ms (P99 8.9) | 9 ms, aim 6 | met |"
    assert lines["served to 16 clients"].endswith("(over HTTP) (cut off) | 90 %, P99 < 500 ms | met |")
    assert lines["served to 64 clients"].endswith("| missed |")
    assert lines["start, kernels to compile"].endswith("| 21.0 s (cut off) | 20 s | missed |")
    assert lines["start, warm cache"].endswith("| no figure (cut off) | 10 s | not measured |")
    assert "there is no sentence-transformers" in lines["320 passages against sentence-transformers"]
    assert lines["compute-sanitizer over the kernels"].endswith("| missed |")  # it may have run nothing


def test_unpacking_takes_the_wheels_that_fit_of_packages_that_are_missing_or_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    this = f"cp{sys.version_info.major}{sys.version_info.minor}"
    version_of = gpu_pack.metadata.version
    monkeypatch.setattr(gpu_pack.metadata, "version", lambda name: "8.0" if name == "pytest" else version_of(name))
    wheels = {  # -> what the package needs
        f"absent-1-{this}-none-any": "packaging>=999",
        "absent-1-cp27-cp27m-any": "",
        "odd-1-cp27-none-any": "",
        "numpy-999-py3-none-any": "",
        "packaging-999-py3-none-any": "numpy>=1",
        "pytest-999-py3-none-any": "",
    }
    for wheel, needs in wheels.items():
        name, version = wheel.split("-")[:2]
        with zipfile.ZipFile(tmp_path / f"{wheel}.whl", "w") as file:
            file.writestr(f"{name}/__init__.py", wheel)
            file.writestr(f"{name}-{version}.dist-info/METADATA", f"Requires-Dist: {needs}\n" if needs else "")
    monkeypatch.setattr(gpu_pack, "PACK", tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    gpu_pack.unpack(tmp_path / "site")
    assert {file.name for file in (tmp_path / "site").glob("[a-z]*[a-z]")} == {
        "absent", "absent-1.dist-info", "packaging", "packaging-999.dist-info", "pytest", "pytest-999.dist-info",
    }  # fmt: skip
    assert f"-{this}-" in (tmp_path / "site/absent/__init__.py").read_text()
    assert "no wheel for this Python: odd\n" in capsys.readouterr().out
