"""Score a Parquet file of pairs with a pool of rerankers in your own Ray Data pipeline.

    pip install 'local-rerank[ray]'
    python examples/parquet_on_ray.py pairs.parquet scored.parquet

The input has the columns query and document; the output also has relevance_score. If you need no other steps, use
`local-rerank batch pairs.parquet --output scored.parquet --ray`, which also resumes.
"""

import sys
from pathlib import Path
from typing import Any

from local_rerank.batch import ray_cluster

ray_cluster.connect()  # joins RAY_ADDRESS, or starts Ray on this machine's loopback, without usage statistics

import ray  # noqa: E402

BATCH_PAIRS = 512


class Scorer:
    """One engine per actor. For GPUs use `Reranker(device="cuda")` here and `num_gpus=1` below."""

    def __init__(self) -> None:
        from local_rerank import Reranker

        self.reranker = Reranker(threads=1)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(batch["query"], batch["document"], strict=True)
        return {**batch, "relevance_score": self.reranker.score(pairs)}


def main(input: str, output: str) -> None:
    pairs = ray.data.read_parquet(input)
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=2)
    scored = pairs.map_batches(Scorer, batch_size=BATCH_PAIRS, compute=pool, num_cpus=1)
    scored.write_parquet(output)
    print(f"{output}: {ray.data.read_parquet(output).count()} pairs")


if __name__ == "__main__":
    main(*(str(Path(name).resolve()) if "://" not in name else name for name in sys.argv[1:]))
