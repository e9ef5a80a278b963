"""Checkpoints out.

    python -m psysafe.checkpoint merge --model DIR|HUB_ID --adapter DIR --out DIR
"""

import psysafe.interrupt  # noqa: F401  # isort: skip  (first: Ctrl-C during the imports ends quietly)
import argparse
import sys
from collections.abc import Sequence

from psysafe.checkpoint.merge import merge
from psysafe.program import main_guard


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m psysafe.checkpoint", description="Checkpoints out.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="write the base with an adapter merged into its weights")
    command.add_argument("--model", required=True, metavar="DIR|HUB_ID", help="the base")
    command.add_argument("--adapter", required=True, metavar="DIR", help="an adapter of this project's or PEFT's")
    command.add_argument("--out", required=True, metavar="DIR", help="new folder for the merged checkpoint")
    command.add_argument("--revision", default="", help="commit or branch of a hub id")
    command.add_argument("--shard-size", default="", metavar="5GB", help="cut new shards (default: the base's own)")
    args = parser.parse_args(argv)
    out = merge(args.model, args.adapter, args.out, args.shard_size, args.revision)
    print(f"merged checkpoint in {out}, read back and checked")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
