"""Run one peer in its own process: `PYTHON peer_process.py NAME FOLDER DTYPE THREADS`, with JSON lines in and out.

The Python may have the peer but not this package, so this file imports neither at the top. It first prints
{"ready": seconds, "version": text} or {"missing": reason}. It answers each line
{"requests": [{"shared": prompt up to the document, "documents": [...]}, ...], "suffix": text} with
{"seconds": ..., "log_odds": [[...], ...]}.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 8  # prompts at a time, usual on a CPU
MAX_LENGTH = 8192
Request = dict[str, Any]
CHAT_TEMPLATE = (
    "{%- set t = namespace(query='', document='') -%}{%- for m in messages -%}"
    "{%- if m.role == 'query' -%}{%- set t.query = m.content -%}"
    "{%- elif m.role == 'document' -%}{%- set t.document = m.content -%}{%- endif -%}{%- endfor -%}"
    "{{- t.query + ' ' + t.document -}}"
)
"""For sentence-transformers: the query contains the whole prompt up to the document, the document the suffix."""


class Card:
    """The model card's code: left-padded prompts, and the logits of yes and no at the last position."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        import transformers

        self.model: Any
        self.torch, self.version = torch, f"transformers {transformers.__version__}"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model.eval()
        if torch.cuda.is_available():
            self.model = self.model.cuda()
        self.yes, self.no = (self.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))

    def score(self, requests: list[Request], suffix: str) -> list[list[float]]:
        return [self._request(request, suffix) for request in requests]

    def _request(self, request: Request, suffix: str) -> list[float]:
        log_odds: list[float] = []
        for start in range(0, len(request["documents"]), BATCH):
            prompts = [request["shared"] + " " + text + suffix for text in request["documents"][start : start + BATCH]]
            inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
            inputs.pop("token_type_ids", None)
            with self.torch.inference_mode():
                logits = self.model(**inputs).logits[:, -1, :].float()
            log_odds += (logits[:, self.yes] - logits[:, self.no]).tolist()
        return log_odds


class SentenceTransformers:
    """CrossEncoder with a chat template that joins query and document."""

    def __init__(self, folder: str, dtype: str) -> None:
        import sentence_transformers
        import torch

        self.version = f"sentence-transformers {sentence_transformers.__version__}"
        self.places = tempfile.TemporaryDirectory()
        place = Path(self.places.name)
        for file in Path(folder).iterdir():
            if file.name != "tokenizer_config.json":
                (place / file.name).symlink_to(file.resolve())
        config = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
        config["chat_template"] = CHAT_TEMPLATE
        (place / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        self.model = sentence_transformers.CrossEncoder(
            str(place), model_kwargs={"dtype": getattr(torch, dtype)}, activation_fn=torch.nn.Identity(),
            max_length=MAX_LENGTH, local_files_only=True,
        )  # fmt: skip

    def score(self, requests: list[Request], suffix: str) -> list[list[float]]:
        return [
            self.model.predict(
                [(request["shared"], document + suffix) for document in request["documents"]],
                batch_size=BATCH, show_progress_bar=False, convert_to_numpy=False, convert_to_tensor=True,
            ).float().flatten().tolist()
            for request in requests
        ]  # fmt: skip


class VLLM:
    """vLLM's pooling runner with prefix caching. All requests go in one call, which vLLM schedules."""

    def __init__(self, folder: str, dtype: str) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        import vllm

        self.version = f"vLLM {vllm.__version__}"
        self.model = vllm.LLM(
            folder, runner="pooling", dtype=dtype, max_model_len=4096, enable_prefix_caching=True,
            disable_log_stats=True,
            hf_overrides={
                "architectures": ["Qwen3ForSequenceClassification"],
                "classifier_from_token": ["no", "yes"],
                "is_original_qwen3_reranker": True,
            },
        )  # fmt: skip

    def score(self, requests: list[Request], suffix: str) -> list[list[float]]:
        # each round must see its requests for the first time
        self.model.reset_prefix_cache()
        queries = [request["shared"] for request in requests for _ in request["documents"]]
        documents = [" " + text + suffix for request in requests for text in request["documents"]]
        outputs = iter(self.model.score(queries, documents, use_tqdm=False))
        scores = [[next(outputs).outputs.score for _ in request["documents"]] for request in requests]
        return [[_log_odds(score) for score in row] for row in scores]


class CrossEncoder:
    """CrossEncoder for an encoder, whose tokenizer joins query and document; a request has a "batch_size"."""

    def __init__(self, folder: str, dtype: str) -> None:
        import sentence_transformers
        import torch

        self.version = f"sentence-transformers {sentence_transformers.__version__}"
        self.model = sentence_transformers.CrossEncoder(
            folder, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)}, local_files_only=True
        )

    def score(self, requests: list[Request], suffix: str) -> list[list[float]]:
        return [
            self.model.predict(
                [(request["shared"], document) for document in request["documents"]],
                batch_size=request["batch_size"], show_progress_bar=False, convert_to_tensor=True,
            ).float().flatten().tolist()
            for request in requests
        ]  # fmt: skip


def _log_odds(score: float) -> float:
    score = min(max(score, 1e-7), 1 - 1e-7)
    return math.log(score / (1 - score))


PEERS: dict[str, Any] = {
    "card": Card,
    "sentence-transformers": SentenceTransformers,
    "vllm": VLLM,
    "cross-encoder": CrossEncoder,
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main() -> None:
    name, folder, dtype, threads = sys.argv[1:5]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries apart from the answers
    start = time.perf_counter()
    try:
        peer = PEERS[name](folder, DTYPES[dtype])
        import torch

        if int(threads):
            torch.set_num_threads(int(threads))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({"ready": time.perf_counter() - start, "version": peer.version}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        log_odds = peer.score(job["requests"], job["suffix"])
        answer = {"seconds": time.perf_counter() - start, "log_odds": log_odds}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
