"""What reviewers exported from a review page, and which rows come of it.

An export is {"page": digest of the drafts, "rater": NAME, "reviews": [{"row", "field", "value", "time"}, ...]}. field:
decision (approve or reject), reason, note, or one of EDITABLE with the new text. value: null for what was taken back.
time: milliseconds since 1970; of two entries of one person the later one counts.
"""

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe.data.rows import BENIGN, CLUSTER
from psysafe.data.tokenizer import THINK, THINK_END
from psysafe.files import clusters, read_json
from psysafe.program import UserError

APPROVE, REJECT = "approve", "reject"
# What may be edited -> its field in a row.
EDITABLE = {"reasoning": "reasoning", "answer": "answer", "cluster": CLUSTER, "strategy": "framework_name"}
FIELDS = ("decision", "reason", "note", *EDITABLE)


class Draft(NamedTuple):
    fields: Mapping
    reasoning: str  # also where an older file has it under another name

    def text(self, name: str) -> str:
        """What is there to edit. name: of EDITABLE."""
        return self.reasoning if name == "reasoning" else self.fields.get(EDITABLE[name]) or ""


class Review(NamedTuple):
    """What one person said of one row. edits: field of the row -> new text, only where it differs from the draft."""

    decision: str
    edits: dict[str, str]
    reason: str
    note: str


class Exports(NamedTuple):
    reviews: dict[str, dict[int, Review]]  # reviewer -> place of the row, from 0 -> review with a decision
    n_undecided: int  # rows that were begun without a decision, counted for each reviewer
    n_repeated: int  # rows that one reviewer has in two files with different entries; the later entry counts
    files: dict[str, list[str]]  # reviewer -> what that person exported


class Result(NamedTuple):
    rows: dict[int, dict]  # place -> fields of the rows that pass
    disputed: dict[int, dict[str, Review]]  # place -> reviewer -> review, not settled
    misfits: dict[int, dict[str, Review]]  # as `disputed`, of rows whose strategy is one of another cluster
    rejected: dict[int, dict[str, Review]]
    unreviewed: list[int]
    settled: list[int]
    reviews: dict[str, dict[int, Review]]
    pairs: list[tuple[str, str, list[tuple[str, str]]]]  # two reviewers, and their decisions on the rows of both
    exports: Exports


Entries = dict[tuple[int, str], tuple[float, str | None]]  # (place, field) -> (time, value)


def read_exports(paths: Sequence[str | Path], digest: str, drafts: Sequence[Draft]) -> Exports:
    """UserError names the file and the entry that is none of these drafts."""
    by_reviewer: dict[str, Entries] = {}
    sources: dict[str | Path, str] = {}  # file -> reviewer
    repeated: set[tuple[str, int]] = set()
    for path in paths:
        name, entries = _read(path, digest, len(drafts))
        sources[path] = name
        earlier = by_reviewer.setdefault(name, {})
        for key, entry in entries.items():
            if key in earlier and earlier[key] != entry:
                repeated.add((name, key[0]))
            # Of two entries of the same time the texts decide, so that the order of the files never does.
            earlier[key] = max(earlier.get(key, entry), entry, key=lambda one: (one[0], one[1] or ""))
    for path, name in sources.items():
        _require_known_strategies(path, by_reviewer[name], drafts)
    reviews, n_undecided = {}, 0
    for name, entries in by_reviewer.items():
        places = sorted({place for (place, _), (_, value) in entries.items() if value is not None})
        of_person = {place: _review(entries, place, drafts[place]) for place in places}
        reviews[name] = {place: review for place, review in of_person.items() if review.decision}
        n_undecided += len(of_person) - len(reviews[name])
    files = {name: [str(path) for path in sources if sources[path] == name] for name in by_reviewer}
    return Exports(reviews, n_undecided, len(repeated), files)


