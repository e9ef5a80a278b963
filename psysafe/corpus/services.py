"""Files of helplines: validated, and which entries somebody should look up again."""

import argparse
import datetime

from psysafe.printable import counted, plain
from psysafe.services import BUNDLED, MAX_AGE, read_services, require_clusters, to_check


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", nargs="+", metavar="FILE", default=BUNDLED,
                        help="countries of the project, or files (those of the bundled rows: US UK)")  # fmt: skip


def run(args: argparse.Namespace, today: datetime.date | None = None) -> int:
    """1 where an entry was never looked up on the live page, or more than a year ago. today: for tests."""
    services = read_services(args.check)
    require_clusters(services)
    lines = to_check(services, today or datetime.date.today())
    for line in lines:
        print(plain(line))
    print(f"{len(lines):,} of {counted(len(services.services), 'service')} to look up (not checked within "
          f"{MAX_AGE.days} days)")  # fmt: skip
    return 1 if lines else 0
