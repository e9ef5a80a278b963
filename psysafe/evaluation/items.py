"""What a benchmark's run is made of: items with answers, texts to judge, verdicts, and the lines that are kept of them.

A benchmark may fall into parts, such as SORRY-Bench's mutations; one without parts is the part "".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from psysafe.evaluation import stored
from psysafe.files import write_json_lines


class Item(NamedTuple):
    """A question of a benchmark, and the row that it was read from.

    groups: what it belongs to, by kind of group, as in {"label": "safe"}; the report's readers choose by them.
    """

    label: str  # its name in the list of failures
    prompt: str
    row: dict
    groups: Mapping[str, str] = {}


@dataclass
class Rows:
    """What a benchmark has read."""

    parts: dict[str, list[Item]]
    prompts: list[str]  # looked for among the training rows
    settings: dict = field(default_factory=dict)  # for the result
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, str] | None = None  # number in the file -> prompt, for stored rows that have only the number


Texts = Mapping[str, Sequence[str | None]]  # variant -> its answer to each item of a part; None where it has none
Verdicts = Mapping[str, Sequence[Any]]  # variant -> the verdict on each answer; None where there is none


class Prepared(NamedTuple):
    """The texts as the judge is to see them, and by (variant, place) why there is none for some."""

    texts: Texts
    failed: Mapping[tuple[str, int], str] = {}
    notes: Sequence[str] = ()


class Judged(NamedTuple):
    """A benchmark's items with answers and verdicts, each by part."""

    parts: dict[str, list[Item]]
    texts: dict[str, Texts]
    verdicts: dict[str, Verdicts]
    judge: str  # its name; `rules_name` where the rules judged


Columns = Mapping[str, Sequence[dict | None]]  # variant -> the row of its answer to each item; None where it has none


class Answered(NamedTuple):
    """columns: by part; settings, notes: for the result."""

    columns: dict[str, Columns]
    settings: dict
    notes: list[str]


@dataclass
class ToJudge:
    """What every judge is shown. unfinished: of each variant, for each answer; by_part: the texts; failed: items that
    have no text that could be judged."""

    unfinished: dict[str, list[bool]]
    by_part: dict[str, Texts] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """What one judge has said, before its tables. unfinished: of each variant, for each answer; None where nobody
    knows; replies: by part, then by (variant, place); note_on_input: what the judge was shown, for the first table."""

    judged: Judged
    settings: dict
    failed: dict[str, str]
    notes: list[str]
    unfinished: dict[str, list[bool]] | None = None
    replies: dict[str, dict[tuple[str, int], str]] = field(default_factory=dict)
    note_on_input: str = ""


def named_items(part: str, items: Sequence[Item], reasons: Mapping[tuple[str, int], str]) -> dict[str, str]:
    """Reasons by (variant, place) as they are listed in a result: by variant, part and the item's label."""
    of_part = f", {part}" if part else ""
    return {f"{variant}{of_part}: {items[i].label}": why for (variant, i), why in reasons.items()}


def suffix_of(part: str) -> str:
    """Of the files of a part."""
    return f"_{part}.jsonl" if part else ".jsonl"


def prompts_of_numbers(rows: Rows) -> dict[str, str] | None:
    """Number in the benchmark's file -> prompt; None of several files, in which the same numbers stand."""
    if len(rows.parts) > 1:
        return None
    (items,) = rows.parts.values()
    named = ((next((item.row[name] for name in stored.IDS if name in item.row), None), item) for item in items)
    return {str(number): item.prompt for number, item in named if number is not None}


def write_items(path: Path, stage: Stage, columns: Mapping[str, Columns]) -> None:
    """One line of JSON for each answer, with the judge's reply and the verdict: what a later stage can start from.

    place: that of the prompt among all parts, from 1; a prompt may stand twice, and an answer may be missing.
    """
    lines, n_before = [], 0
    for part, items in stage.judged.parts.items():
        replies = stage.replies.get(part, {})
        for variant, column in columns[part].items():
            for i, (item, row) in enumerate(zip(items, column, strict=True)):
                if row is not None:
                    line = {"variant": variant, "part": part, "place": n_before + i + 1}
                    line |= {"prompt": item.prompt, "answer": row["answer"]}
                    line |= {"groups": dict(item.groups)} if item.groups else {}
                    has_more = row.get("response", row["answer"]) != row["answer"]
                    line |= {"response": row["response"]} if has_more else {}
                    line |= {"unfinished_thinking": row["unfinished_thinking"]}
                    line |= {"score": stage.judged.verdicts[part][variant][i]}
                    line |= {"reply": replies[variant, i]} if (variant, i) in replies else {}
                    lines.append(line)
        n_before += len(items)
    write_json_lines(path, lines)
