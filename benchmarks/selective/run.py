"""The selective recipe in the miniature: contrast rows, a choice on dev.jsonl, three seeds on prompts never seen.

    python -m benchmarks.selective.run rows --work runs/selective      the base's answers and the contrast rows
    python -m benchmarks.selective.run choose --work runs/selective    every recipe of GRID with one seed, on dev.jsonl
    python -m benchmarks.selective.run final --work runs/selective --recipe NAME --prompts unseen_1.jsonl

Each stage runs the project's own commands, keeps what is there, and may be killed and started again. `choose` makes a
table of all recipes; a person chooses. `final` answers its prompts with three seeds of the chosen recipe, of the
paper's, and of the same rows without contrast; a set is answered once (README.md). Both write their tables to
benchmarks/results/.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.selective.experiment import (
    HERE,
    MAX_NEW_TOKENS,
    MEASURES,
    ROOT,
    SEEDS,
    answer,
    judged,
    read_items,
    run,
    summary,
    train,
)
from psysafe.cli import Parser, refuse_without_effect
from psysafe.evaluation.benchmarks.selective_tables import OUTSIDE, Judged
from psysafe.evaluation.result import Table
from psysafe.evaluation.rules_accuracy import accuracy_note
from psysafe.evaluation.word_list_judge import BY_WORD_LISTS
from psysafe.files import clusters, write_atomic
from psysafe.program import UserError, main_guard
from psysafe.runtime import versions

PROMPTS = "assets:contrast_prompts.jsonl"


class Recipe(NamedTuple):
    """What differs from configs/tiny.toml: the rows, and how many contrast rows stand beside each of them."""

    name: str
    ratio: float = 0.0
    wide: bool = True  # with the rows in other words (assets:rows/wide.jsonl), which one pass is enough for
    kl: float = 0.0

    def flags(self, contrast: Path) -> list[str]:
        rows = ["--data", "assets:rows/train.jsonl", *(["assets:rows/wide.jsonl"] if self.wide else [])]
        rows += ["--val-data", "assets:rows/val.jsonl"]
        schedule = ["--epochs", "1", "--lr", "2e-3"] if self.wide else ["--epochs", "4", "--lr", "1e-3"]
        more = ["--contrast-ratio", f"{self.ratio:g}", *(["--contrast-data", str(contrast)] if self.ratio else [])]
        return [*rows, *schedule, *more, *(["--kl-weight", f"{self.kl:g}"] if self.kl else [])]


PAPER = Recipe("paper", wide=False)
WIDE = Recipe("r0")  # the same rows as ours, without contrast: what the contrast rows alone do
GRID = [PAPER, WIDE, *(Recipe(f"r{ratio:g}", ratio) for ratio in (0.25, 0.5, 1.0, 2.0)),
        *(Recipe(f"r{ratio:g}-kl1", ratio, kl=1.0) for ratio in (1.0, 1.5, 2.0))]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    work = Path(args.work)
    if args.stage == "rows":
        make_rows(work, args.model)
        return 0
    recipes = {recipe.name: recipe for recipe in GRID}
    wanted = list(dict.fromkeys(args.recipe or recipes))
    if unknown := [name for name in wanted if name not in recipes]:
        raise UserError(f"--recipe {unknown[0]}: no such recipe; expected one of {', '.join(recipes)}")
    if args.stage == "choose":
        seeds, chosen, prompts = SEEDS[:1], [recipes[name] for name in wanted], HERE / "dev.jsonl"
    else:
        others = [recipes[name] for name in wanted if name not in (PAPER.name, WIDE.name)]
        seeds, chosen, prompts = SEEDS, [PAPER, WIDE, *others], HERE / args.prompts
    runs = train_all(work, chosen, seeds, args)
    items = evaluate(work / prompts.stem, prompts, runs, args)
    tables = [compare(items, runs), by_reading(items, readings(work / prompts.stem / chosen[0].name), runs)]
    print("\n\n".join(table.as_text() for table in tables))
    content = {"prompts": prompts.name, "model": args.model, "seeds": seeds, "versions": versions()}
    content["tables"] = [asdict(table) for table in tables]
    out = args.out or ROOT / "benchmarks" / "results" / f"selective-{prompts.stem}.json"
    write_atomic(out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser("benchmarks.selective.run", description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("stage", choices=["rows", "choose", "final"])
    parser.add_argument("--work", default="runs/selective", metavar="DIR", help="rows, runs, answers (runs/selective)")
    parser.add_argument("--model", default="assets:tiny", help="the base (assets:tiny)")
    parser.add_argument("--recipe", action="append", metavar="NAME", help="of GRID; as often as needed")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs and evaluations at once (1)")
    parser.add_argument("--prompts", metavar="FILE", help="of final: a set in this folder that nothing was chosen on")
    about = "where the tables go (benchmarks/results/selective-PROMPTS.json)"
    parser.add_argument("--out", metavar="FILE", help=about)
    args = parser.parse_args(argv)
    unused = {"rows": ("--recipe", "--jobs", "--prompts", "--out"), "choose": ("--prompts",), "final": ()}[args.stage]
    refuse_without_effect(argv, dict.fromkeys(unused, f"on the stage {args.stage}"))
    if args.stage == "final" and not (args.recipe and args.prompts):
        parser.error("final needs --recipe NAME and --prompts FILE")
    # Before any training: a set is answered once, and nothing may have been chosen on it.
    if args.stage == "final" and (args.prompts == "dev.jsonl" or not (HERE / args.prompts).is_file()):
        sets = ", ".join(sorted(path.name for path in HERE.glob("unseen_*.jsonl")))
        raise UserError(f"--prompts {args.prompts}: expected a held-out set of {HERE.name}/: {sets}")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected at least 1")
    return args


def make_rows(work: Path, model: str) -> None:
    """work/contrast.jsonl: what the base itself answers to the bundled contrast prompts, sifted by the word lists."""
    work.mkdir(parents=True, exist_ok=True)
    answers, sets = work / "base.jsonl", sorted(HERE.glob("*.jsonl"))
    prompts = ["--prompts", PROMPTS, "--out", answers, "--max-new-tokens", MAX_NEW_TOKENS, "--batch-size", "32"]
    run("generate.py", "--model", model, "--adapter", "base", *prompts)
    evaluated = [*sets, "assets:rows/val.jsonl"]
    words = ["--out", str(work / "contrast.jsonl"), "--judge", "rules", "--not-in", *map(str, evaluated)]
    subprocess.run([sys.executable, "-m", "psysafe.corpus", "contrast", str(answers), *words], cwd=ROOT, check=True)


def train_all(
    work: Path, recipes: Sequence[Recipe], seeds: Sequence[int], args: argparse.Namespace
) -> dict[str, list[Path]]:
    """Recipe -> the run's folder of each seed; --jobs of them at a time."""
    pairs = [(recipe, seed) for recipe in recipes for seed in seeds]

    def trained(pair: tuple[Recipe, int]) -> Path:
        recipe, seed = pair
        return train(work / f"{recipe.name}-s{seed}", recipe.flags(work / "contrast.jsonl"), seed, args.model)

    with ThreadPoolExecutor(args.jobs) as executor:
        folders = list(executor.map(trained, pairs))
    return {r.name: [f for f, (other, _) in zip(folders, pairs, strict=True) if other == r] for r in recipes}


