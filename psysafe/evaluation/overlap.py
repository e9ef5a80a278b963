"""Which prompts of a benchmark stand in training rows: reported with its result, never hidden."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from psysafe.data.formats import user_texts
from psysafe.data.rows import read_prompts
from psysafe.data.text import normalise
from psysafe.program import UserError


def add_training_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", nargs="*", default=[], metavar="FILE", help="training rows, for overlap")


def overlap_with_files(prompts: Iterable[str], files: Sequence[str]) -> dict[str, int] | None:
    """`overlap` with the training rows of these files; None without files, where nothing is measured."""
    return overlap(prompts, training_prompts(files)) if files else None


def training_prompts(paths: Sequence[str | Path]) -> list[str]:
    """The prompts of training files; of conversations, every user turn."""
    prompts = []
    for row in (row for path in paths for row in read_prompts(path)):
        texts = user_texts(row.fields)
        if not texts:  # nothing would overlap with it, and the row would look clean
            raise UserError(f"{row.where}: no text of a user in its messages; expected messages with role and content")
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
