"""What raters said of answers: labels from a CSV or from rating files, and the judge's, all of one shape.

A rater is a person or the judge. An answer is known by its variant and its prompt. A label of refusal and references is
0 (No) or 1 (Yes), one of grounding and relevance 1 to 5. docs/evaluation.md describes the files.
"""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe.data.rows import read_table
from psysafe.evaluation.criteria import CRITERIA
from psysafe.files import read_json
from psysafe.program import UserError

YES_NO = {"no": 0, "yes": 1}
RATINGS = {str(rating): rating for rating in range(1, 6)}
LABELS = {"refusal": YES_NO, "grounding": RATINGS, "references": YES_NO, "relevance": RATINGS}  # word -> label
# A column of truth values with a gap in it is one of decimal numbers in pandas: 1.0 and 0.0.
YES_NO_OF_PANDAS = {"true": "yes", "1": "yes", "1.0": "yes", "false": "no", "0": "no", "0.0": "no"}
NOT_LABELLED = ("", "nan", "<na>")
ANONYMOUS = "people"  # the rater of a CSV without a column `rater`
SIDES, TIE = ("left", "right"), "tie"

Answer = tuple[str, str]  # (variant, prompt)
Labels = dict[Answer, dict[str, int]]  # answer -> criterion -> label; a criterion that was not labelled is not there


class Preference(NamedTuple):
    """Which of two answers to a prompt a rater preferred. left, right: the variants as this rater saw them; choice: one
    of the two sides, or a tie."""

    rater: str
    prompt: str
    left: str
    right: str
    choice: str


class Ratings(NamedTuple):
    labels: dict[str, Labels]  # by rater
    preferences: list[Preference]


def read_csv(path: str | Path, variants: Collection[str] = ()) -> dict[str, Labels]:
    """rater -> labels of a file with a row per answer and rater. variants: those that were judged, if any were: a row
    without a variant is of the only one."""
    rows = read_table(path, ["prompt"])
    names = dict.fromkeys(name for row in rows for name in row)  # of JSONL each row has its own
    if not names.keys() & set(CRITERIA):
        columns = ", ".join(map(str, names))
        raise UserError(f"{path}: no labels in it (columns: {columns:.100}); expected {', '.join(CRITERIA)}")
    return labels_of_rows(rows, path, variants)


def labels_of_rows(rows: Sequence[dict], path: str | Path, variants: Collection[str] = ()) -> dict[str, Labels]:
    """UserError for an answer that one rater labels twice: neither row can be preferred."""
    labels: dict[str, Labels] = {}
    numbers: dict[tuple[str, Answer], int] = {}  # of the row that labels an answer
    spellings: dict[str, str] = {}
    has_raters = any("rater" in row for row in rows)
    for number, row in enumerate(rows, 1):
        # An empty line of a spreadsheet is `,,,,,` in its CSV.
        if not any(str(cell or "").strip() for cell in row.values()):
            continue
        where = f"{path} row {number}"
        rater, answer = _rater_and_answer(row, where, has_raters, variants)
        _one_spelling(spellings, rater, where)
        read = {name: read_label(row.get(name), name, where) for name in CRITERIA}
        given = {name: label for name, label in read.items() if label is not None}
        if not given:
            continue
        earlier = numbers.setdefault((rater, answer), number)
        if earlier != number:
            of_rater = f"{rater} " if has_raters else ""
            remedy = "" if has_raters else " (of several people: name them in a column rater)"
            raise UserError(
                f"{where}: {of_rater}labels the answer of row {earlier} again; expected one row for each answer{remedy}"
            )
        labels.setdefault(rater, {})[answer] = given
    return labels


def _rater_and_answer(row: dict, where: str, has_raters: bool, variants: Collection[str]) -> tuple[str, Answer]:
    rater = str(row.get("rater") or "").strip() if has_raters else ANONYMOUS
    if not rater:
        raise UserError(f"{where}: no rater, and other rows have one; name one in each row")
    if len(variants) > 1 and not row.get("variant"):
        raise UserError(f"{where}: no variant, and several were judged; name one in each row")
    return rater, (str(row.get("variant") or next(iter(variants), "")), row["prompt"])


def _one_spelling(spellings: dict[str, str], rater: str, where: str) -> None:
    """UserError for a name that differs from an earlier one in capitals, spaces or how its accents are encoded alone:
    one person would count as two, who agree with each other in all. spellings: a name without these -> as it came."""
    name = " ".join(unicodedata.normalize("NFKC", rater).casefold().split())
    earlier = spellings.setdefault(name, rater)
    if earlier != rater:
        raise UserError(
            f"{where}: rater {rater!a:.60}, earlier {earlier!a:.60}; expected one spelling of a name: one person would "
            "count as two"
        )


def read_label(text: object, name: str, where: str) -> int | None:
    """A person's label as the judge's scores have it; None for an empty cell."""
    word = "" if text is None else str(text).strip().lower()
    if word in NOT_LABELLED:
        return None
    word = YES_NO_OF_PANDAS.get(word, word) if LABELS[name] is YES_NO else word.removesuffix(".0")
    if word not in LABELS[name]:
        expected = "Yes or No" if LABELS[name] is YES_NO else "1 to 5"
        raise UserError(f"{where}: {name} is {text!r:.60}; expected {expected}")
    return LABELS[name][word]


