"""Which prompts of a benchmark stand in training rows: reported with its result, never hidden."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from psysafe.data.rows import read_table
from psysafe.program import UserError


def normalised(text: str) -> str:
    """Lower case, letters and digits only, single spaces."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def training_prompts(paths: Sequence[str | Path]) -> list[str]:
    """The prompts of training files; of `messages` rows, every user turn."""
    found = []
    for path in paths:
        for number, row in enumerate(read_table(path, []), 1):
            turns = row.get("messages") or [{"role": "user", "content": row.get("prompt", "")}]
            try:
                texts = [turn["content"] for turn in turns if turn["role"] == "user"]
            except (TypeError, KeyError):
                texts = [None]
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{path} row {number}: {turns!r:.60}; expected messages with role and content")
            found += texts
    return found


def overlap(prompts: Iterable[str], training: Iterable[str]) -> dict[str, int]:
    """How many prompts stand among the training prompts: exactly, and after `normalised`."""
    prompts, training = list(prompts), set(training)
    bare = {normalised(text) for text in training}
    return {
        "prompts": len(prompts),
        "exact": sum(prompt in training for prompt in prompts),
        "normalised": sum(normalised(prompt) in bare for prompt in prompts),
    }