def evaluate(
    out: Path, prompts: Path, runs: Mapping[str, Sequence[Path]], args: argparse.Namespace
) -> dict[str, dict[str, dict]]:
    """variant -> prompt -> what eval.py selective says of the answer; prompts that an evaluation left out are gone.

    Each recipe is an evaluation of its own, --jobs of them at a time.
    """

    def answers(name: str) -> dict[str, dict[str, dict]]:
        answer(out / name, prompts, runs[name], args.model)
        return read_items(out / name)

    with ThreadPoolExecutor(args.jobs) as executor:
        items = {name: item for by_variant in executor.map(answers, runs) for name, item in by_variant.items()}
    everywhere = set.intersection(*(set(by_prompt) for by_prompt in items.values()))
    return {name: {p: x for p, x in by_prompt.items() if p in everywhere} for name, by_prompt in items.items()}


def compare(items: Mapping[str, Mapping[str, dict]], runs: Mapping[str, Sequence[Path]]) -> Table:
    """A row a measure; of every recipe the mean over its seeds, its interval over prompts, and each seed."""
    base = items["base, none"]
    rows = []
    for measure in MEASURES:
        prompts = [p for p, item in base.items() if item["group"] in measure.groups]
        prompts = [p for p in prompts if not measure.where_base_refuses or judged(base[p]).refuses]
        of_base = [measure.holds(judged(base[p]), judged(base[p])) for p in prompts]
        alone = measure.holds not in (Judged.keeps, Judged.adds_template, Judged.repeats)
        row = [measure.name, measure.goal, len(prompts), f"{100 * sum(of_base) / len(prompts):.1f}" if alone else "–"]
        for folders in runs.values():
            seeds = [[measure.holds(judged(of[p]), judged(base[p])) for p in prompts] for of in of_runs(items, folders)]
            row.append(summary([[100 * flag for flag in flags] for flags in seeds], ".1f"))
        rows.append(row)
    prompts = [p for p, item in base.items() if item["group"] in OUTSIDE]
    row = ["KL to the base", "<= 0.06", len(prompts), "–"]
    rows.append([*row, *(summary([[of[p]["kl"] for p in prompts] for of in of_runs(items, folders)], ".3f")
                         for folders in runs.values())])  # fmt: skip
    columns = [("measure", ""), ("goal", ""), ("n", ","), ("base", ""), *((name, "") for name in runs)]
    note = f"Mean over the seeds [95 % interval, bootstrap over prompts] (each seed). {accuracy_note()}"
    return Table(f"Selective support, judged by {BY_WORD_LISTS}", columns, rows, note)


