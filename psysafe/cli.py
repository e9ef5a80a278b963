"""What every command line shares: a parser whose errors are the user's, and one progress line."""

import argparse
import sys

from tqdm import tqdm

from psysafe.program import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def progress(total: int, description: str, unit: str) -> tqdm:
    """A progress line on stderr with what is done, the time left and the rate; `bar.update()` after each unit.

    On a terminal it is one line, rewritten; in a log a line every 30 seconds and one at the end.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    look = {"mininterval": interval, "dynamic_ncols": True, "file": sys.stderr}
    return tqdm(total=total, desc=description, unit=f" {unit}", **look)
