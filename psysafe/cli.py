"""What every command line shares: a parser whose errors are the user's, flags from a dataclass, lines on stderr."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path

from tqdm import tqdm

from psysafe.files import nearest_existing
from psysafe.printable import one_line, plain
from psysafe.program import UserError

# What other programs call it, too far from ours for a spelling match: the first of ours that the command has.
OTHER_NAMES = {
    "learning-rate": ["lr"],
    "num-train-epochs": ["epochs"],
    "per-device-train-batch-size": ["batch-size"],
    "r": ["lora-rank"],
    "rank": ["lora-rank"],
    "alpha": ["lora-alpha"],
    "target-modules": ["lora-targets"],
    "max-seq-length": ["max-tokens"],
    "max-length": ["max-tokens", "max-new-tokens"],
    "max-tokens": ["max-new-tokens"],
    "output-dir": ["out"],
    "output": ["out"],
    "resume-from-checkpoint": ["resume"],
    "save-steps": ["save-every"],
    "dataset": ["data", "prompts"],
    "train-file": ["data"],
    "validation-file": ["val-data"],
    "model-name-or-path": ["model"],
    "report-to": ["report"],
    "optim": ["optimizer"],
    "temp": ["temperature"],
    "n-predict": ["max-new-tokens"],
    "system-prompt": ["system"],
    "lora": ["adapter"],
    "peft": ["adapter"],
    "enable-thinking": ["thinking"],
}

# What other programs ask for and this one always does, or decides itself.
NOTHING_TO_SET = {
    "packing": "rows are always packed, and never see each other",
    "gradient-checkpointing": "what does not fit in memory is recomputed",
    "gradient-accumulation-steps": "--batch-size counts whole documents; --micro-batch-tokens cuts them",
    "bf16": "--dtype says it, and is bfloat16 on a GPU",
    "fp16": "--dtype says it, and is bfloat16 on a GPU",
    "attn-implementation": "the project's own kernels run wherever they can",
    "trust-remote-code": "no code of a model is ever run",
    "lr-scheduler-type": "the rate always warms up, then falls to zero as a cosine",
}


class _Store(argparse._StoreAction):
    """A flag that takes a list and is given twice has one list. Of two single values the later one counts."""

    def __call__(self, parser, namespace, values, option_string=None):
        earlier = getattr(namespace, self.dest, None)
        was_given = earlier is not None and earlier is not self.default
        if self.option_strings and self.nargs in ("+", "*") and was_given:  # argparse itself would drop it
            values = [*earlier, *values]
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit; a flag may have underscores for hyphens, and one
    with a list may be given twice."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for action in (None, "store"):
            self.register("action", action, _Store)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        return super().parse_known_args(hyphenated(sys.argv[1:] if args is None else args), namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        settings, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("--"):
                suggestion = hint(word[2:].split("=")[0], self._flags(settings), "--")
                raise UserError(f"unknown flag {shown(word)}{suggestion or '; see --help'}")
        if unknown:
            expected = "settings are given as --key value, a text of several words in quotes"
            raise UserError(f"unexpected argument {shown(unknown[0])}; {expected} (see --help)")
        return settings

    def _flags(self, settings: argparse.Namespace) -> list[str]:
        """The names of all flags, also those of the command that was given."""
        names = []
        for action in self._actions:
            names += [option[2:] for option in action.option_strings if option.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                command = getattr(settings, action.dest, None)
                names += action.choices[command]._flags(settings) if command in action.choices else []
        return names


def hyphenated(words: Sequence[str]) -> list[str]:
    """The words of a command line, with hyphens where the name of a flag has underscores: --judge_url=A_B is
    --judge-url=A_B."""
    end = words.index("--") if "--" in words else len(words)  # after it nothing is a flag
    flags = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in words[:end]]
    return [*flags, *words[end:]]


def refuse_without_effect(argv: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Raises UserError for a flag of the command line that has no effect beside the others. reasons: flag -> why."""
    words = hyphenated(argv)
    words = words[: words.index("--")] if "--" in words else words
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    for flag, reason in reasons.items():
        if flag in given:
            raise UserError(f"{flag} has no effect {reason}; leave it out")


def hint(name: str, known: Iterable[str], dashes: str = "") -> str:
    """What to add to an error about an unknown flag or key: the one that was meant, or why there is none; "" where
    nothing comes near. Names have hyphens or underscores, the suggestion has what `known` has."""
    by_name = {key.replace("_", "-"): key for key in known}
    name = name.replace("_", "-")[:100]
    if name in NOTHING_TO_SET and name not in by_name:
        return f"; there is nothing to set: {NOTHING_TO_SET[name]}"
    likely = [other for other in OTHER_NAMES.get(name, ()) if other in by_name]
    likely = likely or difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)
    return f"; did you mean {dashes}{by_name[likely[0]]}?" if likely else ""


def shown(value: object) -> str:
    """A value for an error message: on one line, of 80 characters at most."""
    text = repr(value) if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-15:]


def setting(default, sentence: str):
    """A dataclass field that a flag can set; the sentence is its help."""
    return field(default=default, metadata={"help": sentence})


def add_settings(parser: argparse.ArgumentParser, *kinds: type) -> None:
    """A flag --NAME for every `setting` of these dataclasses, and --no-NAME beside it for a bool."""
    for item in (item for kind in kinds for item in fields(kind) if "help" in item.metadata):
        flag, sentence = "--" + item.name.replace("_", "-"), item.metadata["help"].replace("%", "%%")
        if item.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=item.default, help=sentence)
        else:
            about = f"{sentence} ({item.default})"
            parser.add_argument(flag, type=item.type, default=item.default, metavar="N", help=about)


def read_settings(kind: type, args: argparse.Namespace) -> dict:
    """The arguments that are settings of a dataclass, by name."""
    return {item.name: getattr(args, item.name) for item in fields(kind) if "help" in item.metadata}


def whole_number(text: str) -> int:
    """For argparse: a number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number above 0")
    return int(text)


def amount(text: str) -> float:
    """For argparse: a number from 0 on."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number from 0 on")
    return number


def out_folder(text: str) -> str:
    """For argparse: a folder to write to, new or not. What is found out here costs nobody hours of answers."""
    if not (nearest := nearest_existing(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {nearest} is a file; expected a folder, or a new name")
    return text


def out_file(text: str) -> str:
    """For argparse: a file to write."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: a folder; expected the name of a file to write")
    out_folder(str(Path(text).absolute().parent))
    return text


def say(text: str) -> None:
    """A line on stderr: what is going on, beside the results on stdout. Text of others cannot steer the terminal. Of
    several ranks the first one speaks."""
    if is_first_rank():
        print(plain(text), file=sys.stderr, flush=True)


def is_first_rank() -> bool:
    """Whether this process is rank 0, as torchrun says, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def refuse_ranks(what: str) -> None:
    """Raises UserError where torchrun has started several ranks."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{what} has no rows to share with other ranks; start it without torchrun")


def progress(total: int, description: str, unit: str) -> tqdm:
    """A progress line on stderr with what is done, the time left and the rate; `bar.update()` after each unit.

    On a terminal it is one line, rewritten; in a log a line every 30 seconds and one at the end. None for total 0, and
    of several ranks the first one has it.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    disable = total == 0 or not is_first_rank()
    look = {"mininterval": interval, "dynamic_ncols": True, "file": sys.stderr, "disable": disable}
    return tqdm(total=total, desc=one_line(description), unit=f" {unit}", **look)
