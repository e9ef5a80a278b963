"""Drafts of one's own rows: what a machine can see, row by row.

    python -m psysafe.corpus check drafts.jsonl --not-in evaluation.jsonl --json issues.jsonl

The four parts, numbers and addresses that no known service has, the strategy, words of the prompt taken up, templates,
near duplicates, the language, the length, leaks; with a judge also help to do harm, diagnoses and promises. Every row
with an issue is listed with its reasons, none is dropped. docs/own-rows.md says what each check sees and misses.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path

from psysafe import services
from psysafe.cli import out_file
from psysafe.corpus.common_text import Shared, duplicate_issues, leak_issues, template_issues
from psysafe.corpus.contacts import Services, known_services
from psysafe.corpus.draft_checks import GROUP, Issue, Settings, group_of, row_issues
from psysafe.corpus.forbidden_content import QUESTIONS, forbidden_issues
from psysafe.corpus.outputs import refuse_inputs
from psysafe.corpus.texts import answer_of, first_user_text, prompts_of, refuse_long, word_runs
from psysafe.data.languages import field_language, has_no_spaces, known_languages, languages
from psysafe.data.rows import CLUSTER, Row, read_rows
from psysafe.evaluation import judge_models
from psysafe.files import write_atomic
from psysafe.printable import counted, one_line, plain
from psysafe.program import UserError

CHECKS = {
    "parts": "acknowledgement and refusal, step, services, closing are there",
    "services": "every number, address and service is known; those of the cluster are all given",
    "strategy": "one strategy of the cluster, the same in the field and in the answer",
    "relevance": "a word of the prompt is taken up",
    "template": "at most half of the text stands in other rows",
    "duplicate": "the prompt is no near duplicate of another row's",
    "language": "every part is in the language that was asked for",
    "length": "the number of words",
    "group": "harmless prompts are answered, unsafe ones outside the clusters refused plainly",
    "characters": "no control characters, marks of direction or chat tokens",
    "leak": "the prompt shares no run of words with an evaluation's",
    "harm": "nothing helps to do harm (a judge says so)",
    "claims": "no diagnosis, no promise (a judge says so)",
}
OF_A_LANGUAGE = ("parts", "relevance", "language")  # checks that need a language's words
OF_WORDS = ("template", "duplicate", "leak")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="DRAFTS", help="rows with prompt, answer, risk cluster, group")
    parser.add_argument("--not-in", nargs="*", default=[], metavar="FILE", help="evaluation prompts, to find leaks of")
    add_settings(parser)
    parser.add_argument("--json", type=out_file, metavar="FILE", help="JSONL: a line for each row with its issues")
    parser.add_argument("--judged", metavar="FILE", help="keeps the judge's replies (DRAFTS.judged.jsonl)")
    judge_models.add_arguments(parser)
    for flag, choices in (("--device", ["cpu", "cuda"]), ("--dtype", ["float32", "bfloat16"])):
        parser.add_argument(flag, choices=["auto", *choices], default="auto", help="of --judge-local (auto)")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of `Settings` and the services, which write takes, too."""
    about = f"of the answers (en); the checks know {known_languages()}"
    parser.add_argument("--language", default=Settings.language, metavar="CODE", help=about)
    parser.add_argument("--min-words", type=int, default=Settings.min_words, metavar="N",
                        help=f"of an answer to a risky prompt ({Settings.min_words})")  # fmt: skip
    parser.add_argument("--max-words", type=int, default=Settings.max_words, metavar="N",
                        help=f"of an answer ({Settings.max_words})")  # fmt: skip
    services.add_arguments(parser, "helplines that answers may name")


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    reasons = judge_models.without_effect(args) | services.without_effect(args)
    if not args.judge_local:
        reasons |= dict.fromkeys(("--device", "--dtype"), "without --judge-local")
    if not has_judge(args):
        reasons |= dict.fromkeys(("--judged", "--judge-tokens"), "without a judge")
    return reasons


def has_judge(args: argparse.Namespace) -> bool:
    return bool(args.judge_url or args.judge_local)


def run(args: argparse.Namespace) -> int:
    inputs = {"the drafts": args.files, "--not-in": args.not_in, "--services": services.paths(args.services)}
    judged = args.judged or f"{args.files[0]}.judged.jsonl"
    for flag, out in (("--json", args.json), ("--judged", judged)):
        if out:
            refuse_inputs(flag, out, inputs)
    judge = judge_models.from_arguments(args, temperature=0.0) if has_judge(args) else None
    rows = read_drafts(args.files)
    if judge:
        refuse_long(rows, "prompt", "answer")
    forbidden = word_runs(prompt for path in args.not_in for prompt in prompts_of(path))
    settings = Settings(args.language, args.min_words, args.max_words)
    helplines = known_services(args.services, args.unchecked)
    issues, shared = check(rows, settings, helplines, forbidden)
    not_judged: list[str] = []
    if judge:
        found, not_judged = forbidden_issues(rows, judge, judged)
        add(issues, found)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.json, "".join(json_lines(rows, issues, shared)))
    undone = not_done_at_all(rows, settings, bool(args.not_in), bool(judge))
    print(plain(as_text(rows, issues, not_done(rows, settings, bool(args.not_in), bool(judge)), undone)))
    for line in not_judged:
        print(one_line(f"{line}; start again to retry"))
    return 1 if any(issues.values()) or not_judged else 0