def readings(folder: Path) -> dict[str, str]:
    """What the base takes each prompt for, by its own reasoning ("This is about guns. I will refuse."): prompt -> the
    cluster, "another class" outside the clusters, or "answered"."""
    cluster_of = {c: name for name, entry in clusters()["clusters"].items() for c in entry["risk_categories"]}
    by_prompt = {}
    for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["variant"] == "base, none":
            topic = re.match(r"This is about (.+?)\. I will refuse", row["reasoning"])
            by_prompt[row["prompt"]] = cluster_of.get(topic[1], "another class") if topic else "answered"
    return by_prompt


def by_reading(
    items: Mapping[str, Mapping[str, dict]], read_as: Mapping[str, str], runs: Mapping[str, Sequence[Path]]
) -> Table:
    """Risky prompts with all four parts, by what the base takes the prompt for."""
    risky = {p: item for p, item in items["base, none"].items() if item["group"] == "risky"}
    groups = {
        "its own cluster": [p for p in risky if read_as[p] == risky[p]["cluster"]],
        "another cluster": [p for p in risky if read_as[p] not in (risky[p]["cluster"], "another class", "answered")],
        "a class outside the clusters": [p for p in risky if read_as[p] == "another class"],
        "a harmless question": [p for p in risky if read_as[p] == "answered"],
    }
    rows = []
    for name, prompts in groups.items():
        if prompts:
            seeds = [[[100 * judged(of[p]).parts.all for p in prompts] for of in of_runs(items, folders)]
                     for folders in runs.values()]  # fmt: skip
            rows.append([name, len(prompts), *(summary(values, ".1f") for values in seeds)])
    columns = [("the base takes it for", ""), ("n", ","), *((name, "") for name in runs)]
    return Table("Four parts with own helplines % of risky prompts, by what the base takes them for", columns, rows)


def of_runs(items: Mapping[str, Mapping[str, dict]], folders: Sequence[Path]) -> list[Mapping[str, dict]]:
    return [items[f"{folder.name}, none"] for folder in folders]


if __name__ == "__main__":
    sys.exit(main_guard(main))
