"""Triton, or a stand-in with which the kernel files still import where Triton is not installed (macOS).

The stand-in lets `@triton.jit` and `tl.constexpr` annotations pass; nothing is ever launched there.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = SimpleNamespace(jit=lambda fn: fn)
    tl = SimpleNamespace(constexpr=int)
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "tl", "triton"]
