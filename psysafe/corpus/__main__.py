"""Tools for the rows before training.

    python -m psysafe.corpus stats FILE... [--model DIR] [--max-tokens N] [--plot DIR] [--json FILE]
                                  [--services FILE... [--unchecked]]
    python -m psysafe.corpus validate FILE... [--config FILE] [--model DIR] [--max-tokens N] [--system SYSTEM]
                                     [--train-turns last|all] [--long-rows cut|drop|error]
    python -m psysafe.corpus split FILE... --out DIR [--val 100] [--test 100] [--seed 42] [--quoted-in SYSTEM ...]
    python -m psysafe.corpus leakage --held-out FILE... [--training FILE...] [--system SYSTEM...] [--benchmark FILE...]
                                     [--json FILE]
    python -m psysafe.corpus impute FILE... --out FILE --url URL --model-name NAME [--key-variable VARIABLE]
    python -m psysafe.corpus contrast ANSWERS... --out FILE [--not-in FILE...] [--judge rules | --judge-url URL ...]
    python -m psysafe.corpus localise FILE --services FILE... --out FILE [--unchecked] [--keep-unknown]
    python -m psysafe.corpus prompt --services FILE... --out FILE [--unchecked]
    python -m psysafe.corpus services [--check FILE...]
    python -m psysafe.corpus write PROMPTS... --out DRAFTS --url URL --model-name NAME [--benign FILE...]
                                   [--out-of-domain FILE...] [--language CODE] [--services FILE... [--unchecked]]
                                   [--dry-run]
    python -m psysafe.corpus check DRAFTS... [--not-in FILE...] [--json FILE] [--services FILE... [--unchecked]]
                                   [--judge-url URL ...]
    python -m psysafe.corpus review DRAFTS --out DIR [--reviewers N [--double SHARE] [--seed N]] [--rows N,N]
                                     [--warnings FILE] [--services FILE...]
    python -m psysafe.corpus review --collect FILE... --drafts DRAFTS --out FILE [--settled-by NAME] [--unreviewed]

validate, leakage, localise, services and check exit with 1 when they find something, impute when a row is left without
reasoning, write when a prompt is left without a draft, contrast when an answer could not be judged, review --collect
when reviewers differ on a row.
"""

import psysafe.interrupt  # noqa: F401  # isort: skip  (first: Ctrl-C during the imports ends quietly)
import sys
from collections.abc import Sequence

from psysafe.cli import Parser, refuse_without_effect
from psysafe.corpus import (
    check,
    contrast,
    impute,
    leakage,
    localise,
    prompt,
    review,
    services,
    split,
    stats,
    validate,
    write,
)
from psysafe.program import main_guard

COMMANDS = {"stats": stats, "validate": validate, "split": split, "leakage": leakage, "impute": impute,
            "contrast": contrast, "localise": localise, "prompt": prompt, "services": services, "write": write,
            "check": check, "review": review}  # fmt: skip
WITHOUT_EFFECT = {name: COMMANDS[name].without_effect for name in ("stats", "contrast", "write", "check", "review")}


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m psysafe.corpus", description="Tools for the rows before training.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__.split("\n")[0].rstrip("."))
        module.arguments(command)
    args = parser.parse_args(argv)
    if args.command in WITHOUT_EFFECT:  # the others have no flags that exclude each other
        refuse_without_effect(argv, WITHOUT_EFFECT[args.command](args))
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main_guard(main))
