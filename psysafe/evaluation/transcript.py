"""What was asked, answered and said of the answers, for reading: transcript.md beside a result.

Texts of models stand in fenced blocks, as they are: a fence is longer than any run of backticks in its text, so that no
Markdown or HTML of a model's is any in the page. Reasoning is folded away.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe.evaluation.criteria import CRITERIA, Scores
from psysafe.evaluation.items import Columns, Item, Stage, Texts
from psysafe.evaluation.judge_input import JudgeInput
from psysafe.evaluation.models_under_test import VariantAnswers
from psysafe.evaluation.replies import REASONING_END, REASONING_START
from psysafe.files import write_atomic
from psysafe.printable import counted, in_markdown, plain

FILE = "transcript.md"
NOTICE = "What models and judges wrote, as they wrote it. No answer of a model replaces professional care."


class Judgement(NamedTuple):
    """words: the judge's reply, "" where it gave none or is no model; scores: what was read of it; shown: how much of
    the answer the judge was shown, "" for all of it."""

    judge: str
    scores: str
    words: str = ""
    shown: str = ""


class Answer(NamedTuple):
    """shown: what was judged, which may be another text than the answer: decoded, translated, with its reasoning."""

    variant: str
    row: Mapping
    shown: str | None
    judgements: Sequence[Judgement]


class Entry(NamedTuple):
    heading: str
    prompt: str
    answers: list[Answer]


def write(out: Path, title: str, entries: Iterable[Entry]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / FILE, markdown(title, entries))


def markdown(title: str, entries: Iterable[Entry]) -> str:
    parts = [f"# {in_markdown(title)}", NOTICE]
    for entry in entries:
        parts += [f"## {in_markdown(entry.heading)}", fenced(entry.prompt)]
        for answer in entry.answers:
            parts += _of_answer(answer)
    return "\n\n".join(parts) + "\n"


def _of_answer(answer: Answer) -> list[str]:
    row, reasoning = answer.row, reasoning_of(answer.row)
    parts = [f"### {in_markdown(answer.variant)}"]
    if reasoning:
        head = f"Reasoning{' that never ended' if row['unfinished_thinking'] else ''}"
        summary = f"<details><summary>{head}, {counted(len(reasoning), 'character')}</summary>"
        parts += [summary, fenced(reasoning), "</details>"]
    parts += [fenced(row["answer"])] if row["answer"] else ["(no answer)"]
    if answer.shown not in (None, row["answer"]):
        parts += ["As it was judged:", fenced(answer.shown)]
    for judgement in answer.judgements:
        judge = ", ".join(filter(None, [judgement.judge, judgement.shown]))
        parts.append(f"{in_markdown(judge)}: **{in_markdown(judgement.scores)}**")
        parts += [fenced(judgement.words)] if judgement.words else []
    return parts if answer.judgements else [*parts, "Not judged."]


def fenced(text: str) -> str:
    """The text as a block of code that ends where it ends."""
    text = plain(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def reasoning_of(row: Mapping) -> str:
    """The reasoning of an answer, "" for none."""
    whole = row.get("response") or ""
    ends = list(REASONING_END.finditer(whole))
    cut = whole if row["unfinished_thinking"] else whole[: ends[-1].start()] if ends else ""
    return row.get("reasoning") or REASONING_START.sub("", cut, count=1).strip()


def of_benchmark(
    parts: Mapping[str, Sequence[Item]],
    columns: Mapping[str, Columns],
    texts: Mapping[str, Texts],
    stages: Mapping[str, Stage],
    inputs: Mapping[str, JudgeInput],
) -> list[Entry]:
    """texts: what was judged; stages, inputs: by judge, inputs of models. Columns and texts by part."""

    def answer(part: str, i: int, variant: str) -> Answer:
        shown, said = texts[part][variant][i], []
        for judge, stage in stages.items():
            verdict, words = stage.judged.verdicts[part][variant][i], stage.replies.get(part, {}).get((variant, i), "")
            beginning = inputs[judge].note_on(shown) if judge in inputs and shown is not None else ""
            said.append(Judgement(judge, "no reply" if verdict is None else str(verdict), words, beginning))
        return Answer(variant, columns[part][variant][i], shown, said if shown is not None else [])

    entries = []
    for part, items in parts.items():
        for i, item in enumerate(items):
            answers = [answer(part, i, variant) for variant, rows in columns[part].items() if rows[i] is not None]
            heading = f"{part}, {item.label}" if part else item.label
            entries += [Entry(heading, item.prompt, answers)] if answers else []
    return entries


Judged = tuple[Mapping[str, Mapping[str, Scores]], Mapping[tuple[str, str], str]]  # scores by variant, prompt; replies


def of_criteria(
    answers: Mapping[str, VariantAnswers],
    prompts: Sequence[str],
    by_judge: Mapping[str, Judged],
    inputs: Mapping[str, JudgeInput],
) -> list[Entry]:
    """The answers to these prompts, each with its scores. inputs: of judges that are models."""
    entries = []
    for number, prompt in enumerate(prompts, 1):
        said = []
        for variant, of_variant in answers.items():
            judgements = []
            for judge, (scores, replies) in by_judge.items():
                score, words = in_words(scores.get(variant, {}).get(prompt)), replies.get((variant, prompt), "")
                beginning = inputs[judge].note_on(of_variant.rows[prompt]["answer"]) if judge in inputs else ""
                judgements.append(Judgement(judge, score, words, beginning))
            said.append(Answer(variant, of_variant.rows[prompt], None, judgements))
        cluster = next(iter(answers.values())).rows[prompt]["cluster"]
        entries.append(Entry(f"prompt {number}{f', {cluster}' if cluster else ''}", prompt, said))
    return entries


def in_words(scores: Scores | None) -> str:
    if scores is None:
        return "no reply"
    values = {name: getattr(scores, name) for name in CRITERIA}
    shown = {n: "–" if v is None else ("yes" if v else "no") if isinstance(v, bool) else v for n, v in values.items()}
    overall = "–" if scores.overall is None else f"{100 * scores.overall:.1f} %"
    return ", ".join([*(f"{name} {value}" for name, value in shown.items()), f"overall {overall}"])
