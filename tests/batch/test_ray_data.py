"""`local-rerank batch --ray` on a cluster of two nodes where a worker dies.

What does not depend on the cluster is tested with one engine in this process instead.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_rerank import Reranker
from local_rerank.batch import pieces, ray_data
from local_rerank.batch.pieces import PartFormat, Piece, PieceResult, PieceScorer, find_pieces, lines_between, suffix_of
from local_rerank.batch.ray_cluster import require_ray
from local_rerank.batch.ray_data import RayJob
from tests.command_line import Done, command, run_script

pytestmark = pytest.mark.filterwarnings(  # from Ray Data
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning:ray"
)

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_ROWS, NUM_DOCUMENTS = 200, 3
WORDS = "river mountain engine protein market treaty violin harbour glacier senate enzyme orchard".split()
TOLERANCE = 1e-4  # log-odds in fp32, in other batches


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start two nodes with one CPU each; yields the address."""
    require_ray()
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20},
    )
    try:
        made.add_node(num_cpus=1, object_store_memory=100 << 20)
        yield made.address
    finally:
        made.shutdown()


def shut_ray_down() -> None:
    import ray

    ray.shutdown()


def record(number: int, num_documents: int) -> dict[str, Any]:
    documents = [f"{WORDS[(number + i) % 12]} {WORDS[i % 12]} {number} {i}" for i in range(num_documents)]
    return {"id": f"q{number}", "query": f"{WORDS[number % 12]} {number}", "documents": documents}


def options(checkpoint: Path) -> list[str]:
    return ["--model", str(checkpoint), "--device", "cpu", "--dtype", "fp32", "--threads", "1"]


def on_ray(input: Path | str, output: Path | str, address: str, checkpoint: Path, *more: str) -> Done:
    done = command("batch", str(input), "--output", str(output), "--ray", address, *options(checkpoint), *more)
    assert done.returncode == 0, done.stderr
    return done


def alone(input: Path, output: Path, checkpoint: Path, *more: str) -> None:
    done = command("batch", str(input), "--output", str(output), *options(checkpoint), *more)
    assert done.returncode == 0, done.stderr


def lines(output: Path, pattern: str = "part-?????.jsonl") -> list[dict[str, Any]]:
    files = sorted(output.glob(pattern))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def rejects(output: Path) -> list[dict[str, Any]]:
    return lines(output, "*.rejects.jsonl")


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        scores = {item["index"]: item["log_odds"] for item in one["results"]}
        assert scores == pytest.approx({item["index"]: item["log_odds"] for item in other["results"]}, abs=TOLERANCE)


