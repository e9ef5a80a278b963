"""PsychoSafe from scratch: Qwen3.5 in plain PyTorch and Triton, fine-tuned to refuse with care."""

from psysafe.checkpoint.base import load_model
from psysafe.data.tokenizer import load_tokenizer
from psysafe.version import __version__

__all__ = ["__version__", "load_model", "load_tokenizer"]
