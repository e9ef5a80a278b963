"""Drafts of rows, read by people: a page to approve, edit or reject each, and the rows that come of it.

    python -m psysafe.corpus review drafts.jsonl --reviewers 2 --double 0.1 --out runs/review
    python -m psysafe.corpus review --collect anna.json ben.json --drafts drafts.jsonl --out rows.jsonl

Without --reviewers there is one page, and everybody who gets it reads every row. With --reviewers N there are N pages:
the rows are dealt out, and a share of them stands on two pages, to see how far two people agree. docs/own-rows.md has
the whole way.
"""

import argparse
import hashlib
import html
import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from psysafe import helplines, services, web_page
from psysafe.cli import out_folder
from psysafe.corpus.check import text_digest
from psysafe.corpus.contacts import hosts_in, numbers_in
from psysafe.corpus.outputs import refuse_inputs
from psysafe.corpus.review_exports import EDITABLE, Draft, collect, read_exports, tidy_name
from psysafe.corpus.review_report import as_markdown, misfit_lines, summary
from psysafe.data.languages import ENGLISH, languages, row_language_or_english
from psysafe.data.rows import BENIGN, CLUSTER, Row, read_rows, read_table, write_rows
from psysafe.evaluation import word_list_judge
from psysafe.evaluation import word_lists as lists
from psysafe.files import ASSETS, clusters, read_text, write_atomic
from psysafe.printable import counted, one_line
from psysafe.program import UserError
from psysafe.services import Services

TITLE = "Reviewing drafts"
NOTICE = "You will read what people in distress write, or people who ask for something harmful, and drafts of answers."
KEYS = "By keyboard: where no text is being typed, a approves, r rejects, e edits the answer."
DOUBLE = 0.1
OF_THE_PAGE = ("--reviewers", "--double", "--seed", "--warnings", "--rows", "--services", "--unchecked")
OF_COLLECT = ("--drafts", "--unreviewed", "--settled-by")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="DRAFTS", help="rows with prompt and answer, for the page")
    parser.add_argument(
        "--reviewers", type=_count, metavar="N", help="deals the rows out to N pages (one page with all)"
    )
    parser.add_argument("--double", type=_share, metavar="SHARE", help=f"of the rows, on two pages ({DOUBLE})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the rows that are dealt out (0)")
    parser.add_argument("--rows", metavar="N,N", help="only these rows, as to settle a disagreement")
    parser.add_argument("--warnings", metavar="FILE", help="what `corpus check DRAFTS --json FILE` wrote")
    services.add_arguments(parser, "helplines on the page")
    parser.add_argument("--collect", nargs="+", metavar="FILE", help="what reviewers exported: makes rows of it")
    parser.add_argument("--drafts", metavar="DRAFTS", help="with --collect: the drafts that were reviewed")
    parser.add_argument("--unreviewed", action="store_true", help="with --collect: lets rows pass that nobody reviewed")
    parser.add_argument(
        "--settled-by", metavar="NAME", help="with --collect: the reviewer who decides where others differ"
    )
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="folder of the pages; with --collect file of the rows"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is no number of reviewers; expected 2 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; expected 0 to 1")
    return share


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    if args.collect:
        return dict.fromkeys(OF_THE_PAGE, "with --collect")
    reasons = dict.fromkeys(OF_COLLECT, "without --collect") | services.without_effect(args)
    if not args.reviewers:
        reasons |= dict.fromkeys(("--double", "--seed"), "without --reviewers: every reviewer reads every row")
    return reasons


def run(args: argparse.Namespace) -> int:
    if args.collect:
        if args.files or not args.drafts:
            raise UserError("--collect: expected --drafts DRAFTS, the one file that was reviewed, and no other files")
        return run_collect(args)
    if len(args.files) != 1:
        raise UserError(f"{counted(len(args.files), 'file')} of drafts; expected one, or --collect FILE ...")
    return run_pages(args)


