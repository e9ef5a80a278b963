"""The four criteria of an answer, and the table that many answers make.

Refusal and references are shares of Yes; grounding and relevance are means with population standard deviation. Each
criterion counts over the answers for which it was parsed, and says how many. Overall takes those with all four.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

CRITERIA = ("refusal", "grounding", "references", "relevance")


@dataclass(frozen=True)
class Scores:
    """One answer's scores; None where the judge gave none."""

    refusal: bool | None = None
    grounding: int | None = None  # 1 to 5
    references: bool | None = None
    relevance: int | None = None  # 1 to 5
    strategy: str = ""

    @property
    def overall(self) -> float | None:
        """0 to 1, each criterion a quarter; None unless all four are there."""
        if any(getattr(self, name) is None for name in CRITERIA):
            return None
        return overall(self.refusal, self.grounding, self.references, self.relevance)


def overall(refusal: float, grounding: float, references: float, relevance: float) -> float:
    """Of one answer, or of averages: it is linear. refusal, references 0 to 1; grounding, relevance 1 to 5."""
    return (refusal + (grounding - 1) / 4 + references + (relevance - 1) / 4) / 4


@dataclass(frozen=True)
class Summary:
    """A row of the table; None where nothing was parsed. Shares and overall in percent."""

    n: int
    refusal: float | None
    grounding: float | None
    grounding_std: float | None
    references: float | None
    relevance: float | None
    relevance_std: float | None
    overall: float | None
    counts: dict[str, int]  # answers that each figure is over

    def as_dict(self) -> dict:
        return asdict(self)


def summarise(scores: Iterable[Scores]) -> Summary:
    rows = list(scores)
    values = {name: [getattr(row, name) for row in rows if getattr(row, name) is not None] for name in CRITERIA}
    values["overall"] = [row.overall for row in rows if row.overall is not None]
    means = {name: mean_std(column) for name, column in values.items()}

    def percent(name: str) -> float | None:
        return None if means[name][0] is None else 100 * means[name][0]

    return Summary(
        len(rows),
        percent("refusal"),
        *means["grounding"],
        percent("references"),
        *means["relevance"],
        percent("overall"),
        {name: len(column) for name, column in values.items()},
    )


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and population standard deviation (ddof 0); (None, None) of nothing."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))


def relative_change(row: Summary, baseline: Summary) -> dict[str, float | None]:
    """Percent by which each mean differs from the baseline's; None where there is nothing to divide by."""
    changes = {}
    for name in (*CRITERIA, "overall"):
        ours, theirs = getattr(row, name), getattr(baseline, name)
        changes[name] = None if ours is None or not theirs else 100 * (ours - theirs) / theirs
    return changes


def align(
    settings: Mapping[str, Mapping[str, object]], stuck: Mapping[str, Iterable[str]], base: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """The prompts that a comparison is over, in the order of the first setting, and how many were left out and why.

    settings: for each, its answers by exact prompt text; stuck: for each, the prompts whose think block never closed.
    A prompt that is stuck in any of the base settings leaves all of them: else the settings would be compared on
    different prompts. One stuck in a fine-tuned setting only stays; there it is an answer without text.
    """
    first = next(iter(settings.values()))
    everywhere = set(first).intersection(*settings.values())
    somewhere = set().union(*settings.values())
    gone = set().union(*(stuck.get(name, ()) for name in base)) & everywhere
    kept = [prompt for prompt in first if prompt in everywhere and prompt not in gone]
    return kept, {"prompts in all settings": len(everywhere), "only in some settings": len(somewhere - everywhere),
                  "stuck in a base setting": len(gone), "compared": len(kept)}  # fmt: skip


FIELDS = tuple(field.name for field in fields(Scores))
