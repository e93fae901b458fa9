"""Tests on a GPU, all of them by `TRITON_INTERPRET=0 pytest -m gpu`: Triton interprets or compiles in a process."""

from __future__ import annotations

import os

import pytest
import torch

can_run = torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0"
needs_gpu = pytest.mark.skipif(not can_run, reason="needs a CUDA device and TRITON_INTERPRET=0")