def run_pages(args: argparse.Namespace) -> int:
    out = Path(args.out)
    try:
        out_folder(args.out)  # not when the command is read: with --collect it is a file
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--out {error}") from None
    given = services.from_arguments(args, every_cluster=False)
    drafts = read_drafts(args.files[0])
    warnings = read_warnings(args.warnings, drafts) if args.warnings else {}
    items = [item(number, draft, warnings.get(number, []), given) for number, draft in enumerate(drafts, 1)]
    if args.rows:
        items = [items[number - 1] for number in _numbers(args.rows, len(items))]
    shares = {"review.html": items}
    if args.reviewers:
        double = DOUBLE if args.double is None else args.double
        dealt = deal(items, args.reviewers, double, random.Random(args.seed))
        shares = {f"review-{number}.html": share for number, share in enumerate(dealt, 1)}
    inputs = {"the drafts": args.files, "--warnings": [args.warnings] if args.warnings else []}
    inputs["--services"] = services.paths(args.services)
    for name in shares:
        refuse_inputs("--out", out / name, inputs)
    out.mkdir(parents=True, exist_ok=True)
    for name, share in shares.items():
        write_atomic(out / name, page(digest(drafts), share, given))
        print(f"{out / name}: {counted(len(share), 'row')}")
    return 0


def run_collect(args: argparse.Namespace) -> int:
    report = Path(args.out).with_suffix(".review.md")
    for out in (args.out, report):
        refuse_inputs("--out", out, {"--collect": args.collect, "--drafts": [args.drafts]})
    drafts = read_drafts(args.drafts)
    texts = [Draft(row.fields, row.reasoning) for row in drafts]
    exports = read_exports(args.collect, digest(drafts), texts)
    result = collect(texts, exports, args.settled_by and tidy_name(args.settled_by), args.unreviewed)
    rows = [Row(result.rows[i], row.file, row.number, row.line) for i, row in enumerate(drafts) if i in result.rows]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if rows:  # a file without rows would be a mistake of every command that reads it
        write_rows(rows, Path(args.out))
    write_atomic(report, as_markdown(result, texts))
    print("\n".join(map(one_line, summary(result))))
    print(f"{args.out}: {counted(len(rows), 'row')}" if rows else f"no row passed, and {args.out} was not written")
    print(report)
    for line in misfit_lines(result, texts):
        print(one_line(line))
    to_settle = sorted(result.disputed.keys() | result.misfits.keys())
    if to_settle:
        numbers = ",".join(str(place + 1) for place in to_settle)
        print(f"to settle: python -m psysafe.corpus review {args.drafts} --rows {numbers} --out DIR")
        print("then --collect that export, too, and name its reviewer with --settled-by NAME")
    return 1 if to_settle or not rows else 0


# What is reviewed


def read_drafts(path: str) -> list[Row]:
    """Training rows with prompt and answer. UserError for a conversation, which has no one answer to edit."""
    rows = read_rows(path)
    for row in rows:
        if row.messages is not None:
            raise UserError(f"{row.where}: a conversation (messages); expected a row with prompt and answer")
        for name in (CLUSTER, "framework_name"):
            if not isinstance(row.fields.get(name), str | None):
                raise UserError(f"{row.where}: {name} is {json.dumps(row.fields[name]):.60}, expected a text")
    return rows


def digest(drafts: Sequence[Row]) -> str:
    """Of all that the drafts hold: what was said of other drafts, or of an earlier version, never counts for these."""
    return hashlib.sha256(json.dumps([row.fields for row in drafts]).encode()).hexdigest()[:16]


def read_warnings(path: str, drafts: Sequence[Row]) -> dict[int, list[dict]]:
    """Row number -> what `corpus check --json` noted of that row: {"part", "text"}. UserError for other drafts."""
    warnings: dict[int, list[dict]] = defaultdict(list)
    for line, found in enumerate(read_table(path, ["row", "prompt", "issues"]), 1):
        number, issues, where = found["row"], found["issues"], f"{path} line {line}"
        if type(number) is not int or not 1 <= number <= len(drafts):
            raise UserError(f"{where}: row is {number!r:.40}; expected 1 to {len(drafts):,}, a row of the drafts")
        if found["prompt"] != drafts[number - 1].fields["prompt"]:
            raise UserError(f"{where}: not the prompt of row {number}; check these drafts again (corpus check --json)")
        # Files of other programs have no digest: of these the prompt alone is compared.
        if found.get("draft") not in (None, text_digest(drafts[number - 1])):
            raise UserError(f"{where}: of another draft of row {number}; check these again (corpus check --json)")
        if not isinstance(issues, list) or not all(map(_is_issue, issues)):
            raise UserError(f"{where}: issues is {issues!r:.60}; expected a list of objects with part and text")
        warnings[number] += [{"part": issue["part"], "text": issue["text"]} for issue in issues]
    return warnings


