"""Rows that training refuses, and what else is worth a look."""

import argparse
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from psysafe.corpus.draft_checks import GROUP, GROUPS, NEITHER, cluster_or_group
from psysafe.corpus.stats import tokenizer_of
from psysafe.corpus.texts import first_user_text
from psysafe.data.chat_template import content_text
from psysafe.data.documents import encode_row, encode_rows, has_typed_tokens
from psysafe.data.prompts import system_text
from psysafe.data.rows import BENIGN, CLUSTER, Row, as_training_row, read_file
from psysafe.data.text import normalise
from psysafe.data.tokenizer import Tokenizer
from psysafe.files import clusters
from psysafe.printable import counted, hidden, one_line, plain
from psysafe.program import UserError
from psysafe.training.config import DEFAULT_FILE, TrainConfig, resolve, sentences

EXAMPLES = 5  # rows shown of each kind of note
SETTINGS = ("model", "max_tokens", "system", "train_turns", "long_rows")  # of a run: what it refuses depends on them
DROPPED = "longer than max_tokens, left out (train.py --long-rows drop)"

Notes = Mapping[str, Sequence[str]]  # what was noted -> the rows, each a text


def arguments(parser: argparse.ArgumentParser) -> None:
    file = os.path.relpath(DEFAULT_FILE)
    parser.add_argument("files", nargs="+", metavar="FILE")
    about = "with which train.py will run: its settings count, and the flags below win over it"
    parser.add_argument("--config", default=file, metavar="FILE", help=f"{about} ({file})")
    for name in SETTINGS:
        sentence = sentences()[name].replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=sentence)


def run(args: argparse.Namespace) -> int:
    flags = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    config, sources = resolve(["--config", args.config, *words])
    settings = [f"{name} {getattr(config, name)} ({sources[name]})" for name in SETTINGS]
    tokenizer = tokenizer_of(config.model, config.revision)
    rows = [row for path in args.files for row in read_file(path)]
    problems, notes = validate(rows, tokenizer, config)
    print(one_line(f"as train.py with {', '.join(settings)}"))
    print("\n".join(map(one_line, problems)) if problems else f"no problems in {counted(len(rows), 'row')}")
    print(plain(notes_as_text(notes)), end="")
    return 1 if problems else 0


def validate(rows: Sequence[Row], tokenizer: Tokenizer, config: TrainConfig) -> tuple[list[str], Notes]:
    """(why training refuses rows, a line each; what it takes and somebody may want to know).

    rows: as `read_file` gives them. What is refused is decided by the very functions that training calls.
    """
    problems: list[str] = []
    notes: dict[str, list[str]] = defaultdict(list)
    first_with: dict[str, str] = {}  # normalised prompt -> where it stands first
    system = system_text(config.system)
    n_taken = 0
    for raw in rows:
        row, row_problems = as_training_row(raw)
        kinds: list[str] = []
        if not row_problems:
            try:
                kinds = list(_encoded(row, tokenizer, config, system))
            except UserError as error:
                row_problems = [str(error).removeprefix(f"{row.where}: ")]
        if row_problems:  # and no notes: it has to be changed first
            problems += [f"{row.where}: {problem}" for problem in row_problems]
            continue
        n_taken += DROPPED not in kinds
        for kind in kinds:
            notes[kind].append(row.where)
        if characters := hidden("".join(_texts(row))):
            notes["with characters that no reader sees"].append(f"{row.where}: {', '.join(characters):.80}")
        for kind, text in _noted(row.fields):
            notes[kind].append(f"{row.where}: {text}")
        if prompt := first_user_text(row.fields):
            first = first_with.setdefault(normalise(prompt), row.where)
            if first != row.where:
                notes["the same prompt as an earlier row"].append(f"{row.where}: the same prompt as {first}")
    if not n_taken and not problems:
        problems.append(f"every row is longer than max_tokens {config.max_tokens:,}; none is left")
    return problems, notes


def _encoded(row: Row, tokenizer: Tokenizer, config: TrainConfig, system: str | None) -> Iterable[str]:
    """Kinds of notes about a row's tokens. UserError where training refuses the row."""
    options = (tokenizer, config.max_tokens, system, config.train_turns)
    if config.long_rows == "drop" and encode_row(row, *options)[1] > config.max_tokens:
        yield DROPPED
    elif encode_rows([row], *options, config.long_rows).n_cut:
        yield f"longer than {config.max_tokens:,} tokens, cut at the end (train.py --long-rows)"
    if has_typed_tokens(row, tokenizer):
        yield "with typed control tokens such as <|im_end|>, taken for text"


def _texts(row: Row) -> Iterable[str]:
    """Every text of a row that training reads."""
    if row.messages is None:
        return [row.fields.get("prompt") or "", row.reasoning, row.fields.get("answer") or ""]
    return [content_text(message.get("content")) or "" for message in row.messages if isinstance(message, dict)]


def _noted(fields: dict) -> Iterable[tuple[str, str]]:
    """(kind, text) of what the other tools of this package would need: clusters for split, strategies for impute."""
    known = {name: entry["strategies"] for name, entry in clusters()["clusters"].items()}
    cluster, strategy = fields.get(CLUSTER), fields.get("framework_name")
    if cluster_or_group(fields) == NEITHER:  # harmless and out-of-domain rows have a group, and no cluster
        yield f"without {CLUSTER}, or a group that has none: split needs one", f"no {CLUSTER} in it"
    if fields.get(GROUP) not in (None, "", *GROUPS):
        yield f"unknown {GROUP}", f"unknown {GROUP} {fields[GROUP]!r:.60}; known: {', '.join(GROUPS)}"
    if isinstance(cluster, str) and cluster not in (*known, BENIGN):
        yield f"unknown {CLUSTER}", f"unknown {CLUSTER} {cluster!r:.60}; known: {', '.join(known)}, benign"
    if isinstance(strategy, str) and strategy in clusters()["strategies"]:
        if strategy not in known.get(cluster if isinstance(cluster, str) else "", [strategy]):
            text = f"{strategy!r} is no strategy of {cluster!r}: {', '.join(known[cluster])}"
            yield "framework_name is a strategy of another cluster", text
    elif strategy and cluster != BENIGN:
        # As in the published rows, where it is the benchmark that the prompt comes from.
        yield "framework_name is no known strategy: impute gives no hint", f"framework_name {strategy!r:.60}"


def notes_as_text(notes: Notes) -> str:
    """The notes by kind, with a few examples."""
    lines = ["", "to look at; train.py refuses none of these rows"] if notes else []
    for kind, rows in notes.items():
        lines.append(f"  {counted(len(rows), 'row')}: {kind}")
        lines += [f"    {text}" for text in rows[:EXAMPLES]]
        lines += [f"    and {len(rows) - EXAMPLES:,} more"] if len(rows) > EXAMPLES else []
    return "".join(f"{line}\n" for line in lines)
