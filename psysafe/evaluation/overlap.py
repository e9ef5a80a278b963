"""Which prompts of a benchmark stand in training rows: reported with its result, never hidden."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from psysafe.data.chat_template import content_text
from psysafe.data.rows import read_table
from psysafe.data.text import normalise
from psysafe.program import UserError


def add_training_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", nargs="*", default=[], metavar="FILE", help="training rows, for overlap")


def overlap_with_files(prompts: Iterable[str], files: Sequence[str]) -> dict[str, int] | None:
    """`overlap` with the training rows of these files; None without files, where nothing is measured."""
    return overlap(prompts, training_prompts(files)) if files else None


def training_prompts(paths: Sequence[str | Path]) -> list[str]:
    """The prompts of training files; of `messages` rows, every user turn."""
    prompts = []
    for path in paths:
        for number, fields in enumerate(read_table(path, []), 1):
            messages = fields.get("messages") or [{"role": "user", "content": fields.get("prompt", "")}]
            try:
                texts = [content_text(message["content"]) for message in messages if message["role"] == "user"]
            except (TypeError, KeyError):
                texts = [None]
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{path} row {number}: {messages!r:.60}; expected messages with role and content")
            prompts += texts
    return prompts


def overlap(prompts: Iterable[str], training: Iterable[str]) -> dict[str, int]:
    """How many prompts stand among the training prompts: exactly, and after `normalise`."""
    prompts, training = list(prompts), set(training)
    normalised = {normalise(text) for text in training}
    return {
        "prompts": len(prompts),
        "exact": sum(prompt in training for prompt in prompts),
        "normalised": sum(normalise(prompt) in normalised for prompt in prompts),
    }