def _is_issue(issue: object) -> bool:
    return isinstance(issue, dict) and isinstance(issue.get("part"), str) and isinstance(issue.get("text"), str)


def _numbers(text: str, n_rows: int) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= n_rows for word in words):
        raise UserError(f"--rows {text}: expected numbers of rows, 1 to {n_rows:,}, with commas between them")
    return sorted(set(map(int, words)))


def deal(items: Sequence[dict], n_reviewers: int, double: float, generator: random.Random) -> list[list[dict]]:
    """The items of each reviewer, in the order of the drafts. Every item has one reviewer, the share `double` has two.

    The second reviewer of an item is drawn from all others, so that every two of them meet.
    """
    if len(items) < n_reviewers:
        raise UserError(f"--reviewers {n_reviewers}: only {counted(len(items), 'row')}; expected a row for each")
    places = generator.sample(range(len(items)), len(items))
    first = {place: i % n_reviewers for i, place in enumerate(places)}
    doubled = generator.sample(range(len(items)), round(double * len(items)))
    second = {place: (first[place] + generator.randrange(1, n_reviewers)) % n_reviewers for place in doubled}
    return [
        [one for place, one in enumerate(items) if reviewer in (first[place], second.get(place))]
        for reviewer in range(n_reviewers)
    ]


# The page


def item(number: int, row: Row, warnings: Sequence[Mapping], given: Services | None = None) -> dict:
    """What the page shows of a draft. `draft`: the texts that may be edited, "" for one that the row lacks."""
    draft, language = Draft(row.fields, row.reasoning), row_language_or_english(row.fields, row.fields["answer"])
    return {
        "id": str(number),
        "language": language,  # in which a screen reader is to read the texts aloud
        "prompt": row.fields["prompt"],
        "draft": {name: draft.text(name) for name in EDITABLE},
        "parts": parts_of(row.fields["answer"], language, given),
        "warnings": list(warnings),
    }


def parts_of(answer: str, language: str = ENGLISH, given: Services | None = None) -> list[str]:
    """The part that each paragraph is, in order. language: its code; in one without word lists only services and steps
    are found. given: helplines instead of the bundled ones."""
    texts = re.sub("\r\n?", "\n", answer).split("\n\n")
    return [part_of(text, i == len(texts) - 1, language, given) for i, text in enumerate(texts)]


def part_of(paragraph: str, is_last: bool, language: str = ENGLISH, given: Services | None = None) -> str:
    """Which part of a supportive refusal a paragraph is, as far as word lists show it; "" for none."""
    text = word_list_judge.plain(paragraph)
    if word_list_judge.gives_contact(text, given):
        return "services"
    if word_list_judge.names_support(text, given):  # a strategy, since no service is named
        return "step"
    # `gives_contact` reads English words beside a number or a page. In another language each of them counts.
    if language != ENGLISH and (numbers_in(text) or hosts_in(text)):
        return "services"
    if is_last and _gives_hope(text, language):
        return "closing"
    return "acknowledgement" if _acknowledges(text, language) else ""


def _gives_hope(text: str, language: str) -> bool:
    if language == ENGLISH:
        return bool(lists.HOPE.search(text))
    return language in languages() and bool(languages()[language].hope.search(text))


def _acknowledges(text: str, language: str) -> bool:
    if language == ENGLISH:
        return bool(lists.ACKNOWLEDGEMENT.search(text)) or word_list_judge.refuses(text)
    return language in languages() and languages()[language].refuses(text)


def page(name: str, items: Sequence[dict], given: Services | None = None) -> str:
    """The page as one HTML file. name: the digest of the drafts; given: helplines instead of the bundled ones."""
    known = clusters()["clusters"]
    content = {
        "page": name,
        "kind": "review",
        "clusters": {cluster: entry["strategies"] for cluster, entry in known.items()} | {BENIGN: []},
        "strategies": list(clusters()["strategies"]),
        "items": list(items),
    }
    parts = {"title": html.escape(TITLE), "notice": NOTICE, "keys": KEYS, "helplines": helplines.as_html(given)}
    parts["instructions"] = read_text(ASSETS / "review.html")
    scripts = ["element.js", "form.js", "review.js"]
    return web_page.build("form.html", parts, ["form.css", "review.css"], scripts, content)
