"""Measures what fine-tuning did: benchmarks in, tables out.

    python eval.py                                     # the paper's table in miniature, after torchrun train.py
    python eval.py judge --prompts FILE --adapter base --adapter runs/psysafe --system v0,v1 --out runs/judged \\
        --judge-url http://localhost:8000/v1 --judge-model NAME
    torchrun --nproc-per-node 8 eval.py judge ...     # 8 GPUs answer; so with xstest and sorry-bench
    python eval.py rate --answers FILE --out runs/rate                         # a page for people who rate, blind
    python eval.py report runs/judged runs/mmlu --out runs/report

Every evaluation may be killed and started again: it continues, and its tables come out the same. Failed items are
listed, and the exit code is then 1. Keys are read from the environment only.
"""

import psysafe.interrupt  # noqa: F401  # isort: skip  (first: Ctrl-C during the imports ends quietly)
import argparse
import functools
import sys
from collections.abc import Sequence

from psysafe.cli import Parser, refuse_ranks, refuse_without_effect, say
from psysafe.evaluation import rating, report
from psysafe.evaluation.benchmark import Evaluation
from psysafe.evaluation.benchmarks import agreement, four_criteria, hellaswag, miniature, mmlu, sorry_bench, xstest
from psysafe.evaluation.benchmarks.selective import Selective
from psysafe.evaluation.models_under_test import ShareAnswered
from psysafe.evaluation.result import check_folder
from psysafe.program import main_guard

EVALUATIONS: list[Evaluation] = [four_criteria.FourCriteria(), agreement.Agreement(), Selective(), xstest.XSTest(),
                                 sorry_bench.SorryBench(), mmlu.MMLU(), hellaswag.HellaSwag()]  # fmt: skip

PAGES = {"rate": rating, "report": report}  # commands that make a page, and no tables
PAGES_HELP = {"rate": "a page on which people rate answers of two variants, blind",
              "report": "Markdown, HTML and JSON over finished evaluations"}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    try:
        return run(argv)
    except ShareAnswered:
        return 0


def run(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.command is None:
        print(miniature.run().as_text())
        return 0
    evaluation = next((evaluation for evaluation in EVALUATIONS if evaluation.name == args.command), None)
    if not (evaluation and evaluation.answers_on_ranks(args)):
        refuse_ranks(f"this eval.py {args.command}")
    if evaluation is None:
        PAGES[args.command].run(args)
        return 0
    refuse_without_effect(argv, evaluation.without_effect(args))
    check_folder(args.out, evaluation.name)  # before the models: hours later another evaluation's result would go
    result = evaluation.run(args)
    path = result.save(args.out)
    print(result.as_text())
    say(f"saved in {path.parent}; one page of it: python eval.py report {path.parent} --out DIR")
    return 1 if result.failed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=110)
    look = {"allow_abbrev": False, "formatter_class": formatter}
    parser = Parser(prog="eval.py", description=__doc__, **look)
    commands = parser.add_subparsers(dest="command", parser_class=Parser, metavar="COMMAND")
    for evaluation in EVALUATIONS:
        command = commands.add_parser(evaluation.name, help=evaluation.help, description=evaluation.description, **look)
        evaluation.arguments(command)
        command.add_argument("--out", required=True, metavar="DIR", help="folder of results; a killed run goes on")
    for name, module in PAGES.items():
        module.arguments(commands.add_parser(name, help=PAGES_HELP[name], description=module.__doc__, **look))
    return parser


if __name__ == "__main__":
    sys.exit(main_guard(main))
