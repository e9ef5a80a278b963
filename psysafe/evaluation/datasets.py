"""Where the rows of a benchmark come from: the user's --data, else the data set's repository on the Hugging Face hub.

What is fetched belongs to one commit, which stands in the result. --data-revision COMMIT takes the same rows again. The
hub's cache keeps them, so that a second start needs no network.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from psysafe.hub import commit_of, fetch_data
from psysafe.program import UserError


class Repository(NamedTuple):
    """A data set on the hub and the files of the split that the benchmark asks."""

    name: str
    files: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser, repository: Repository | None, metavar: str, meaning: str) -> None:
    """--data, and --data-revision where a repository stands in for it. metavar, meaning: of --data, for --help."""
    where = f"default: fetched from the hub, {repository.name}" if repository else "not on the hub"
    parser.add_argument("--data", metavar=metavar, required=repository is None, help=f"{meaning} ({where})")
    if repository:
        help_text = "commit or branch of the hub's data set"
        parser.add_argument("--data-revision", default="", metavar="COMMIT", help=help_text)


def locate(repository: Repository | None, args: argparse.Namespace) -> tuple[Path, dict[str, str]]:
    """(path of the first file, what the result says of it). With --data that path is taken as it is.

    All files of the repository come from one commit. Raises UserError of one line, which names --data, where the hub
    gives nothing.
    """
    if args.data:
        if repository and args.data_revision:
            raise UserError(f"--data-revision is of the hub's data set, but --data {args.data} is given; drop one")
        return Path(args.data), {"data": args.data}
    names, revision = repository.files, args.data_revision
    paths = []
    for name in names:
        paths.append(fetch_data(repository.name, name, revision, "or give --data with a copy"))
        revision = commit_of(paths[0], names[0])  # a branch may move between two files
    return paths[0], {"data": f"{repository.name}, {', '.join(names)}", "data revision": revision}
