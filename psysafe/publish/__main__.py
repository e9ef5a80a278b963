"""Publishes a run on the Hugging Face hub: the adapter, its card, and what else is asked for.

    python -m psysafe.publish runs/tiny --repo YOUR-NAME/psysafe-tiny --dry-run
    python -m psysafe.publish runs/psysafe --repo YOUR-NAME/psysafe-27b --results runs/judged runs/xstest runs/mmlu

The repository is private unless --public is given. --dry-run shows the files and the card, and sends nothing; of the
hub it only asks which files are there. The token is that of `hf auth login`, or HF_TOKEN.
"""

import psysafe.interrupt  # noqa: F401  # isort: skip  (first: Ctrl-C during the imports ends quietly)
import argparse
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from psysafe import services
from psysafe.checkpoint.peft_format import WEIGHTS
from psysafe.cli import Parser, refuse_ranks, refuse_without_effect, say
from psysafe.evaluation.result import Result, load
from psysafe.files import write_atomic
from psysafe.printable import plain
from psysafe.program import UserError, main_guard
from psysafe.publish import contents, figures, metadata, scrub
from psysafe.publish.card import Content, card, is_as_written
from psysafe.publish.contents import CARD, EXTRAS, Upload
from psysafe.publish.loading import Names
from psysafe.publish.push import KEEP, REPLACE, Push, check_repository
from psysafe.publish.run import Run, base_of, read_run


def arguments() -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m psysafe.publish", description=__doc__, formatter_class=kind, allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory of train.py")
    add("--repo", required=True, metavar="OWNER/NAME", help="repository on the hub; made where there is none")
    add("--results", nargs="+", action="extend", default=[], metavar="DIR", help="--out folders of eval.py")
    add("--base-model", default="", metavar="HUB_ID", help="the base's name on the hub (the one that the run names)")
    add("--merged", default="", metavar="DIR", help="a merged checkpoint to publish, too")
    add("--gguf", default="", metavar="FILE", help="a GGUF file to publish, too: llama.cpp's adapter, or a whole model")
    add("--license", default="apache-2.0", metavar="ID", help="the hub's name of the license (apache-2.0)")
    add("--include", nargs="+", action="extend", default=[], choices=EXTRAS,
        help="files that are otherwise left out: the results' tables as JSON, metrics.jsonl")  # fmt: skip
    add("--edited-card", default="", choices=(KEEP, REPLACE),
        help="what becomes of a card that was edited on the hub (without it the push is refused)")  # fmt: skip
    services.add_arguments(parser, "helplines on the card")
    add("--public", action="store_true", help="make the repository public, once everything is there")
    add("--dry-run", action="store_true", help="show files, card and what is on the hub; nothing is sent or written")
    return parser


def main(argv: Sequence[str]) -> int:
    args = arguments().parse_args(argv)
    refuse_ranks("psysafe.publish")
    check_repository(args.repo)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise UserError(f"--license {args.license}: expected the hub's name of one, such as apache-2.0")
    refuse_without_effect(argv, services.without_effect(args))
    run = read_run(args.run)
    uploads = prepare(args, run)
    visibility = "public" if args.public else "private"
    print(f"{args.repo}, {visibility}:")
    for upload in uploads:
        print(f"  {upload.path:<36}{upload.size:>16,} bytes  {upload.origin}")
    push = Push(args.repo, args.public, args.edited_card)
    if args.dry_run:
        print(f"\n{CARD}:\n\n{plain(uploads[0].content.decode())}", end="", flush=True)
        push.preview(uploads)
        say("dry run: nothing was sent or written")
        return 0
    address = push.run(uploads)
    print(f"published: {address}", flush=True)
    write_card(run, uploads[0])
    return 0


def prepare(args: argparse.Namespace, run: Run) -> list[Upload]:
    """Everything that is to be uploaded, the card first. UserError before anything is sent."""
    helplines = services.from_arguments(args) or services.bundled()
    base = base_of(run, args.base_model)
    results = [load(folder) for folder in args.results]
    warn_of_older_results(run, results)
    warn_of_other_models(run, results)
    scores = figures.scores(results, run.name)
    gguf = [contents.gguf_file(args.gguf)] if args.gguf else []
    model_gguf = args.gguf if args.gguf and not contents.is_gguf_adapter(args.gguf) else ""
    weights = contents.adapter_files(run, base, contents.adapter_prefix(args.merged, model_gguf))
    weights += [*(contents.merged_files(args.merged) if args.merged else []), *gguf]
    others = [*metadata.eval_results(scores), *contents.extra_files(run, results, args.include)]
    name_of_gguf = Path(args.gguf).name if args.gguf else ""
    names = Names(args.repo, base, bool(args.merged), name_of_gguf, bool(model_gguf), run.layout)
    data = metadata.card_data(run, base, args.repo, args.license, scores, args.merged, model_gguf)
    files = [*weights, *others]
    text = card(Content(run, names, data, results, [CARD, *(upload.path for upload in files)], helplines))
    uploads = [Upload(CARD, text.encode(), "written here"), *files]
    scrub.check((upload.path, upload.content) for upload in uploads)
    return uploads


def warn_of_older_results(run: Run, results: Sequence[tuple[Result, dict]]) -> None:
    """Results know an adapter by its folder's name alone, in which another run may have stood."""
    trained = (run.folder / WEIGHTS).stat().st_mtime
    for result, rest in results:
        try:
            finished = datetime.strptime(rest["finished"], "%Y-%m-%d %H:%M:%S").timestamp()
        except ValueError:
            raise UserError(
                f"{result.title}: finished {rest['finished']!r:.40}, which is no date; run it again"
            ) from None
        if finished < int(trained):  # the result has whole seconds
            say(f"warning: {result.title}: older than the adapter in {run.name}; is it of an earlier run?")


def warn_of_other_models(run: Run, results: Sequence[tuple[Result, dict]]) -> None:
    for result, _ in results:
        if not figures.is_about(result, run.name):
            say(f"warning: {result.title}: none of its variants is called {run.name}; is it of another model?")


def write_card(run: Run, upload: Upload) -> None:
    """Leaves the card in the run directory, too, unless another README.md is there."""
    path = run.folder / CARD
    if path.exists() and not is_as_written(path.read_text(encoding="utf-8", errors="replace")):
        say(f"{run.name}/{CARD} is not a card of this command, and stays as it is")
        return
    write_atomic(path, upload.content)


if __name__ == "__main__":
    sys.exit(main_guard(main))
