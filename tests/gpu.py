"""The marker of tests on a GPU. `TRITON_INTERPRET=0 pytest -m gpu` runs them: a process interprets or compiles."""

from __future__ import annotations

import os

import pytest
import torch

can_run = torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0"
needs_gpu = pytest.mark.skipif(not can_run, reason="needs a CUDA device and TRITON_INTERPRET=0")
