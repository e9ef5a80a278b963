"""The word lists of the tiny corpus, read from the TOML files beside this module. Each file explains its lists."""

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the tools are run by their path

from psysafe.services import bundled

FOLDER = Path(__file__).resolve().parent
ASSETS = FOLDER.parents[1] / "psysafe" / "assets"


def read(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Category:
    """One risk category of a cluster, and the parts of the answers to it; risk.toml explains the fields.

    asks and says: set of wording ("base", "train", "val") -> verb phrases, whole prompts.
    """

    cluster: str
    care: str
    closing: str
    name: str
    harm: str
    strategy: str
    feeling: str
    step: str
    things: list[str]
    asks: dict[str, list[str]]
    says: dict[str, list[str]]


@dataclass(frozen=True)
class Group:
    """Benign questions of one kind; benign.toml explains the fields.

    frames: set of wording -> sentences around an item; items: what is asked about -> the answer.
    """

    subject: str
    frames: dict[str, list[str]]
    items: dict[str, str]


def read_categories() -> dict[str, list[Category]]:
    """Cluster -> its categories. Both are in the order of psysafe/assets/clusters.toml, on which the text depends."""
    categories = {}
    for path in (FOLDER / "clusters").glob("*.toml"):
        table = read(path)
        shared = {key: table[key] for key in ("cluster", "care", "closing")}
        categories[table["cluster"]] = [Category(**shared, **category) for category in table["category"]]
    return {cluster: categories[cluster] for cluster in CLUSTERS["clusters"]}


def read_groups() -> dict[str, Group]:
    groups = {}
    for name, table in BENIGN["group"].items():
        groups[name] = Group(table["subject"], BENIGN["wording"][table["wording"]], table["items"])
    return groups


# Clusters, strategies and services. No other file holds a phone number or a web address.
CLUSTERS, SERVICES = read(ASSETS / "clusters.toml"), bundled()
BENIGN, RISK = read(FOLDER / "benign.toml"), read(FOLDER / "risk.toml")
SUPPORT, VARIATION = read(FOLDER / "support.toml"), read(FOLDER / "variation.toml")
CATEGORIES, GROUPS = read_categories(), read_groups()
