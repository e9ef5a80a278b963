"""Triton, or a stand-in with which the kernel files still import where Triton is not installed (macOS).

The stand-in lets `@triton.jit` and `tl.constexpr` annotations pass; nothing is ever launched there.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    triton = SimpleNamespace(jit=lambda fn=None, **options: fn or (lambda fn: fn))
    tl = SimpleNamespace(constexpr=int)
    TensorDescriptor = None
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "TensorDescriptor", "tl", "triton"]
