"""Prints a row as the model sees it, with its trained tokens coloured.

python -m psysafe.data --show FILE [--row N] [--model DIR] [--max-tokens N] [--system v0|v1|none|FILE]
                          [--train-turns last|all]
"""

import psysafe.interrupt  # noqa: F401  # isort: skip  (first: Ctrl-C during the imports ends quietly)
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

import numpy as np

from psysafe.cli import Parser
from psysafe.data.chat_template import TrainTurns
from psysafe.data.documents import Document, encode_row
from psysafe.data.prompts import system_text
from psysafe.data.rows import read_file, training_rows
from psysafe.data.tokenizer import Tokenizer, load_tokenizer
from psysafe.files import BUNDLED_MODEL
from psysafe.printable import counted, escaped
from psysafe.program import UserError, main_guard

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m psysafe.data", description="Show a row as the model sees it.")
    parser.add_argument("--show", required=True, metavar="FILE", help="a file of training rows")
    parser.add_argument("--row", type=int, default=1, metavar="N", help="which row, from 1 (default 1)")
    parser.add_argument("--model", default=BUNDLED_MODEL, metavar="DIR", help="folder or hub id (default: bundled)")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="cut longer rows (default 4096)")
    parser.add_argument("--system", default="none", metavar="v0|v1|none|FILE", help="system message, as train.py's")
    turns = get_args(TrainTurns)
    parser.add_argument("--train-turns", choices=turns, default=turns[0], help="turns that are trained, as train.py's")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    args = parser.parse_args(argv)
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    rows = read_file(args.show)
    if not 1 <= args.row <= len(rows):
        raise UserError(f"{args.show}: --row {args.row}, expected 1 to {len(rows)}")
    tokenizer = load_tokenizer(args.model)
    (row,) = training_rows([rows[args.row - 1]])  # another row that is none stops nobody from looking at this one
    document, length = encode_row(row, tokenizer, args.max_tokens, system_text(args.system), args.train_turns)
    print(f"{document.source} of {len(rows):,}\n\n{shown(document, tokenizer, color)}")
    cut = f", cut from {length:,}" if length > len(document) else ""
    print(f"{counted(len(document), 'token')}{cut}; {document.n_targets:,} trained")
    return 0


def shown(document: Document, tokenizer: Tokenizer, color: bool) -> str:
    """The document as text; trained tokens green, or without colour between [[ and ]]."""
    start, end = (GREEN, PLAIN) if color else ("[[", "]]")
    edges = [0, *(np.flatnonzero(np.diff(document.trained)) + 1), len(document)]
    text = ""
    for first, last in pairwise(edges):
        # A row's own control characters are printed as escapes: sent as they are, they would steer the terminal.
        piece = escaped(tokenizer.decode(document.tokens[first:last]))
        text += f"{start}{piece}{end}" if document.trained[first] else piece
    return text


if __name__ == "__main__":
    sys.exit(main_guard(main))
