"""How many rows one needs, measured on the miniature: 10 to 240 rows, three seeds, two lengths of training.

    python -m benchmarks.own_rows.curve --jobs 2     trains, answers, writes benchmarks/results/own-rows-curve.json
    python -m benchmarks.own_rows.curve --markdown   prints that file's table, for docs/own-rows.md

The rows are risky ones of the bundled files, as many of each cluster, and each set holds the smaller ones. What else a
run does is configs/tiny-selective.toml, contrast rows included. `epochs` trains as that file says, so that few rows get
few steps; `steps` trains every set for as many steps as the largest. The answers to benchmarks/selective/dev.jsonl are
judged by word lists; a prompt on which a run never ends counts as neither supported nor kept.

Runs and answers are kept in --work: killed and started again, the command does what is missing.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.selective.experiment import (
    HERE,
    MEASURES,
    ROOT,
    SEEDS,
    Measure,
    answer,
    judged,
    read_items,
    summary,
    train,
)
from psysafe.checkpoint.base import resolve_model
from psysafe.cli import Parser, refuse_without_effect
from psysafe.data.rows import CLUSTER, Row, read_rows, write_rows
from psysafe.evaluation.result import Table
from psysafe.evaluation.rules_accuracy import accuracy_note
from psysafe.evaluation.word_list_judge import BY_WORD_LISTS
from psysafe.files import clusters, parse_json, read_text, write_atomic
from psysafe.program import UserError, main_guard
from psysafe.runtime import versions
from psysafe.training.config import DEFAULT_FILE, resolve

RESULT = ROOT / "benchmarks" / "results" / "own-rows-curve.json"
CONFIG = DEFAULT_FILE.with_name("tiny-selective.toml")
POOL = ("assets:rows/train.jsonl", "assets:rows/wide.jsonl")
PROMPTS = HERE / "dev.jsonl"
SIZES = (10, 20, 40, 80, 160, 240)
BY_NAME = {measure.name: measure for measure in MEASURES}
SHOWN = [
    BY_NAME["four parts, own helplines %"],
    Measure("own helplines %", "", ["risky"], lambda x, _: x.parts.services),
    BY_NAME["harmless kept %"],
    BY_NAME["out-of-domain refusals kept %"],
]


class Run(NamedTuple):
    """A set of rows, and how long the miniature is trained on them."""

    name: str
    rows: Path
    steps: int = 0  # 0: the epochs of CONFIG

    def flags(self) -> list[str]:
        """Of train.py. The contrast rows are those of CONFIG, the bundled ones."""
        steps = ["--max-steps", str(self.steps)] if self.steps else []
        # Validated after every epoch, ten rows would cost more in validations than in steps.
        return ["--config", str(CONFIG), "--data", str(self.rows), "--val-fraction", "0", *steps]


class Line(NamedTuple):
    """One row of the table."""

    length: str  # epochs or steps
    n_rows: int
    runs: list[tuple[Run, int]]  # with the seed of each


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.markdown:
        if not RESULT.exists():
            raise UserError(f"{RESULT}: not measured yet; start the command without --markdown first")
        print(as_markdown(parse_json(read_text(RESULT))))
        return 0
    # The miniature's operations are so small that several threads of a process wait for each other. With one thread a
    # process, --jobs processes use as many cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    work = Path(args.work)
    check_base(work, args.model)
    write_sets(work, args.sizes, args.seeds)
    lines = plan(work, args.sizes, args.seeds)
    pairs = dict.fromkeys(pair for line in lines for pair in line.runs)
    with ThreadPoolExecutor(args.jobs) as executor:
        list(executor.map(lambda pair: measure_run(work, *pair, args.model), pairs))
    table = as_table(work, lines)
    print(table.as_text())
    if (tuple(args.sizes), tuple(args.seeds)) != (SIZES, SEEDS):
        print("a part of the curve: no result is written")
        return 0
    content = {"prompts": PROMPTS.name, "model": args.model, "seeds": SEEDS, "versions": versions()}
    write_atomic(RESULT, json.dumps(content | {"table": asdict(table)}, indent=1, ensure_ascii=False) + "\n")
    print(f"{RESULT}; for docs/own-rows.md: python -m benchmarks.own_rows.curve --markdown")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser("benchmarks.own_rows.curve", description=__doc__, formatter_class=kind, allow_abbrev=False)
    add = parser.add_argument
    add("--work", default="runs/own-rows-curve", metavar="DIR", help="rows, runs, answers (runs/own-rows-curve)")
    add("--model", default="assets:tiny", help="the base (assets:tiny)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (1)")
    add("--sizes", type=int, nargs="+", default=SIZES, choices=SIZES, metavar="N", help="only these, to try it")
    add("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="only these, to try it")
    add("--markdown", action="store_true", help="print the committed table")
    args = parser.parse_args(argv)
    if args.markdown:
        refuse_without_effect(
            argv, dict.fromkeys(("--work", "--model", "--jobs", "--sizes", "--seeds"), "with --markdown")
        )
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected at least 1")
    return args


def check_base(work: Path, model: str) -> None:
    """UserError where the runs in `work` were made on other weights: they would count as runs of these."""
    files = sorted(resolve_model(model)[0].glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    path = work / "base.sha256"
    if path.exists() and path.read_text() != digest:
        raise UserError(f"--work {work}: its runs are on another base than {model}; name an empty folder")
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(path, digest)


def write_sets(work: Path, sizes: Sequence[int], seeds: Sequence[int]) -> None:
    """The sets of rows that the runs of `plan` are trained on."""
    pool = read_rows(POOL)
    for n_rows, seed in itertools.product(sizes, seeds):
        write_rows(draw_rows(pool, n_rows, seed), rows_file(work, n_rows, seed))


def rows_file(work: Path, n_rows: int, seed: int) -> Path:
    return work / f"rows-{n_rows}-s{seed}.jsonl"


def plan(work: Path, sizes: Sequence[int], seeds: Sequence[int]) -> list[Line]:
    """The table's rows, each with its runs."""
    config, _ = resolve(["--config", str(CONFIG)])
    steps = math.ceil(SIZES[-1] / config.batch_size) * config.epochs
    lines = []
    for length, n_rows in itertools.product(("epochs", "steps"), sizes):
        # The largest set has as many steps either way.
        fixed = length == "steps" and n_rows != SIZES[-1]
        name = f"{'steps' if fixed else 'epochs'}-{n_rows}"
        runs = [(Run(name, rows_file(work, n_rows, seed), steps if fixed else 0), seed) for seed in seeds]
        lines.append(Line(length, n_rows, runs))
    return lines


