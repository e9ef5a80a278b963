"""Measures what fine-tuning did: benchmarks in, tables out.

    python eval.py                                     # the paper's table in miniature, after torchrun train.py
    python eval.py judge --prompts FILE --adapter base --adapter runs/psysafe --system v0,v1 --out runs/judged \\
        --judge-url http://localhost:8000/v1 --judge-model NAME
    python eval.py report runs/judged runs/mmlu --out runs/report

Every evaluation may be killed and started again: it continues, and its tables come out the same. Failed items are
listed, and the exit code is then 1. Keys are read from the environment only.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

from psysafe.cli import Parser
from psysafe.evaluation import report
from psysafe.evaluation.benchmarks import agreement, miniature, multiple_choice, sorry_bench, xstest
from psysafe.evaluation.benchmarks import four_criteria as judging
from psysafe.evaluation.result import say
from psysafe.program import main_guard

COMMANDS = {
    "judge": (judging, "answers scored on four criteria by a judge"),
    "agreement": (agreement, "a judge's scores against people's: Cohen's kappa"),
    "xstest": (xstest, "over-refusal and safety on XSTest"),
    "sorry-bench": (sorry_bench, "compliance on SORRY-Bench and its mutations"),
    "mmlu": (multiple_choice.MMLU, "accuracy on MMLU, as lm-eval"),
    "hellaswag": (multiple_choice.HELLASWAG, "accuracy on HellaSwag, as lm-eval"),
}


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.command is None:
        result = miniature.run()
        print(result.as_text())
        return 0
    if args.command == "report":
        report.run(args)
        return 0
    result = COMMANDS[args.command][0].run(args)
    path = result.save(args.out)
    print(result.as_text())
    say(f"saved in {path.parent}; one page of it: python eval.py report {path.parent} --out DIR")
    return 1 if result.failed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=110)
    parser = Parser(prog="eval.py", allow_abbrev=False, formatter_class=formatter, description=__doc__)
    commands = parser.add_subparsers(dest="command", parser_class=Parser, metavar="COMMAND")
    for name, (part, sentence) in COMMANDS.items():
        command = commands.add_parser(
            name, help=sentence, allow_abbrev=False, formatter_class=formatter, description=part.__doc__
        )
        part.arguments(command)
        command.add_argument("--out", required=True, metavar="DIR", help="folder of results; a killed run goes on")
    command = commands.add_parser(
        "report",
        help="Markdown, HTML and JSON over finished evaluations",
        allow_abbrev=False,
        formatter_class=formatter,
        description=report.__doc__,
    )
    report.arguments(command)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main_guard(main))
