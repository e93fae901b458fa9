"""The model card's scoring in plain transformers code: the reference for our scores.

It pads on the left, uses an attention mask, computes the logits of the whole vocabulary and takes two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
FP32_TOLERANCE = 1e-5  # of log-odds, absolute and relative; the order of fp32 operations differs
FP32: Any = {"abs": FP32_TOLERANCE, "rel": FP32_TOLERANCE}  # for pytest.approx


def prompt(query: str, document: str, instruction: str = INSTRUCTION) -> str:
    return f"{PREFIX}<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}{SUFFIX}"


def prompt_ids(tokenizer: Tokenizer, query: str, document: str, instruction: str = INSTRUCTION) -> list[int]:
    """The ids of the whole prompt, encoded at once."""
    return list(tokenizer.encode(prompt(query, document, instruction), add_special_tokens=False).ids)


class ModelCard:
    """A checkpoint loaded and run by the model card's code."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.yes, self.no = (self.tokenizer.encode(word, add_special_tokens=False).ids[0] for word in ("yes", "no"))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def log_odds(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(num_prompts,) fp32."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, -1].float()
        return logits[:, self.yes] - logits[:, self.no]

    def pair(self, query: str, document: str, instruction: str = INSTRUCTION) -> float:
        return float(self.log_odds([prompt_ids(self.tokenizer, query, document, instruction)])[0])


@torch.inference_mode()
def classifier_log_odds(folder: Path, prompt: Sequence[int]) -> float:
    """The log-odds of one prompt by a sequence-classification checkpoint in plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.pad_token_id = None
    logits = model(input_ids=torch.tensor([list(prompt)])).logits[0]
    return float(logits[0] if logits.numel() == 1 else logits[1] - logits[0])
