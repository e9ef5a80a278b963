"""Shared by all tests. Triton's interpreter stands in for a GPU; it must be chosen before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_xdist_auto_num_workers(config):
    """`-n auto`: a worker a core, but each imports torch (0.6 GB), and ranks of a test are processes of their own."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
