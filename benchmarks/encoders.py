"""Compare the speed and scores of encoders with sentence-transformers' `CrossEncoder`, in alternation in one run.

    python -m benchmarks.encoders FOLDER [--shape minilm-l6 bge-base v2-m3] [--dtype fp32 auto] [--peer-python PATH]

FOLDER keeps checkpoints of random weights. Pairs have 20 to 400 tokens, in random order; both sides get texts and
tokenize them. The peer sorts by length itself, and its fastest batch size counts. `peer_process.py` has its code.
CPU seconds count on a busy machine, with `--threads 1`: there, waiting for a CPU is left out of the ratio.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from local_rerank.engine.cpu.process_setup import configure_process

configure_process()  # must run before torch is imported

import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from benchmarks.peers import PeerProcess  # noqa: E402
from local_rerank import Reranker  # noqa: E402
from local_rerank.bench.measure import agreement  # noqa: E402
from local_rerank.bench.targets import RerankerTarget, Round  # noqa: E402
from local_rerank.checkpoints.encoder_tensors import ENCODER_SHAPES  # noqa: E402
from local_rerank.types import RerankRequest  # noqa: E402

VOCABULARY = 30_000  # of every shape; v2-m3 has 250,002, which costs memory but no time
BATCHES = (12, 6, 3)  # of the peer; what padding costs depends on how many lengths a batch has
BERT, XLM_ROBERTA = "BertForSequenceClassification", "XLMRobertaForSequenceClassification"
SHAPES = {  # architecture, layers, hidden and inner size, heads, and pairs to score
    "minilm-l6": (BERT, 6, 384, 1536, 12, 48),
    "bge-base": (XLM_ROBERTA, 12, 768, 3072, 12, 12),
    "v2-m3": (XLM_ROBERTA, 24, 1024, 4096, 16, 6),
}


def make_encoder(folder: Path, shape: str) -> Path:
    """Write a checkpoint of random weights; a word of its tokenizer is a number and one token."""
    architecture, layers, hidden, inner, heads, _ = SHAPES[shape]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "bert" if architecture == BERT else "xlm-roberta",
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": 514,
        "type_vocab_size": 2 if architecture == BERT else 1,
        "pad_token_id": 1, "layer_norm_eps": 1e-5, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
        "sentence_transformers": {"version": "5", "activation_fn": "torch.nn.modules.linear.Identity"},
    }  # fmt: skip
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, size: tuple[int, ...]) -> torch.Tensor:
        is_norm = name.endswith("LayerNorm.weight")
        return torch.ones(size) if is_norm else torch.empty(size).normal_(std=0.05, generator=generator)

    weights = {name: weight(name, size) for name, size in ENCODER_SHAPES[architecture](config, 1).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
    words = [*special, *map(str, range(VOCABULARY - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    second = ":1" if architecture == BERT else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=f"[CLS] $A [SEP] $B{second} [SEP]{second}",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )  # fmt: skip
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "cls_token": "[CLS]",
             "sep_token": "[SEP]", "unk_token": "[UNK]", "model_max_length": 512,
             "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def request_of(num_pairs: int) -> RerankRequest:
    """A query of 8 tokens and documents that make pairs of 20 to 400, evenly distributed."""
    generator = random.Random(0)

    def text(num_words: int) -> str:
        return " ".join(str(generator.randrange(VOCABULARY - 4)) for _ in range(num_words))

    lengths = [9 + 380 * index // (num_pairs - 1) for index in range(num_pairs)]
    generator.shuffle(lengths)
    return RerankRequest(query=text(8), documents=tuple(map(text, lengths)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=["fp32", "auto", "int8"], help="of this library")
    parser.add_argument("--peer-dtype", nargs="+", default=["fp32"])
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has sentence-transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--threads", type=int, help="of both; default: their own")
    options = parser.parse_args()
    for shape in options.shape:
        with ExitStack() as stack:
            compare(stack, make_encoder(options.folder / shape, shape), request_of(SHAPES[shape][-1]), options)


def compare(stack: ExitStack, folder: Path, request: RerankRequest, options: argparse.Namespace) -> None:
    """Print a row for each system: times by the clock and by CPU, each also as a ratio to the peer's in fp32, and
    agreement with that peer. Times are medians.
    """
    runs: dict[str, Callable[[], Round]] = {}
    processes: dict[str, psutil.Process] = {}
    for dtype in options.dtype:
        reranker = stack.enter_context(
            Reranker(
                str(folder),
                dtype=dtype,
                device="cpu",
                threads=options.threads,
                max_batch_tokens=options.max_batch_tokens,
            )
        )
        target = RerankerTarget(dtype, reranker, "", None)
        name = f"{dtype} ({reranker.info.compute_dtype})"
        runs[name], processes[name] = partial(target.run, [request], concurrent=False), psutil.Process()
    for dtype in options.peer_dtype:
        peer = PeerProcess("cross-encoder", options.peer_python, folder, dtype, options.threads or 0)
        stack.callback(peer.close)
        for size in sorted({max(1, len(request.documents) // number) for number in BATCHES}):
            asked = {"shared": request.query, "documents": request.documents, "batch_size": size}
            name = f"{peer.name} by {size}"
            runs[name] = partial(peer.ask, {"requests": [asked], "suffix": ""})
            processes[name] = psutil.Process(peer.pid)
    for run in runs.values():  # warm-up
        run()
    log_odds: dict[str, Any] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            before = sum(processes[name].cpu_times()[:2])
            measured = run()
            times[name].append((measured.seconds, sum(processes[name].cpu_times()[:2]) - before))
            log_odds[name] = measured.log_odds
    medians = {name: [statistics.median(of) for of in zip(*pairs, strict=True)] for name, pairs in times.items()}
    peers = [name for name in runs if name.startswith("cross-encoder fp32")]
    fastest = [min(medians[name][i] for name in peers) for i in range(2)]
    print(f"\n{folder.name}: {len(request.documents)} pairs")
    for name in runs:
        same = agreement(log_odds[name], log_odds[peers[0]])
        speed = (f"{value:8.3f} s {base / value:5.2f}x" for value, base in zip(medians[name], fastest, strict=True))
        print(f"{name:26} {'  CPU '.join(speed)}  largest difference {same.largest:.2g}, tau {same.kendall_tau:.3f}")


if __name__ == "__main__":
    main()