def read_drafts(paths: Sequence[str]) -> list[Row]:
    """Rows of any shape that training reads, each with a `prompt` and an `answer`. UserError for any other."""
    rows = []
    for row in read_rows(paths):
        for name in (GROUP, CLUSTER, "framework_name", "language"):
            if not isinstance(row.fields.get(name), str | None):
                raise UserError(f"{row.where}: {name} is {json.dumps(row.fields[name]):.60}, expected a text")
        texts = {"prompt": first_user_text(row.fields), "answer": answer_of(row), "reasoning": row.reasoning}
        rows.append(Row({**row.fields, **texts}, row.file, row.number, row.line))
    return rows


def check(
    rows: Sequence[Row], settings: Settings, services: Services, forbidden: set[str]
) -> tuple[dict[int, list[Issue]], list[Shared]]:
    """(the issues of each row by its place, what each shares with others), without those that a judge would find.

    forbidden: runs of words of evaluation prompts, as `word_runs` gives them.
    """
    issues = {number: row_issues(row.fields, services, settings) for number, row in enumerate(rows)}
    templates, shared = template_issues(rows, services)
    for found in (templates, duplicate_issues(rows), leak_issues(rows, forbidden)):
        add(issues, found)
    return issues, shared


def add(issues: dict[int, list[Issue]], more: dict[int, list[Issue]]) -> None:
    for number, found in more.items():
        issues[number] = [*issues[number], *found]


def not_done(rows: Sequence[Row], settings: Settings, has_evaluation: bool, has_judge: bool) -> list[str]:
    """A line for each check that could not be made, and why."""
    lines = []
    codes = {field_language(row.fields) or settings.code for row in rows}
    for code in sorted(map(str, codes - languages().keys())):
        known = known_languages()
        checks = ", ".join(OF_A_LANGUAGE)
        lines.append(f"not checked in {code}: {checks}, refusals, invented names; the word lists know {known}")
    if n := sum(has_no_spaces(row.fields["answer"]) for row in rows):
        checks = ", ".join(OF_WORDS)
        lines.append(f"not checked in {counted(n, 'row')} without spaces between words: length; {checks} see little")
    if not has_evaluation:
        lines.append("not checked: leak; name the files of evaluation prompts with --not-in")
    if not has_judge:
        lines.append(f"not checked: {', '.join(QUESTIONS)}; name a judge with --judge-url or --judge-local")
    return lines


def not_done_at_all(rows: Sequence[Row], settings: Settings, has_evaluation: bool, has_judge: bool) -> set[str]:
    """The checks that were made of no row: their count is no 0."""
    codes = {field_language(row.fields) or settings.code for row in rows}
    undone = set() if codes & languages().keys() else set(OF_A_LANGUAGE)
    undone |= {"length"} if all(has_no_spaces(row.fields["answer"]) for row in rows) else set()
    return undone | (set() if has_evaluation else {"leak"}) | (set() if has_judge else set(QUESTIONS))


def text_digest(row: Row) -> str:
    """Of what was checked of a draft, so that `review` can tell warnings of another draft of the same prompt."""
    texts = [row.fields["prompt"], row.fields["answer"], row.reasoning]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def json_lines(rows: Sequence[Row], issues: dict[int, list[Issue]], shared: Sequence[Shared]) -> list[str]:
    """A line for each row: where it stands, its prompt, its issues with the part each is in, its shared text."""
    lines = []
    for number, row in enumerate(rows):
        other = shared[number].other
        line = {
            "file": str(row.file),
            "row": row.number,
            "prompt": row.fields["prompt"],
            "draft": text_digest(row),
            "issues": [issue._asdict() for issue in issues[number]],
            "shared": round(shared[number].share, 4),
            "shared_with": None if other is None else rows[other].where,
        }
        lines.append(json.dumps(line) + "\n")
    return lines


def as_text(
    rows: Sequence[Row], issues: dict[int, list[Issue]], not_done: Sequence[str], undone: Set[str]
) -> str:
    """Every row with an issue, then a table: how many rows fail which check, "–" for one of `undone`."""
    lines = [
        one_line(f"{rows[number].where}: {issue.check} ({issue.part}): {issue.text}")
        for number, found in issues.items()
        for issue in found
    ]
    failing = Counter(check for found in issues.values() for check in {issue.check for issue in found})
    lines += ["", f"{'check':<10} {'rows':>6}  what holds in a row without an issue"]
    counts = {name: "–" if name in undone else f"{failing[name]:,}" for name in CHECKS}
    lines += [f"{name:<10} {counts[name]:>6}  {what}" for name, what in CHECKS.items()]
    bad = sum(bool(found) for found in issues.values())
    groups = Counter(group_of(row.fields) for row in rows)
    kinds = ", ".join(f"{n:,} {group}" for group, n in groups.items())
    lines += ["", *not_done, f"{bad:,} of {counted(len(rows), 'row')} with an issue (rows: {kinds})"]
    return "\n".join(lines)
