"""PsychoSafe from scratch: Qwen3.5 in plain PyTorch and Triton, fine-tuned to refuse with care."""

from typing import TYPE_CHECKING

from psysafe.version import __version__

if TYPE_CHECKING:
    from psysafe.checkpoint.base import load_model
    from psysafe.data.tokenizer import load_tokenizer

__all__ = ["__version__", "load_model", "load_tokenizer"]


def __getattr__(name: str):
    # Imported when first used: with them comes torch, and what a program imports first must be here at once
    # (psysafe/interrupt.py).
    if name == "load_model":
        from psysafe.checkpoint.base import load_model

        return load_model
    if name == "load_tokenizer":
        from psysafe.data.tokenizer import load_tokenizer

        return load_tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