def kill_a_worker_after_the_first_part(output: Path, killed: list[int]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if list(output.glob("part-*.jsonl")):
            for process in psutil.Process().children(recursive=True):
                if "MapWorker" in " ".join(process.cmdline()) + process.name():
                    killed.append(process.pid)
                    return process.kill()
        time.sleep(0.02)


def test_a_cluster_gives_the_same_output_as_one_process_although_a_worker_is_killed(
    cluster: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    rows = [json.dumps(record(number, NUM_DOCUMENTS)) for number in range(NUM_ROWS)]
    rows.insert(100, '{"id": "broken", "query": "no documents"}')
    rows.insert(151, "{no json")
    input, output, single = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "single.jsonl"
    input.write_text("\n".join(rows), encoding="utf-8")
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after_the_first_part, args=(output, killed))
    killer.start()
    on_ray(input, output, cluster, tiny_checkpoint, "--deterministic")
    killer.join()
    assert killed
    alone(input, single, tiny_checkpoint, "--deterministic")
    found = lines(output)
    assert sum(len(row["results"]) for row in found) == NUM_ROWS * NUM_DOCUMENTS
    assert found == [json.loads(line) for line in single.read_text(encoding="utf-8").splitlines()]
    content = input.read_bytes()
    for error, line in (("documents must be a list, not missing", rows[100]), ("not JSON", rows[151])):
        (reject,) = [reject for reject in rejects(output) if reject["error"].startswith(error)]
        assert content[reject["byte"] :].startswith(line.encode() + b"\n")
        assert (reject["file"], reject["content"]) == (str(input), line)
    assert len(find_pieces(str(input))) > 20


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> str:
    """Score pieces with one engine in this process; returns an address to pass."""

    def run(job: RayJob, pieces: list[Piece], parts: PartFormat, address: str | None) -> Iterator[PieceResult]:
        with Reranker(config=job.config) as reranker:
            yield from map(PieceScorer(reranker, job.input, job.output, parts, blend=job.blend), pieces)

    monkeypatch.setattr(ray_data, "score_on_cluster", run)
    return "here"


def test_parquet_keeps_its_columns_and_only_a_missing_part_is_scored_again(
    in_this_process: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    table = pa.Table.from_pylist([record(number, 3) | {"price": number * 1.5} for number in range(60)])
    input, output, single = tmp_path / "in.parquet", tmp_path / "out.parquet", tmp_path / "single.parquet"
    pq.write_table(table, input, row_group_size=20)
    on_ray(input, output, in_this_process, tiny_checkpoint)
    alone(input, single, tiny_checkpoint)
    parts = sorted(output.glob("part-*.parquet"))
    found = pa.concat_tables([pq.read_table(part) for part in parts])
    assert found.schema.equals(pq.read_table(single).schema)
    assert found.column("price").to_pylist() == [number * 1.5 for number in range(60)]
    assert_same(found.to_pylist(), pq.read_table(single).to_pylist())
    before = {part: part.stat().st_mtime_ns for part in parts}
    parts[1].unlink()
    on_ray(input, output, in_this_process, tiny_checkpoint)
    assert_same(pa.concat_tables([pq.read_table(part) for part in parts]).to_pylist(), found.to_pylist())
    assert [part.stat().st_mtime_ns == before[part] for part in parts] == [True, False, True]
    again = ["batch", str(input), "--output", str(output), "--ray", in_this_process, *options(tiny_checkpoint)]
    for option, value in (("--instruction", "x"), ("--long-documents", "chunk")):
        other = command(*again, option, value)
        assert other.returncode == 1
        assert f"was started with {option[2:].replace('-', '_')} " in other.stderr
    pq.write_table(table.slice(1), input, row_group_size=20)
    changed = command(*again)
    assert changed.returncode == 1
    assert "was started with input_state " in changed.stderr


def test_json_lines_to_parquet_by_uri_gives_the_same_bits_as_one_process(
    in_this_process: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    rows = [json.dumps(record(number, 4) | {"id": number, "tag": [number]}) for number in range(60)]
    rows.insert(30, '{"query": "q", "document": "a pair among rankings"}')
    input, output, single = tmp_path / "in.jsonl", tmp_path / "out.parquet", tmp_path / "single.parquet"
    input.write_text("\n".join(rows), encoding="utf-8")
    same = ["--deterministic", "--blend", "bm25=1", "--return-documents", "--long-documents", "chunk"]
    same += ["--chunk-tokens", "30"]
    done = on_ray(input.as_uri(), f"fsspec+{output.as_uri()}", in_this_process, tiny_checkpoint, *same, "--json")
    event = json.loads(done.stdout.splitlines()[-1])
    assert (event["rows"], event["pairs"], event["rejected"]) == (60, 240, 1)
    assert event["tokens"] > 240
    alone(input, single, tiny_checkpoint, *same)
    parts = sorted(output.glob("part-*.parquet"))
    assert len(parts) > 3
    assert pa.concat_tables([pq.read_table(part) for part in parts]).equals(pq.read_table(single))
    error = "the record has document, but the first one of the file has documents"
    assert [reject["error"] for reject in rejects(output)] == [error]


def test_the_pipeline_example_adds_a_score_to_each_pair(cluster: str, nano: Reranker, tmp_path: Path) -> None:
    pairs = [(f"the {WORDS[i % 12]} of {i}", f"{WORDS[(i + i // 12) % 12]} {i}") for i in range(12)]
    table = pa.table({"query": [query for query, _ in pairs], "document": [text for _, text in pairs], "n": range(12)})
    pq.write_table(table, tmp_path / "in.parquet")
    with mock.patch.dict("os.environ", RAY_ADDRESS=cluster):
        try:
            run_script(EXAMPLES / "parquet_on_ray.py", str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"))
        finally:
            shut_ray_down()
    found = pq.read_table(tmp_path / "out.parquet").sort_by("n")
    assert found.drop_columns("relevance_score").equals(table)
    assert found.column("relevance_score").to_pylist() == pytest.approx(nano.score(pairs), abs=TOLERANCE)


def test_a_failing_engine_is_reported_in_one_line(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(record(1, 2)))
    output = tmp_path / "out.jsonl"
    arguments = [str(tmp_path / "in.jsonl"), "--output", str(output), "--ray", cluster, "--model", "./nowhere"]
    done = command("batch", *arguments)
    assert done.returncode == 1
    assert "local-rerank: an engine on the cluster failed: model './nowhere' is no folder or bundle" in done.stderr


@pytest.mark.parametrize(
    ("uri", "suffix"),
    [("a/b.JSONL", ".jsonl"), ("s3://bucket/a.parquet?region=eu-west-1", ".parquet"), ("a?b.jsonl", ".jsonl")],
)
def test_suffix_of_paths_and_uris(uri: str, suffix: str) -> None:
    assert suffix_of(uri) == suffix


@given(st.lists(st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"")), max_size=12), st.integers(1, 20))
def test_each_line_belongs_to_exactly_one_range(texts: list[bytes], size: int) -> None:
    content = b"\n".join(texts)
    found = []
    for begin in range(0, len(content), size):
        found += lines_between(BytesIO(content), begin, min(begin + size, len(content)))
    assert [line for _, line in found] == BytesIO(content).readlines()
    assert [content[offset : offset + len(line)] for offset, line in found] == [line for _, line in found]


def test_c20_wrong_options_are_reported_before_ray_starts(tmp_path: Path) -> None:
    input = tmp_path / "in.jsonl"
    input.write_text('{"query": "q", "documents": ["d"]}\n')
    for more, says in (
        (
            ["--output", str(tmp_path / "out.csv")],
            "a folder of parts, whose name says their form: NAME.jsonl or NAME.p",
        ),
        (
            ["--output", str(tmp_path / "folder")],
            f"output is {tmp_path / 'folder'}; with --ray it is a folder of parts",
        ),
        (["--output", "nowhere://bucket/out.jsonl"], "nowhere://bucket/out.jsonl cannot be opened"),
        (["--output", f"{input}/out.jsonl"], "the job stopped: "),
        (["--output", str(tmp_path / "out.jsonl"), "--cache", "c"], "cache cannot be combined with --ray"),
    ):
        done = command("batch", str(input), *more, "--ray")
        assert done.returncode == 1
        assert says in done.stderr
