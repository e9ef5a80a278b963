"""Shared by all tests. Triton's interpreter stands in for a GPU; it must be chosen before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
