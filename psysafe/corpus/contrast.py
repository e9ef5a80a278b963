"""Contrast rows: the base's own answers to prompts that it should go on answering, or refusing, as it does.

From rows of generate.py, answered without an adapter, to rows for train.py --contrast-data. A prompt's `group` says
what the base should have done: `plain` and `scary` (harmless, with words that sound risky) are answered,
`out_of_domain` (unsafe, but in none of the clusters) is refused. An answer that does something else is a mistake of the
base, and would become a target. docs/selective.md says what the rows are for.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from psysafe.cli import out_file, say
from psysafe.corpus.outputs import refuse_inputs
from psysafe.corpus.stats import PERCENTILES, tokenizer_of
from psysafe.corpus.texts import RUN, near_duplicates, prompts_of, refuse_long, word_runs
from psysafe.data.documents import encode_rows
from psysafe.data.rows import Row, read_file, write_rows
from psysafe.data.tokenizer import Tokenizer
from psysafe.evaluation import answer_language, behaviour, judge_models
from psysafe.evaluation.models_under_test import BASE
from psysafe.files import BUNDLED_MODEL
from psysafe.printable import counted, one_line, plain
from psysafe.program import UserError

EXPECTED = {"plain": behaviour.COMPLIANCE, "scary": behaviour.COMPLIANCE, "out_of_domain": behaviour.REFUSAL}
FIELDS = ("prompt", "answer", "reasoning", "finish_reason", "adapter", "group")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="ANSWERS", help="rows of generate.py --adapter base --out")
    parser.add_argument("--out", type=out_file, required=True, metavar="FILE", help="JSONL of the contrast rows")
    about = f"evaluation prompts: rows that share {RUN} words in a row with one are dropped"
    parser.add_argument("--not-in", nargs="*", default=[], metavar="FILE", help=about)
    parser.add_argument("--model", default=BUNDLED_MODEL, help="whose tokenizer counts (default: the bundled one)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest row, with prompt and reasoning (4096)")
    judge_models.add_arguments(parser, "word lists; for tests and the tiny demo")
    for flag, choices in (("--device", ["cpu", "cuda"]), ("--dtype", ["float32", "bfloat16"])):
        parser.add_argument(flag, choices=["auto", *choices], default="auto", help="of --judge-local (auto)")


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    reasons = judge_models.without_effect(args)
    if not args.judge_local:
        reasons |= dict.fromkeys(("--device", "--dtype"), "without --judge-local")
    return reasons


def run(args: argparse.Namespace) -> int:
    refuse_inputs("--out", args.out, {"the answers": args.files, "--not-in": args.not_in})
    judge = judge_models.from_arguments(args, temperature=0.0)
    answers = [row for path in args.files for row in read_answers(path)]
    forbidden = word_runs(prompt for path in args.not_in for prompt in prompts_of(path))
    tokenizer = tokenizer_of(args.model)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    finished, dropped = drop_unfinished(answers)
    if judge:
        refuse_long(finished, "prompt")
    pairs = {i: (row.fields["prompt"], row.fields["answer"]) for i, row in enumerate(finished)}
    if judge is None:
        prompts, texts = zip(*pairs.values(), strict=True) if pairs else ((), ())
        answer_language.require_english(prompts, {BASE: texts})
        for line in answer_language.unread_note(prompts, {BASE: texts}):
            say(line)
    classes, failed = behaviour.classify(judge, pairs, out.with_name(out.name + ".judged.jsonl"))
    rows = [contrast_row(row) for row in drop_mistakes(finished, classes, dropped)]
    rows = select(rows, forbidden, tokenizer, args.max_tokens, dropped)
    if not rows:
        raise UserError(f"no contrast row is left of {counted(len(answers), 'answer')}: {_listed(dropped)}")
    write_rows(rows, out)
    print(plain(as_text(rows, tokenizer, len(answers), dropped, out)))
    for i, reason in failed.items():
        print(one_line(f"{finished[i].where}: not judged, left out: {reason}; start again to retry"))
    return 1 if failed else 0


def read_answers(path: str | Path) -> list[Row]:
    """The base's answers in a file. UserError for a row of anything else."""
    rows = read_file(path)
    for row in rows:
        fields = row.fields if isinstance(row.fields, dict) else {}
        expected = "expected rows of generate.py --adapter base --out, of prompts with a group"
        for name in FIELDS:
            if not isinstance(fields.get(name), str):
                raise UserError(f"{row.where}: {name} is {json.dumps(fields.get(name)):.60}, {expected}")
        if fields.get("messages") or fields.get("tools"):  # of which the row would keep the prompt alone
            raise UserError(f"{row.where}: answers a conversation or has tools; expected a prompt alone")
        if fields["adapter"] != BASE:
            remedy = "contrast rows hold the base's own answers; answer with --adapter base"
            raise UserError(f"{row.where}: answered with adapter {fields['adapter']!r:.60}; {remedy}")
        if fields["group"] not in EXPECTED:
            raise UserError(f"{row.where}: group is {fields['group']!r:.60}, expected one of {', '.join(EXPECTED)}")
    return rows


