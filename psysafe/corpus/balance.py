"""What a set of rows has too few of: groups, clusters, strategies, languages, contrast rows.

A value is thin with fewer than MIN_ROWS rows, or with less than MIN_OF_EVEN of an even share among those that it stands
beside: the clusters, the strategies of its cluster, the languages of the set. docs/own-rows.md has the rule.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from psysafe.corpus.common_text import shared_text
from psysafe.corpus.contacts import Services
from psysafe.corpus.draft_checks import GROUP, GROUPS, OUT_OF_DOMAIN, RISKY, group_of, strategies_in
from psysafe.corpus.texts import answer_of
from psysafe.data.languages import language_name, row_language
from psysafe.data.rows import CLUSTER, Row, read_file
from psysafe.files import clusters
from psysafe.training.config import DEFAULT_FILE, resolve

MIN_ROWS = 10  # a validation share of 0.1 holds one of ten rows on average, and of fewer less than one
MIN_OF_EVEN = 0.5  # of an even share: a convention
NO_LANGUAGES = (language_name(""), language_name(None))  # of texts in none that is known, and in an unknown one
RECIPES = ("tiny-selective.toml", "qwen3.5-27b-selective.toml")  # whose contrast_ratio is R
CONTRAST_ROWS = "assets:rows/contrast.jsonl"
CLUSTERS = "clusters of risky rows"  # not "clusters", as `stats` calls its counts of all rows
TABLES = {"groups": "group", CLUSTERS: "cluster of the risky rows", "strategies": "strategy of the risky rows",
          "languages": "language"}  # fmt: skip


class Count(NamedTuple):
    name: str
    rows: int
    expected: int  # fewest rows that are not thin; 0 for what no rule asks for

    @property
    def is_thin(self) -> bool:
        return self.rows < self.expected


class Contrast(NamedTuple):
    """How many harmless and out-of-domain rows stand beside the risky ones, and how many a recipe draws."""

    recipe: str  # file of configs/
    ratio: float  # its R: contrast rows for each training row
    wanted: int
    missing: int


class Balance(NamedTuple):
    tables: dict[str, list[Count]]  # by the keys of TABLES
    templates: int  # answers with more than half of their text in other rows, as `corpus check` counts them
    contrast: list[Contrast]
    out_of_domain_share: float | None  # share of out-of-domain rows among the harmless and out-of-domain ones
    bundled_out_of_domain_share: float  # the same of the bundled contrast rows


def count_balance(rows: Sequence[Row], services: Services) -> Balance:
    groups = Counter(_text(group_of(row.fields)) for row in rows)
    risky = [row for row in rows if group_of(row.fields) == RISKY]
    languages = Counter(_language(row) for row in rows)
    tables = {
        "groups": [*(Count(name, groups[name], MIN_ROWS) for name in GROUPS), *_others(groups, GROUPS)],
        CLUSTERS: _even(Counter(_text(row.fields.get(CLUSTER)) for row in risky), list(clusters()["clusters"])),
        "strategies": _strategies(risky),
        "languages": _even(languages, [name for name in languages if name not in NO_LANGUAGES]),
    }
    shared = shared_text([answer_of(row) for row in rows], services)
    beside = sum(groups[name] for name in GROUPS if name != RISKY)
    bundled = Counter(row.fields[GROUP] for row in read_file(CONTRAST_ROWS))
    return Balance(
        tables,
        sum(one.is_template for one in shared),
        [contrast_for(recipe, groups[RISKY], beside) for recipe in RECIPES],
        groups[OUT_OF_DOMAIN] / beside if beside else None,
        bundled[OUT_OF_DOMAIN] / bundled.total(),
    )


def contrast_for(recipe: str, n_risky: int, n_beside: int) -> Contrast:
    config, _ = resolve(["--config", str(DEFAULT_FILE.with_name(recipe))])
    wanted = round(config.contrast_ratio * n_risky)
    return Contrast(f"configs/{recipe}", config.contrast_ratio, wanted, max(0, wanted - n_beside))


def _strategies(risky: Sequence[Row]) -> list[Count]:
    """The strategies of each cluster, and what stands in their place."""
    counts = []
    for cluster, entry in clusters()["clusters"].items():
        found = Counter(_strategy(row) for row in risky if row.fields.get(CLUSTER) == cluster)
        counts += [count._replace(name=f"{cluster}: {count.name}") for count in _even(found, entry["strategies"])]
    return counts


def _even(found: Mapping[str, int], expected: Sequence[str]) -> list[Count]:
    """Every expected value with the fewest rows that are enough of it, then the others that were found."""
    even_share = sum(found.get(name, 0) for name in expected) / max(1, len(expected))
    fewest = max(MIN_ROWS, math.ceil(MIN_OF_EVEN * even_share))
    return [*(Count(name, found.get(name, 0), fewest) for name in expected), *_others(found, expected)]


def _others(found: Mapping[str, int], expected: Sequence[str]) -> list[Count]:
    return [Count(name, rows, 0) for name, rows in found.items() if name not in expected]


def _strategy(row: Row) -> str:
    """The row's own field, if that names a strategy (in the published rows it names a benchmark), else the first one
    that the answer names."""
    field = row.fields.get("framework_name")
    if isinstance(field, str) and field in clusters()["strategies"]:
        return field
    return next(iter(strategies_in(answer_of(row))), "none")


def _language(row: Row) -> str:
    """The code that the row's field says, or what function words show."""
    code = row_language(row.fields, answer_of(row))
    return code or language_name(code)


def _text(value: object) -> str:
    """A name for a value of a field that may hold anything."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def as_text(found: Balance, n_rows: int) -> str:
    lines = [f"balance; thin: fewer than {MIN_ROWS} rows, or less than {MIN_OF_EVEN:.0%} of an even share"]
    for key, title in TABLES.items():
        lines += ["", title]
        for count in found.tables[key]:
            thin = f"  thin: {count.expected:,} or more expected" if count.is_thin else ""
            lines.append(f"  {count.rows:>7,}  {count.rows / n_rows:>6.1%}  {count.name}{thin}")
    lines += ["", "harmless and out-of-domain rows, against the contrast rows that a recipe draws for the risky ones"]
    for one in found.contrast:
        missing = f", {one.missing:,} missing" if one.missing else ""
        lines.append(f"  {one.recipe}: R = {one.ratio:g}, {one.wanted:,} wanted{missing}")
    if found.out_of_domain_share is not None:
        bundled = f"of the bundled contrast rows {found.bundled_out_of_domain_share:.0%}"
        lines.append(f"  {found.out_of_domain_share:.0%} of them out of domain; {bundled}")
    return "\n".join(lines)


def as_json(found: Balance) -> dict:
    tables = {
        key: [count._asdict() | {"thin": count.is_thin} for count in counts] for key, counts in found.tables.items()
    }
    shares = {name: getattr(found, name) for name in ("out_of_domain_share", "bundled_out_of_domain_share")}
    return {**tables, "contrast": [one._asdict() for one in found.contrast], **shares}