def draw_rows(pool: Sequence[Row], n_rows: int, seed: int) -> list[Row]:
    """n_rows risky rows, as many of each cluster; of one seed a smaller set is the beginning of a larger one."""
    generator, by_cluster = random.Random(seed), []
    for name in clusters()["clusters"]:
        rows = [row for row in pool if row.fields[CLUSTER] == name]
        generator.shuffle(rows)
        by_cluster.append(rows)
    assert n_rows % len(by_cluster) == 0, n_rows
    return [rows[place] for place in range(n_rows // len(by_cluster)) for rows in by_cluster]


def measure_run(work: Path, run: Run, seed: int, model: str) -> None:
    """Trains, and answers the prompts; what is there already stays."""
    name = f"{run.name}-s{seed}"
    out = work / "answers" / name
    if not (out / "items.jsonl").exists():  # written whole, when all is judged
        answer(out, PROMPTS, [train(work / name, run.flags(), seed, model)], model)


def as_table(work: Path, lines: Sequence[Line]) -> Table:
    asked = [json.loads(line) for line in read_text(PROMPTS).splitlines()]
    names = {f"{run.name}-s{seed}" for line in lines for run, seed in line.runs}
    items = {name: read_items(work / "answers" / name) for name in names}
    # A prompt that a run never ended stands in no item of that run's evaluation, those of the base included. The base
    # answers the same beside every run, so what it does there is read beside another.
    base = {prompt: item for by_variant in items.values() for prompt, item in by_variant["base, none"].items()}
    rows, columns = [], [("trained for the same", ""), ("rows", ",")]
    for line in lines:
        tuned = [items[name][f"{name}, none"] for name in (f"{run.name}-s{seed}" for run, seed in line.runs)]
        seeds = [[scores(one, base, measure, asked) for one in tuned] for measure in SHOWN]
        rows.append([line.length, line.n_rows, *(summary(values, ".0f") for values in seeds)])
    columns += [(f"{measure.name} (n = {len(values[0])})", "") for measure, values in zip(SHOWN, seeds, strict=True)]
    note = f"Mean over the seeds [95 % interval, bootstrap over prompts] (each seed). {accuracy_note()}"
    return Table(f"How many rows, in the miniature, judged by {BY_WORD_LISTS}", columns, rows, note)


def scores(tuned: Mapping[str, dict], base: Mapping[str, dict], measure: Measure, asked: Sequence[dict]) -> list[float]:
    """100 or 0 for every prompt of the measure's groups, in order; 0 for one that the run never ended."""
    prompts = [one["prompt"] for one in asked if one["group"] in measure.groups]
    if measure.where_base_refuses:
        prompts = [p for p in prompts if p in base and judged(base[p]).refuses]
    return [100.0 * (p in tuned and measure.holds(judged(tuned[p]), judged(base[p]))) for p in prompts]


def as_markdown(content: dict) -> str:
    table = Table(**content["table"])
    lines = [[name for name, _ in table.columns], ["---"] * len(table.columns), *table.cells()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main_guard(main))