def read_judged(path: Path) -> Labels:
    """The scores of eval.py judge: items.jsonl of its --out folder."""
    items = read_table(path, ["variant", "prompt"])
    labels: Labels = {}
    for number, item in enumerate(items, 1):
        wrong = [name for name in CRITERIA if item.get(name, "missing") not in (None, *LABELS[name].values())]
        if wrong or not isinstance(item["variant"], str):
            where = f"{', '.join(wrong)} of variant {item['variant']!r:.60}"
            raise UserError(f"{path} row {number}: {where} as eval.py judge does not write it; judge again")
        given = {name: int(item[name]) for name in CRITERIA if item[name] is not None}
        labels[item["variant"], item["prompt"]] = given
    return labels


# Rating files


def read_ratings(paths: Sequence[str | Path], key_path: str | Path) -> Ratings:
    """What raters exported from a rating page, with the variants that the page's key names. UserError names the file
    and the entry; a label or preference that a rater gives twice, in one file or in two, is one."""
    key = read_json(key_path)
    if not isinstance(key.get("page"), str):
        raise UserError(f"{key_path}: page is {key.get('page')!r:.40}; expected the name of the rating page")
    items = {str(name): _item(item, f"{key_path}: item {name}") for name, item in _mapping(key, key_path).items()}
    ratings, places, spellings = Ratings({}, []), {}, {}
    for path in paths:
        content = read_json(path)
        if content.get("page") != key["page"]:
            pages = f"of page {content.get('page')!r:.40}, and {key_path} of page {key['page']!r:.40}"
            raise UserError(f"{path}: {pages}; expected the key of the same page")
        _read_export(content, path, items, ratings, places, spellings)
    return ratings


def _read_export(
    content: dict,
    path: str | Path,
    items: Mapping[str, dict],
    ratings: Ratings,
    places: dict[tuple, str],
    spellings: dict[str, str],
) -> None:
    """Adds what one file holds to `ratings`. places: rater and what is labelled -> where that stands; spellings: as of
    `_one_spelling`."""
    rater = content.get("rater")
    if not isinstance(rater, str) or not rater.strip():
        raise UserError(f"{path}: rater is {rater!r:.60}; expected a name")
    _one_spelling(spellings, rater, str(path))
    swapped = _swapped(content, items, path)
    for number, entry in enumerate(_list(content, "ratings", path), 1):
        where = f"{path}: ratings {number}"
        item, side = _entry(entry, items, where), _one_of(entry, "side", SIDES, where)
        name = _one_of(entry, "criterion", CRITERIA, where)
        variant = _sides(item, str(entry["item"]) in swapped)[SIDES.index(side)]
        label = read_label(entry.get("value"), name, where)
        if label is not None:
            _once(places, (rater, variant, item["prompt"], name), where)
            ratings.labels.setdefault(rater, {}).setdefault((variant, item["prompt"]), {})[name] = label
    for number, entry in enumerate(_list(content, "preferences", path), 1):
        where = f"{path}: preferences {number}"
        item, choice = _entry(entry, items, where), _one_of(entry, "value", (*SIDES, TIE), where)
        sides = _sides(item, str(entry["item"]) in swapped)
        _once(places, (rater, frozenset(sides), item["prompt"]), where)
        ratings.preferences.append(Preference(rater, item["prompt"], *sides, choice))


def _mapping(key: dict, path: str | Path) -> dict:
    if not isinstance(key.get("items"), dict) or not key["items"]:
        items = f"items is {key.get('items')!r:.60}"
        raise UserError(f"{path}: {items}; expected an object, item -> prompt, left and right")
    return key["items"]


def _item(item: object, where: str) -> dict:
    names = ("prompt", *SIDES)
    if not isinstance(item, dict) or not all(isinstance(item.get(name), str) for name in names):
        raise UserError(f"{where}: {item!r:.60}; expected an object with {', '.join(names)}, all texts")
    return item


def _list(content: dict, name: str, path: str | Path) -> list:
    values = content.get(name, [])
    if not isinstance(values, list):
        raise UserError(f"{path}: {name} is {values!r:.60}; expected a list")
    return values


def _swapped(content: dict, items: Mapping[str, dict], path: str | Path) -> set[str]:
    """The items that this rater saw exchanged. One misread would give its labels to the other variant."""
    names = _list(content, "swapped", path)
    for number, name in enumerate(names, 1):
        _entry({"item": name}, items, f"{path}: swapped {number}")
    return set(map(str, names))


def _entry(entry: object, items: Mapping[str, dict], where: str) -> dict:
    """The item of the key that an entry is about."""
    name = entry.get("item") if isinstance(entry, dict) else None
    if str(name) not in items:
        raise UserError(f"{where}: item is {name!r:.60}, which the key does not have; expected one of its items")
    return items[str(name)]


def _one_of(entry: dict, name: str, values: Sequence[str], where: str) -> str:
    value = entry.get(name)
    if value not in values:
        raise UserError(f"{where}: {name} is {value!r:.60}; expected {', '.join(values)}")
    return value


def _sides(item: dict, swapped: bool) -> tuple[str, str]:
    """The variants on the left and on the right, as the rater saw them."""
    return (item["right"], item["left"]) if swapped else (item["left"], item["right"])


def _once(places: dict[tuple, str], what: tuple, where: str) -> None:
    if what in places:
        raise UserError(f"{where}: {what[0]} has said that already, in {places[what]}; expected every label once")
    places[what] = where