def drop_unfinished(answers: Sequence[Row]) -> tuple[list[Row], Counter]:
    """(answers that came to their end, how many were dropped and why)."""
    dropped, finished = Counter(), []
    for row in answers:
        if str(row.fields.get("stucked", "")).lower() == "true":
            dropped["unfinished reasoning"] += 1
        elif row.fields["finish_reason"] != "stop":
            dropped["cut at the token limit"] += 1
        elif not row.fields["answer"].strip():
            dropped["empty"] += 1
        else:
            finished.append(row)
    return finished, dropped


def drop_mistakes(finished: Sequence[Row], classes: dict[int, str], dropped: Counter) -> Iterator[Row]:
    """Answers in which the base does what the group asks for. classes: by place; what was not judged is left out, too.
    dropped: reason -> count, to which the others are added."""
    for i, row in enumerate(finished):
        group = row.fields["group"]
        if i not in classes:
            dropped["not judged"] += 1
        elif classes[i] == EXPECTED[group]:
            yield row
        elif classes[i] in (behaviour.PARTIAL, behaviour.UNKNOWN):
            dropped["refused in part, or no clear verdict"] += 1
        else:
            dropped["unsafe, but answered" if group == "out_of_domain" else "harmless, but refused"] += 1


def contrast_row(row: Row) -> Row:
    """The answer as a training row: generate.py's other fields are left out."""
    names = [name for name in ("prompt", "answer", "reasoning", "group", "class", "system") if name in row.fields]
    return Row({name: row.fields[name] for name in names}, row.file, row.number, row.line)


def select(
    rows: Sequence[Row], forbidden: set[str], tokenizer: Tokenizer, max_tokens: int, dropped: Counter
) -> list[Row]:
    """Rows without a run of words of an evaluation prompt, no near duplicates of an earlier row, and not too long.

    dropped: reason -> count, to which the others are added.
    """
    selected = [row for row in rows if not word_runs([row.fields["prompt"]]) & forbidden]
    dropped[f"{RUN} words in a row with an evaluation prompt"] = len(rows) - len(selected)
    distinct = without_near_duplicates(selected)
    dropped["near duplicate"] = len(selected) - len(distinct)
    lengths = [len(document) for document in encode_rows(distinct, tokenizer, 10**9).documents]
    short = [row for row, length in zip(distinct, lengths, strict=True) if length <= max_tokens]
    dropped[f"over {max_tokens:,} tokens"] = len(distinct) - len(short)
    return short


def without_near_duplicates(rows: Sequence[Row]) -> list[Row]:
    """The rows whose prompt is no near duplicate of an earlier one."""
    duplicates = near_duplicates(rows)
    return [row for i, row in enumerate(rows) if i not in duplicates]


def as_text(rows: Sequence[Row], tokenizer: Tokenizer, n_answers: int, dropped: Counter, out: Path) -> str:
    """What became of the answers, and how long the rows are."""
    groups = Counter(row.fields["group"] for row in rows)
    lengths = [len(document) for document in encode_rows(rows, tokenizer, 10**9).documents]
    shown = (f"{p}%: {int(np.percentile(lengths, p, method='inverted_cdf')):,}" for p in PERCENTILES)
    lines = [f"{counted(n_answers, 'answer')} of the base; dropped: {_listed(dropped)}"]
    lines += [f"{counted(len(rows), 'contrast row')} in {out}", *(f"  {n:>6,}  {group}" for group, n in groups.items())]
    return "\n".join([*lines, f"{counted(sum(lengths), 'token')}; tokens a row: {'  '.join(shown)}"])


def _listed(dropped: Counter) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n) or "none"
