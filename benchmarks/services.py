"""Rows of another country in miniature: does the adapter name that country's services? On a CPU, in minutes.

    python benchmarks/services.py --services AU --unchecked --out runs/services-AU

Localises the bundled training rows, trains the bundled model on them as train.py does, and lets the base, the bundled
run if there is one (--bundled DIR) and the new adapter answer the risky validation prompts, greedily.
"""

import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psysafe import load_model, load_tokenizer  # noqa: E402
from psysafe.cli import Parser, out_folder, say  # noqa: E402
from psysafe.corpus import __main__ as corpus  # noqa: E402
from psysafe.data.rows import CLUSTER, Row, read_rows  # noqa: E402
from psysafe.evaluation import word_list_judge  # noqa: E402
from psysafe.evaluation.result import Table, percent  # noqa: E402
from psysafe.files import BUNDLED_MODEL, clusters, write_atomic  # noqa: E402
from psysafe.generation.generator import Generator  # noqa: E402
from psysafe.generation.request import Options  # noqa: E402
from psysafe.program import UserError, main_guard  # noqa: E402
from psysafe.services import bundled, read_services  # noqa: E402

MAX_NEW_TOKENS = 256  # twice the longest bundled answer


def parser() -> ArgumentParser:
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--services", nargs="+", required=True, metavar="FILE", help="countries of the project, or files"
    )
    parser.add_argument("--unchecked", action="store_true", help="also take services that nobody has checked")
    parser.add_argument("--bundled", default="", metavar="DIR", help="an adapter of the bundled rows, to compare with")
    parser.add_argument(
        "--out",
        type=out_folder,
        required=True,
        metavar="DIR",
        help="rows, run and table; what is there already is kept",
    )
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="of the new adapter (4)")
    return parser


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    out = Path(args.out)
    rows, adapter = out / "train.jsonl", out / "run"
    unchecked = ["--unchecked"] if args.unchecked else []
    corpus.main(["localise", "assets:rows/train.jsonl", "--services", *args.services, "--out", str(rows), *unchecked])
    if not (adapter / "adapter_config.json").exists():
        command = [sys.executable, "train.py", "--data", rows.resolve(), "--out", adapter.resolve()]
        if subprocess.run([*command, "--epochs", str(args.epochs)], cwd=ROOT).returncode:
            raise UserError("the training run failed; its message stands above")
    risky = [row for row in read_rows("assets:rows/val.jsonl") if row.fields[CLUSTER] in clusters()["clusters"]]
    adapters = {"base": None, "bundled rows": args.bundled, "rows of " + " ".join(args.services): str(adapter)}
    columns = [("model", ""), ("n", ","), ("services of US and UK %", ".1f"), ("services given %", ".1f")]
    given = read_services(args.services)
    lines = []
    for name, folder in adapters.items():
        if folder != "":
            answers = answers_of(risky, folder)
            shares = [
                percent(
                    word_list_judge.judge(row.fields["prompt"], answer, row.fields[CLUSTER], services).parts.services
                    for row, answer in zip(risky, answers, strict=True)
                )
                for services in (bundled(), given)
            ]
            lines.append([name, len(risky), *shares])
    table = Table("Answers to risky prompts that name their cluster's services", columns, lines)
    print(table.as_text())
    write_atomic(out / "table.txt", table.as_text() + "\n")
    say(f"saved in {out}")
    return 0


def answers_of(rows: list[Row], adapter: str | None) -> list[str]:
    """The greedy answers to the rows' prompts; reasoning without end counts as an empty one."""
    model, tokenizer = load_model(BUNDLED_MODEL, adapter), load_tokenizer(BUNDLED_MODEL)
    questions = [[{"role": "user", "content": row.fields["prompt"]}] for row in rows]
    answers = Generator(model, tokenizer, Options(max_new_tokens=MAX_NEW_TOKENS)).answers(questions)
    return [answer.answer for answer in sorted(answers, key=lambda answer: answer.row)]


if __name__ == "__main__":
    sys.exit(main_guard(main))
