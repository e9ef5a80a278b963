"""PsychoSafe from scratch: Qwen3.5 in plain PyTorch and Triton, fine-tuned to refuse with care."""

import importlib

_PUBLIC = {"load_model": "psysafe.checkpoint.base", "load_tokenizer": "psysafe.data.tokenizer"}

__all__ = [*_PUBLIC]
__version__ = "0.1.0"


def __getattr__(name: str):
    # Imported when asked for: with the model, `python -m psysafe.data` would take 1.25 times as long to start.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'psysafe' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
