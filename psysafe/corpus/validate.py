"""Rows that training refuses, and what else is worth a look."""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from psysafe.checkpoint.base import resolve_model
from psysafe.data.documents import encode_rows
from psysafe.data.prompts import system_text
from psysafe.data.rows import CATEGORY, CLUSTER, Row, as_training_row, read_file
from psysafe.data.text import normalise
from psysafe.data.tokenizer import Tokenizer, load_tokenizer
from psysafe.files import BUNDLED_MODEL, clusters
from psysafe.printable import one_line, plain
from psysafe.program import UserError

EXAMPLES = 5  # rows shown of each kind of note

Notes = Mapping[str, Sequence[str]]  # what was noted -> the rows, each a text


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--model", default=BUNDLED_MODEL, help="whose tokenizer counts (default: the bundled one)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of train.py (4096)")
    parser.add_argument("--system", default="none", metavar="v0|v1|none|FILE", help="of train.py (none)")


def run(args: argparse.Namespace) -> int:
    tokenizer, system = load_tokenizer(resolve_model(args.model)[0]), system_text(args.system)
    rows = [row for path in args.files for row in read_file(path)]
    problems, notes = validate(rows, tokenizer, args.max_tokens, system)
    print("\n".join(map(one_line, problems)) if problems else f"no problems in {len(rows):,} rows")
    print(plain(notes_as_text(notes, f"tokens counted by the tokenizer of {args.model}")), end="")
    return 1 if problems else 0


def validate(
    rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int, system: str | None = None
) -> tuple[list[str], Notes]:
    """(why training refuses rows, a line each; what it takes and somebody may want to know).

    rows: as `read_file` gives them. What is refused is decided by the very functions that training calls.
    """
    problems: list[str] = []
    notes: dict[str, list[str]] = defaultdict(list)
    first_with: dict[str, str] = {}  # normalised prompt -> where it stands first
    for raw in rows:
        row, row_problems = as_training_row(raw)
        if not row_problems:
            try:
                n_cut = encode_rows([row], tokenizer, max_tokens, system).n_cut
            except UserError as error:
                row_problems = [str(error).removeprefix(f"{row.where}: ")]
            else:
                if n_cut:
                    notes[f"longer than {max_tokens:,} tokens, cut at the end (train.py --long-rows)"].append(row.where)
        problems += [f"{row.where}: {problem}" for problem in row_problems]
        if isinstance(row.fields, dict) and row.messages is None:
            for kind, text in _noted(row.fields):
                notes[kind].append(f"{row.where}: {text}")
            if isinstance(prompt := row.fields.get("prompt"), str):
                first = first_with.setdefault(normalise(prompt), row.where)
                if first != row.where:
                    notes["the same prompt as an earlier row"].append(f"{row.where}: the same prompt as {first}")
    return problems, notes


def _noted(fields: dict) -> Iterable[tuple[str, str]]:
    """(kind, text) of what the other tools of this package would need: clusters for split, strategies for impute."""
    known = {name: entry["strategies"] for name, entry in clusters()["clusters"].items()}
    cluster, strategy = fields.get(CLUSTER), fields.get("framework_name")
    for key in (CLUSTER, CATEGORY):
        if not isinstance(fields.get(key), str):
            yield f"without {key}", f"no {key} in it"
    if isinstance(cluster, str) and cluster not in (*known, "benign"):
        yield f"unknown {CLUSTER}", f"unknown {CLUSTER} {cluster!r:.60}; known: {', '.join(known)}, benign"
    if isinstance(strategy, str) and strategy in clusters()["strategies"]:
        if strategy not in known.get(cluster if isinstance(cluster, str) else "", [strategy]):
            text = f"{strategy!r} is no strategy of {cluster!r}: {', '.join(known[cluster])}"
            yield "framework_name is a strategy of another cluster", text
    elif strategy and cluster != "benign":
        # As in the published rows, where it is the benchmark that the prompt comes from.
        yield "framework_name is no known strategy: impute gives no hint", f"framework_name {strategy!r:.60}"


def notes_as_text(notes: Notes, counted_by: str) -> str:
    """The notes by kind, with a few examples."""
    lines = ["", f"to look at; train.py takes these rows as they are ({counted_by})"] if notes else []
    for kind, rows in notes.items():
        lines.append(f"  {len(rows):,} rows: {kind}")
        lines += [f"    {text}" for text in rows[:EXAMPLES]]
        lines += [f"    and {len(rows) - EXAMPLES:,} more"] if len(rows) > EXAMPLES else []
    return "".join(f"{line}\n" for line in lines)
