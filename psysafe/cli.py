"""What every command line shares: a parser whose errors are the user's, flags from a dataclass, lines on stderr."""

import argparse
import sys
from dataclasses import field, fields

from tqdm import tqdm

from psysafe.printable import one_line, plain
from psysafe.program import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


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


def say(text: str) -> None:
    """A line on stderr: what is going on, beside the results on stdout. Text of others cannot steer the terminal."""
    print(plain(text), file=sys.stderr, flush=True)


def progress(total: int, description: str, unit: str) -> tqdm:
    """A progress line on stderr with what is done, the time left and the rate; `bar.update()` after each unit.

    On a terminal it is one line, rewritten; in a log a line every 30 seconds and one at the end. None for total 0.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    look = {"mininterval": interval, "dynamic_ncols": True, "file": sys.stderr, "disable": total == 0}
    return tqdm(total=total, desc=one_line(description), unit=f" {unit}", **look)
