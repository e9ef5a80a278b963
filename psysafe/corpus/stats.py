"""Rows, what they have too few of, duplicates, templates, token lengths.

python -m psysafe.corpus stats drafts.jsonl [--services AU [--unchecked]] [--json stats.json]
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from psysafe import services
from psysafe.checkpoint.base import resolve_model
from psysafe.cli import out_file, out_folder
from psysafe.corpus import balance
from psysafe.corpus.contacts import known_services
from psysafe.corpus.draft_checks import cluster_or_group
from psysafe.corpus.outputs import refuse_inputs, write_json
from psysafe.corpus.texts import answer_of, first_user_text
from psysafe.data.documents import encode_rows
from psysafe.data.rows import CATEGORY, Row, read_rows
from psysafe.data.text import normalise
from psysafe.data.tokenizer import Tokenizer, load_tokenizer
from psysafe.files import BUNDLED_MODEL, write_atomic
from psysafe.hub import is_repository
from psysafe.printable import counted, plain
from psysafe.program import UserError

HISTOGRAM = "lengths.png"
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
TEMPLATES = "answers with more than half of their text in other rows"  # as `check` blames them


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--model", default=BUNDLED_MODEL, help="whose tokenizer counts (default: the bundled one)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="the limit that rows are counted against (4096)")
    services.add_arguments(parser, "helplines left out when answers are compared")
    parser.add_argument("--plot", type=out_folder, metavar="DIR", help="write lengths.png there")
    parser.add_argument("--json", type=out_file, metavar="FILE", help="write the numbers there as well")


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    return services.without_effect(args)


def run(args: argparse.Namespace) -> int:
    inputs = {"the rows": args.files, "--services": services.paths(args.services)}
    for flag, out in (("--json", args.json), ("--plot", args.plot and Path(args.plot, HISTOGRAM))):
        if out:
            refuse_inputs(flag, out, inputs)
    rows = read_rows(args.files)
    numbers, lengths = stats(rows, tokenizer_of(args.model), args.max_tokens)
    numbers["tokenizer"] = args.model
    balanced = balance.count_balance(rows, known_services(args.services, args.unchecked))
    numbers[TEMPLATES] = balanced.templates
    numbers["balance"] = balance.as_json(balanced)
    print(plain(f"{as_text(numbers)}\n\n{balance.as_text(balanced, len(rows))}"))
    if args.json:
        write_json(args.json, numbers)
    if args.plot:
        folder = Path(args.plot)
        folder.mkdir(parents=True, exist_ok=True)
        plot_lengths(lengths, args.max_tokens, folder / HISTOGRAM)
        print(f"\nhistogram in {folder / HISTOGRAM}")
    return 0


def tokenizer_of(model: str, revision: str = "") -> Tokenizer:
    """The tokenizer of a model as train.py takes it. From the hub come its own files alone, and no weights."""
    return load_tokenizer(model if is_repository(model) else resolve_model(model)[0], revision or None)


def stats(rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int) -> tuple[dict, list[int]]:
    """(counts by name; the length in tokens of each whole rendered row)."""
    answers = [answer_of(row) for row in rows]
    data = encode_rows(rows, tokenizer, 10**9)
    lengths = [len(document) for document in data.documents]
    numbers = {
        "rows": len(rows),
        "clusters": dict(Counter(cluster_or_group(row.fields) for row in rows).most_common()),
        "categories": dict(Counter(_category(row) for row in rows).most_common()),
        "without reasoning": data.n_without_reasoning,
        "duplicate prompts": shared(normalise(first_user_text(row.fields)) for row in rows),
        "duplicate answers": shared(normalise(answer) for answer in answers),
        "tokens": {str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in PERCENTILES},
        "tokens in all": sum(lengths),
        "rows over the limit": sum(length > max_tokens for length in lengths),
        "max_tokens": max_tokens,
    }
    return numbers, lengths


def shared(texts: Iterable[str]) -> int:
    """How many of the texts occur more than once."""
    return sum(count for count in Counter(texts).values() if count > 1)


def _category(row: Row) -> str:
    """Own rows have no category: of these the cluster, or the group, is all there is."""
    category = row.fields.get(CATEGORY)
    return cluster_or_group(row.fields) + (f" / {category}" if category else "")


def as_text(numbers: dict) -> str:
    """The statistics as lines for a terminal."""
    n = numbers["rows"]
    tokens = counted(numbers["tokens in all"], "token")
    lines = [f"{counted(n, 'row')}, {tokens}, counted by the tokenizer of {numbers['tokenizer']}"]
    # Its vocabulary is a fraction of the real one: it cuts a text into more tokens.
    if numbers["tokenizer"] == BUNDLED_MODEL:
        lines.append("that is the bundled tiny tokenizer; --model names the model that will be trained")
    lines.append("\ncategories")
    lines += [f"  {count:>7,}  {count / n:>6.1%}  {name}" for name, count in numbers["categories"].items()]
    lines.append("\nrows")
    for key in ("without reasoning", "duplicate prompts", "duplicate answers", TEMPLATES):
        lines.append(f"  {numbers[key]:>7,}  {numbers[key] / n:>6.1%}  {key}")
    over = numbers["rows over the limit"]
    lines.append(f"  {over:>7,}  {over / n:>6.1%}  over {numbers['max_tokens']:,} tokens")
    lines.append("\ntokens a row, percentiles")
    lines.append("  " + "  ".join(f"{p}%: {value:,}" for p, value in numbers["tokens"].items()))
    return "\n".join(lines)


def plot_lengths(lengths: Sequence[int], max_tokens: int, path: Path) -> None:
    """A histogram of the rows' token lengths as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot: matplotlib is not installed; pip install matplotlib, or leave the flag out") from None
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    axes.hist(lengths, bins=min(60, max(10, len(set(lengths)))), color="#3b82f6")
    if max(lengths) > 0.5 * max_tokens:  # far from the limit its line would squeeze the histogram
        axes.axvline(max_tokens, color="#b91c1c", label=f"limit: {max_tokens:,}")
        axes.legend()
    axes.set(xlabel="tokens a row", ylabel="rows", title=counted(len(lengths), "row"))
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
