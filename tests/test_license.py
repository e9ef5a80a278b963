"""The licence and how to cite: the verbatim Apache text, and one statement in every place that names a licence."""

import hashlib
import re
import tomllib
from pathlib import Path

import yaml

from psysafe.publish.__main__ import arguments
from psysafe.publish.card import ARXIV
from psysafe.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Of https://www.apache.org/licenses/LICENSE-2.0.txt.
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"

# What schema 1.2.0 of the Citation File Format demands, at the top and of a reference.
REQUIRED = {"cff-version", "message", "title", "authors"}
REQUIRED_OF_REFERENCE = {"type", "title", "authors"}
AUTHOR = {"name", "family-names", "given-names", "alias", "orcid", "affiliation", "website", "email"}


def faults(cff: dict) -> list[str]:
    """What of a CITATION.cff breaks the format's schema, of the parts that are used here."""
    wrong = [f"missing {key}" for key in REQUIRED - cff.keys()]
    wrong += [] if cff.get("cff-version") == "1.2.0" else ["cff-version"]
    wrong += [] if cff.get("type") in ("software", "dataset") else ["type"]
    for number, reference in enumerate(cff.get("references", [])):
        wrong += [f"reference {number}: missing {key}" for key in REQUIRED_OF_REFERENCE - reference.keys()]
    for work in [cff, *cff.get("references", [])]:
        authors = work.get("authors") or [{}]
        wrong += [f"author {author}" for author in authors if not author or not author.keys() <= AUTHOR]
    return wrong


def test_the_licence_is_the_verbatim_text():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE


def test_every_place_names_the_same_licence():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert PROJECT["license"] == cff["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert arguments().get_default("license") == "apache-2.0"  # the hub's spelling
    assert "[Apache-2.0](LICENSE)" in readme and "[CITATION.cff](CITATION.cff)" in readme


def test_the_citation_file_holds_to_its_format():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert not faults(cff)
    assert str(cff["version"]) == __version__ and cff["authors"] == [{"name": "The psysafe contributors"}]
    (paper,) = cff["references"]
    assert paper["identifiers"][0]["value"] == f"arXiv:{ARXIV}" and re.fullmatch(r"\d{4}\.\d{5}", ARXIV)
    assert paper["url"].endswith(ARXIV)


def test_a_broken_citation_file_is_seen():
    good = {"cff-version": "1.2.0", "message": "m", "type": "software", "title": "t", "authors": [{"name": "n"}]}
    assert not faults(good)
    for key in good:
        assert faults({name: value for name, value in good.items() if name != key}), key
    assert faults(good | {"authors": [{"first": "n"}]}) and faults(good | {"references": [{"title": "t"}]})
