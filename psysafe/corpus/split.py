"""Stratified train, val and test files."""

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from psysafe.cli import out_folder
from psysafe.corpus.draft_checks import NEITHER, cluster_or_group
from psysafe.corpus.outputs import refuse_inputs
from psysafe.corpus.texts import first_user_text
from psysafe.data.prompts import system_text
from psysafe.data.rows import CLUSTER, Row, json_line, read_rows, write_rows
from psysafe.data.text import contains_words, normalise
from psysafe.printable import counted
from psysafe.program import UserError

SEED = 42


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--out", type=out_folder, required=True, metavar="DIR",
                        help="receives train.jsonl, val.jsonl and test.jsonl")  # fmt: skip
    parser.add_argument("--val", type=int, default=100, help="validation rows a cluster (100)")
    parser.add_argument("--test", type=int, default=100, help="test rows a cluster (100)")
    parser.add_argument("--seed", type=int, default=SEED)
    quoted = "prompts quoted in these system prompts stay in train"
    parser.add_argument("--quoted-in", nargs="*", default=[], metavar="SYSTEM", help=quoted)


def run(args: argparse.Namespace) -> int:
    if args.val < 0 or args.test < 0:
        raise UserError(f"--val {args.val} --test {args.test}: expected numbers that are not negative")
    out = Path(args.out)
    paths = {name: out / f"{name}.jsonl" for name in ("train", "val", "test")}
    for path in paths.values():
        refuse_inputs("--out", path, {"the rows": args.files})
    rows = read_rows(args.files)
    quoted = [system_text(name) or "" for name in args.quoted_in]
    parts = split(rows, args.val, args.test, args.seed, quoted)
    for path in paths.values():
        _refuse_other_rows(path, rows)
    if all(cluster_or_group(row.fields) == NEITHER for row in rows):
        print(f"no row has a {CLUSTER!r}: all of them are split as one cluster")
    out.mkdir(parents=True, exist_ok=True)
    for name, members in parts.items():
        write_rows(members, paths[name])
    print(counts_as_text(parts))
    print(*paths.values(), sep="\n")
    return 0


def _refuse_other_rows(path: Path, rows: Sequence[Row]) -> None:
    """UserError where a file holds anything but these rows, as an earlier split of them wrote them."""
    if path.exists() and not set(path.read_bytes().splitlines(keepends=True)) <= set(map(json_line, rows)):
        raise UserError(f"{path}: holds something else than these rows; remove it, or give another --out")


def counts_as_text(parts: Mapping[str, Sequence[Row]]) -> str:
    """A table: a line for each cluster with its rows in each part, and one for all."""
    counts = {name: Counter(cluster_or_group(row.fields) for row in members) for name, members in parts.items()}
    clusters = sorted(set().union(*counts.values()))
    width = max(map(len, [*clusters, "all"]))
    lines = [" " * width + "".join(f"{name:>9}" for name in parts)]
    lines += [f"{cluster:<{width}}" + "".join(f"{n[cluster]:>9,}" for n in counts.values()) for cluster in clusters]
    return "\n".join([*lines, f"{'all':<{width}}" + "".join(f"{len(members):>9,}" for members in parts.values()), ""])


def split(
    rows: Sequence[Row], val: int = 100, test: int = 100, seed: int = SEED, quoted_in: Sequence[str] = ()
) -> dict[str, list[Row]]:
    """{"train", "val", "test"}: per cluster, in the order of the clusters' names, the rows are shuffled by one
    random.Random(seed); the first `val` go to val, the next `test` to test, the rest to train.

    Rows whose prompt a system prompt quotes stay in train: as a test item they would be known. A group (`plain`, ...)
    counts as the cluster of a row that has none. Rows of which none has either are one cluster; UserError where only
    some have one, or where a cluster has too few rows.
    """
    system_prompts = [normalise(text) for text in quoted_in]
    clusters: dict[str, list[Row]] = {}
    parts: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    some_have_one = any(cluster_or_group(row.fields) != NEITHER for row in rows)
    for row in rows:
        cluster = cluster_or_group(row.fields)
        if cluster == NEITHER and some_have_one:
            expected = f"expected one in every row, or in none; train.py --val-fraction splits without {CLUSTER}s"
            raise UserError(f"{row.where}: no {CLUSTER!r} in it, and other rows have one; {expected}")
        quoted = any(contains_words(text, normalise(first_user_text(row.fields))) for text in system_prompts)
        (parts["train"] if quoted else clusters.setdefault(cluster, [])).append(row)
    generator = random.Random(seed)
    # Sorted, so that the one generator gives the same split whatever the order of the rows' clusters in the file.
    for cluster in sorted(clusters):
        members = clusters[cluster]
        if len(members) < val + test:
            size = f"cluster {cluster!r:.60} has {counted(len(members), 'row')}"
            raise UserError(f"{members[0].file}: {size}, too few for {val} val and {test} test rows")
        generator.shuffle(members)
        parts["val"] += members[:val]
        parts["test"] += members[val : val + test]
        parts["train"] += members[val + test :]
    return parts
