"""Measures what fine-tuning did: benchmarks in, tables out.

    python eval.py                                     # the paper's table in miniature, after torchrun train.py
    python eval.py --services my-country.toml          # the same, if it was trained on the rows of another country
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

from psysafe import services
from psysafe.cli import Parser, out_folder, refuse_ranks, refuse_without_effect, say
from psysafe.evaluation import rating, report
from psysafe.evaluation.benchmark import Evaluation
from psysafe.evaluation.benchmarks import agreement, four_criteria, hellaswag, miniature, mmlu, sorry_bench, xstest
from psysafe.evaluation.benchmarks.selective import Selective
from psysafe.evaluation.benchmarks.turns import Turns
from psysafe.evaluation.models_under_test import ShareAnswered
from psysafe.evaluation.result import check_folder
from psysafe.program import UserError, main_guard

EVALUATIONS: list[Evaluation] = [four_criteria.FourCriteria(), agreement.Agreement(), Selective(), Turns(),
                                 xstest.XSTest(), sorry_bench.SorryBench(), mmlu.MMLU(),
                                 hellaswag.HellaSwag()]  # fmt: skip

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
        refuse_without_effect(argv, services.without_effect(args))
        print(miniature.run(given=services.from_arguments(args)).as_text())
        return 0
    evaluation = next((evaluation for evaluation in EVALUATIONS if evaluation.name == args.command), None)
    if not (evaluation and evaluation.answers_on_ranks(args)):
        refuse_ranks(f"this eval.py {args.command}")
    refuse_without_effect(argv, (evaluation or PAGES[args.command]).without_effect(args))
    services.refuse_in_folder(getattr(args, "services", []), args.out)
    if evaluation is None:
        PAGES[args.command].run(args)
        return 0
    check_folder(args.out, evaluation.name)  # before the models: hours later another evaluation's result would go
    result = evaluation.run(args)
    path = result.save(args.out)
    print(result.as_text())
    say(f"saved in {path.parent}; one page of it: python eval.py report {path.parent} --out DIR")
    if result.unscored:
        say(f"error: nothing was measured: {result.unscored}")
    return 1 if result.failed or result.unscored else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    names = {*PAGES, *(evaluation.name for evaluation in EVALUATIONS)}
    before = argv[0].partition("=")[0] if argv else ""
    if before in services.FLAGS and (later := [word for word in argv if word in names]):
        # argparse would read the command as a file of helplines, or let the command's own default win.
        raise UserError(f"{before} stands before {later[0]}; expected the command first: eval.py {later[0]} {before}")
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=110)
    look = {"allow_abbrev": False, "formatter_class": formatter}
    parser = Parser(prog="eval.py", description=__doc__, **look)
    services.add_arguments(parser, "without a command: the helplines that count")
    commands = parser.add_subparsers(dest="command", parser_class=Parser, metavar="COMMAND")
    for evaluation in EVALUATIONS:
        command = commands.add_parser(evaluation.name, help=evaluation.help, description=evaluation.description, **look)
        evaluation.arguments(command)
        about = "folder of results; a killed run goes on"
        command.add_argument("--out", type=out_folder, required=True, metavar="DIR", help=about)
    for name, module in PAGES.items():
        module.arguments(commands.add_parser(name, help=PAGES_HELP[name], description=module.__doc__, **look))
    return parser


if __name__ == "__main__":
    sys.exit(main_guard(main))
