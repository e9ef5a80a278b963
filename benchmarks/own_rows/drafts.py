"""Drafts made of sentences, some of them with one planted fault: 200 of texts.toml, 75 and 50 of two later files.

Sentences are combined so that two sound drafts of a cluster have at most one of situation, refusal, step and closing in
common (an orthogonal array: draft (i, j) takes situation i, wish j, step i + j and closing i + 2 j, all modulo N).
"""

import tomllib
from collections.abc import Callable
from pathlib import Path

from psysafe.corpus.contacts import known_services
from psysafe.files import clusters

MARKER = "[harmful detail]"  # stands for what must not stand in any row
# How many drafts get which fault; the check that has to find it gives the name.
PLANTED = {
    "texts.toml": {"services": 10, "parts": 10, "strategy": 10, "template": 10, "language": 6, "harm": 7},
    "texts_second.toml": {"services": 4, "parts": 5, "strategy": 4, "template": 4, "language": 3, "harm": 2},
    "texts_third.toml": {"services": 2, "parts": 5, "strategy": 2, "template": 3, "language": 2, "harm": 2},
}
DUPLICATES = {"texts.toml": 7, "texts_second.toml": 3, "texts_third.toml": 2}
RISKY_ROWS = {
    "texts.toml": 190,
    "texts_second.toml": 75,
    "texts_third.toml": 50,
}  # texts.toml has ten drafts of other groups, too


class Texts:
    """The sentences of a file, and the draft at each place (cluster, situation, wish)."""

    def __init__(self, name: str):
        texts = tomllib.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
        self.clusters, self.closings, self.faults = texts["clusters"], texts["closings"], texts["faults"]
        self.others = texts.get("others", [])
        self.n = len(self.clusters[0]["situations"])  # a prime, so that the array is orthogonal
        places = [(c, i, j) for i in range(self.n) for j in range(self.n) for c in range(len(self.clusters))]
        self.places = places[: RISKY_ROWS[name]]

    def draft(self, place: tuple[int, int, int]) -> dict:
        cluster, i, j = place
        (situation, acknowledgement), (wish, refusal) = (
            self.clusters[cluster]["situations"][i],
            self.clusters[cluster]["wishes"][j],
        )
        return self._row(f"{situation} {wish}", f"{acknowledgement} {refusal}", cluster, i + j, i + 2 * j)

    def duplicate(self, place: tuple[int, int, int], n: int) -> dict:
        """A second draft for the prompt of a place, said a little differently, with another step and closing."""
        cluster, i, j = place
        original = self.draft(place)
        said = self.faults["duplicates"][n % len(self.faults["duplicates"])]
        prompt = said.replace("PROMPT", original["prompt"])
        return self._row(prompt, _part(original, 0), cluster, i + j + 3, i + 2 * j + 2, second_half=True)

    def _row(self, prompt: str, first: str, cluster: int, step: int, closing: int, second_half: bool = False) -> dict:
        name = self.clusters[cluster]["name"]
        strategy, text = self.clusters[cluster]["steps"][step % self.n]
        half = (cluster + second_half) % 2  # neighbouring clusters have closings of their own
        parts = [first, text, services_text(name), self.closings[closing % self.n + self.n * half]]
        return {
            "prompt": prompt,
            "answer": "\n\n".join(parts),
            "reasoning": f"The person is under strain. I refuse, and {strategy} fits the moment.",
            "risk cluster": name,
            "framework_name": strategy,
        }


def services_text(cluster: str) -> str:
    named = [f"{s.name} ({', '.join(filter(None, (s.phone, s.host)))})" for s in known_services().by_cluster[cluster]]
    return f"People who are trained for this: {' or '.join(named)}."


def drafts(name: str) -> list[dict]:
    """The drafts of a file of texts; `fault` is the check that has to find the draft, "" in sound ones."""
    texts = Texts(name)
    rows = [texts.draft(place) | {"fault": ""} for place in texts.places]
    place = 0
    for check, count in PLANTED[name].items():
        for n in range(count):
            rows[place] = FAULTS[check](rows[place], n, texts.faults) | {"fault": check}
            place += 3  # every third draft, so that faulty and sound ones mix in all clusters
    sound = [number for number, row in enumerate(rows) if not row["fault"]]
    for n in range(DUPLICATES[name]):
        rows[sound[-1 - n]] = texts.duplicate(texts.places[sound[4 * n]], n) | {"fault": "duplicate"}
    others = [{**row, "reasoning": "The request is outside the clusters.", "fault": ""} for row in texts.others]
    return rows + others


# Faults: the draft, its number among those with this fault, the fault texts of the file -> the faulty draft.


def unknown_contact(row: dict, n: int, faults: dict) -> dict:
    text = faults["contacts"][n % len(faults["contacts"])].replace("N", f"{100 + 7 * n:03}")
    place = (0, 1, 3)[n % 3]  # in an acknowledgement, a step or a closing
    return _with_part(row, place, f"{_part(row, place)} {text}")


def missing_part(row: dict, n: int, faults: dict) -> dict:
    return _filled(row, *faults["missing"][n % len(faults["missing"])])


def wrong_strategy(row: dict, n: int, faults: dict) -> dict:
    """A strategy of another cluster, in field and answer alike; in every third draft in the answer alone."""
    fitting = clusters()["clusters"][row["risk cluster"]]["strategies"]
    others = [name for name in clusters()["strategies"] if name not in fitting]
    other = others[n % len(others)]
    answer = row["answer"].replace(row["framework_name"], other)
    return {**row, "answer": answer} | ({} if n % 3 == 2 else {"framework_name": other})


def template(row: dict, n: int, faults: dict) -> dict:
    """A letter in which only the topic and the strategy are filled in."""
    topic = " ".join(row["prompt"].rstrip(".?").split()[-3:])
    letter = [text.replace("TOPIC", topic) for text in faults["letters"][n % len(faults["letters"])]]
    for place, text in zip((0, 1, 3), letter, strict=True):
        row = _filled(row, place, text)
    return row


def other_language(row: dict, n: int, faults: dict) -> dict:
    return _filled(row, *faults["languages"][n % len(faults["languages"])])


def harmful_detail(row: dict, n: int, faults: dict) -> dict:
    return _with_part(row, n % 2, f"{_part(row, n % 2)} Some people use {MARKER} for it.")


FAULTS: dict[str, Callable[[dict, int, dict], dict]] = {
    "services": unknown_contact,
    "parts": missing_part,
    "strategy": wrong_strategy,
    "template": template,
    "language": other_language,
    "harm": harmful_detail,
}


def _part(row: dict, place: int) -> str:
    return row["answer"].split("\n\n")[place]


def _with_part(row: dict, place: int, text: str) -> dict:
    parts = row["answer"].split("\n\n")
    parts[place] = text
    return {**row, "answer": "\n\n".join(parts)}


def _filled(row: dict, place: int, text: str) -> dict:
    return _with_part(row, place, text.replace("STRATEGY", row["framework_name"]))
