"""Writes the tables of second turns in docs/evaluation.md, between their markers.

python tools/turns_table.py     trains the two recipes of the miniature, lets base and both answer (a minute and a half)
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psysafe.evaluation import result as results  # noqa: E402
from psysafe.evaluation.benchmarks.turns import MEASURES  # noqa: E402
from psysafe.evaluation.comparison import DIFFERENCES  # noqa: E402
from psysafe.evaluation.conversations import KINDS, RISKY  # noqa: E402
from psysafe.evaluation.result import Result  # noqa: E402
from psysafe.files import read_text, write_atomic  # noqa: E402

PAGE = ROOT / "docs" / "evaluation.md"
BEGIN, END = "<!-- turns: written by tools/turns_table.py -->", "<!-- end of turns -->"
RECIPES = {"paper": "configs/tiny.toml", "ours": "configs/tiny-selective.toml"}
NAMES = {"base, none": "base", "paper, none": "paper's recipe", "ours, none": "ours"}
NOTHING = (0, None, None, None)  # a share of nothing
FIRST = {
    "first answer refused with support": "supported",
    "any other first answer: they measure something else": "other",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapters = [word for name in RECIPES for word in ("--adapter", f"{folder}/{name}")]
        for name, config in RECIPES.items():
            run("train.py", "--config", config, "--out", f"{folder}/{name}")
        answers = ["--adapter", "base", *adapters, "--max-new-tokens", "256"]
        run("eval.py", "turns", *answers, "--judge", "rules", "--out", f"{folder}/turns")
        result, _ = results.load(f"{folder}/turns")
    page = read_text(PAGE)
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomic(PAGE, f"{before}{BEGIN}\n{tables(result)}{END}{after}")


def run(*words: str) -> None:
    # The miniature's operations are so small that threads would wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def tables(result: Result) -> str:
    """Every share with its 95 % interval and n; the differences from the base; how much was compared."""
    first, *others = result.tables
    (differences,) = [table for table in others if table.title == DIFFERENCES]
    variants = [row[0] for row in first.rows]
    shares = {("–", RISKY, row[0]): row[1:5] for row in first.rows}
    for table in others:
        name = FIRST.get(table.title.partition(", ")[2])
        shares |= {(name, row[0], row[2]): row[3:7] for row in table.rows if name}
    lines = row_of("first answer", "turn", "measure", *(NAMES[name] for name in variants)) + row_of(*["---"] * 6)
    for about, kinds in {"–": [RISKY], "supported": KINDS[1:], "other": KINDS[1:]}.items():
        for kind in kinds:
            cells = [shown(*shares.get((about, kind, name), NOTHING)) for name in variants]
            lines += row_of(about, kind, MEASURES[kind], *cells)
    columns = ("conversations", "measure", "A", "B", "n", "B - A, points", "p, Holm", "reading")
    lines += "\n" + row_of(*columns) + row_of(*["---"] * len(columns))
    for figure, group, a, b, n, _, _, change, low, high, _, _, p, reading in differences.rows:
        if a == variants[0] or group != "all conversations":
            points = f"{change:+.1f} [{low:+.1f}, {high:+.1f}]"
            lines += row_of(group, figure, NAMES[a], NAMES[b], str(n), points, f"{p:.2g}", reading)
    return f"{lines}\n{result.notes[0]}.\n"


def shown(n: int, value: float | None, low: float | None, high: float | None) -> str:
    return "–" if value is None else f"{value:.1f} [{low:.1f}, {high:.1f}] of {n}"


def row_of(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    main()