def tidy_name(name: str) -> str:
    """As form.js has it: an umlaut may be one character or two, and spaces more or fewer, of one person."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def _require_known_strategies(path: str | Path, entries: Entries, drafts: Sequence[Draft]) -> None:
    """UserError for a strategy that somebody chose and that is none, in a row whose cluster has strategies."""
    for (place, field), (_, value) in entries.items():
        if field == "strategy" and value not in (None, drafts[place].text("strategy")):
            cluster = entries.get((place, "cluster"), (0, None))[1] or drafts[place].text("cluster")
            if cluster in clusters()["clusters"] and value not in clusters()["strategies"]:
                known = ", ".join(clusters()["clusters"][cluster]["strategies"])
                raise UserError(f"{path}: strategy of row {place + 1} is {value!r:.60}; expected one of {known}")


def _read(path: str | Path, digest: str, n_rows: int) -> tuple[str, Entries]:
    content = read_json(Path(path))
    if content.get("page") != digest:
        whose = f"of the drafts {content.get('page')!r:.40}, and --drafts are {digest!r}"
        raise UserError(f"{path}: {whose}; expected an export of a page of these drafts, unchanged since")
    name = content.get("rater")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{path}: rater is {name!r:.60}; expected the name of who reviewed")
    name = tidy_name(name)
    if not isinstance(content.get("reviews"), list):
        raise UserError(f"{path}: reviews is {content.get('reviews')!r:.60}; expected a list")
    if not content["reviews"]:
        raise UserError(f"{path}: no reviews in it; expected an export of a page on which something was decided")
    entries: Entries = {}
    for number, entry in enumerate(content["reviews"], 1):
        place, field, time, value = _entry(entry, n_rows, f"{path}: reviews {number}")
        if (place, field) in entries:
            raise UserError(f"{path}: reviews {number}: {field} of row {place + 1} again; expected it once")
        entries[place, field] = (time, value)
    return name, entries


def _entry(entry: object, n_rows: int, where: str) -> tuple[int, str, float, str | None]:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {entry!r:.60}; expected an object with row, field, value, time")
    row, field, value, time = (entry.get(name) for name in ("row", "field", "value", "time"))
    if type(row) is not int or not 1 <= row <= n_rows:
        raise UserError(f"{where}: row is {row!r:.40}; expected 1 to {n_rows:,}")
    if field not in FIELDS:
        raise UserError(f"{where}: field is {field!r:.40}; expected {', '.join(FIELDS)}")
    if type(time) not in (int, float) or not abs(time) <= 2**53:  # JavaScript's largest whole number
        raise UserError(f"{where}: time is {time!r:.40}; expected milliseconds since 1970")
    if value is None:
        return row - 1, field, time, value
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {field} of row {row} is {value!r:.40}; expected a text that is not empty")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{where}: {field} of row {row} holds half of a surrogate pair; expected whole characters")
    if field == "cluster" and value not in (*clusters()["clusters"], BENIGN, None):
        known = ", ".join([*clusters()["clusters"], BENIGN])
        raise UserError(f"{where}: cluster of row {row} is {value!r:.40}; expected one of {known}")
    if field == "decision" and value not in (APPROVE, REJECT):
        raise UserError(f"{where}: decision is {value!r:.40}; expected {APPROVE} or {REJECT}")
    if field in ("answer", "reasoning") and (THINK in value or THINK_END in value):
        raise UserError(f"{where}: {field} of row {row} holds {THINK} or {THINK_END}; expected a text without them")
    return row - 1, field, time, value


def _review(entries: Entries, place: int, draft: Draft) -> Review:
    values = {field: entries.get((place, field), (0, None))[1] for field in FIELDS}
    edits = {EDITABLE[name]: values[name] for name in EDITABLE if values[name] not in (None, draft.text(name))}
    return Review(values["decision"] or "", edits, values["reason"] or "", values["note"] or "")


def collect(drafts: Sequence[Draft], exports: Exports, settled_by: str | None, unreviewed: bool) -> Result:
    """Which drafts pass, and with which texts.

    A row passes whose reviewers all approve the same texts. Where they differ, in the decision or in the texts, the
    review of `settled_by` decides; without one the row is disputed. An approved row whose strategy is one of another
    cluster does not pass. UserError where that person reviewed nothing.
    """
    if settled_by is not None and settled_by not in exports.reviews:
        known = ", ".join(exports.reviews)
        raise UserError(f"--settled-by {settled_by}: no export of that name (found: {known:.100})")
    result = Result({}, {}, {}, {}, [], [], exports.reviews, pairs_of(exports.reviews, settled_by), exports)
    for place, draft in enumerate(drafts):
        of_row = {name: reviews[place] for name, reviews in exports.reviews.items() if place in reviews}
        if not of_row:
            result.unreviewed.append(place)
            if unreviewed:
                result.rows[place] = dict(draft.fields)
            continue
        is_agreed = _is_agreed(of_row)
        if not is_agreed and settled_by not in of_row:
            result.disputed[place] = of_row
            continue
        review = of_row[settled_by] if settled_by in of_row else next(iter(of_row.values()))
        if review.decision == APPROVE and misfit(draft, review):
            result.misfits[place] = of_row if is_agreed else {settled_by: review}
            continue
        if not is_agreed:
            result.settled.append(place)
        if review.decision == REJECT:
            result.rejected[place] = of_row
        else:
            names = {"reviewed_by": sorted(of_row), "edited": list(review.edits)}
            result.rows[place] = {**draft.fields, **review.edits, **names}
    return result


def misfit(draft: Draft, review: Review) -> str:
    """The strategy and the cluster of a reviewed row, where it is one of another cluster; else "". Names that are no
    strategy are let be: in the published rows the field names a benchmark."""
    fields, known = {**draft.fields, **review.edits}, clusters()
    cluster, strategy = fields.get(CLUSTER), fields.get("framework_name")
    if cluster not in known["clusters"] or strategy not in known["strategies"]:
        return ""
    fitting = known["clusters"][cluster]["strategies"]
    expected = f"expected one of {', '.join(fitting)}"
    return "" if strategy in fitting else f"{strategy!r} is no strategy of the cluster {cluster}; {expected}"


def _is_agreed(reviews: Mapping[str, Review]) -> bool:
    """Whether all reject, or all approve the same texts."""
    first, *others = [(review.decision, review.decision == APPROVE and review.edits) for review in reviews.values()]
    return all(other == first for other in others)


def pairs_of(
    reviews: Mapping[str, Mapping[int, Review]], settled_by: str | None
) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Every two reviewers with rows in common, and their decisions. Who settles has seen what the others said, and is
    not among them."""
    names = [name for name in reviews if name != settled_by]
    pairs = []
    for first, second in itertools.combinations(names, 2):
        both = reviews[first].keys() & reviews[second].keys()
        if both:
            decisions = [(reviews[first][place].decision, reviews[second][place].decision) for place in sorted(both)]
            pairs.append((first, second, decisions))
    return pairs
