"""Kernels of these tests run in the strict interpreter: true bf16, every access inside its argument, no races."""

import pytest

from kernels.ops._triton import HAS_TRITON


@pytest.fixture(autouse=True)
def every_access_is_watched():
    if not HAS_TRITON:
        yield
        return
    from kernels.proof.interpreter import strict_interpreter

    with strict_interpreter():
        yield
