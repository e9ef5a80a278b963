"""PsychoSafe from scratch: Qwen3.5 in plain PyTorch and Triton, fine-tuned to refuse with care."""

from psysafe.checkpoint import load_model
from psysafe.tokenizer import load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
__version__ = "0.1.0"
