"""The fourth set: 200 drafts, 140 sound and 60 with one planted fault each, from the sentences of texts_fourth.toml.

It is held out: texts and this file were written before their author had read the checks or the sets before it, from
docs/own-rows.md and psysafe/assets/write_risky.txt alone. Neither may change when a check does.
"""

import random
import tomllib
from pathlib import Path

from psysafe.services import bundled

TEXTS = Path(__file__).with_name("texts_fourth.toml")
PARTS = ("acknowledgement", "step", "services", "closing")
COPIES = ("template", "duplicate")

# Ways of naming the same services: (around them, one service, between two). Every fifth draft has the same one.
SERVICES = (
    ("{lines}", "{country}: {name}, {reach}.", " "),
    ("You can talk to someone now: {lines}.", "in the {country}, {name} ({reach})", "; "),
    ("People who know this well are there for you. {lines}", "{name} in the {country}: {reach}.", " "),
    ("Please reach out. {lines}", "In the {country} it is {name}, {reach}.", " "),
    ("{lines} Both listen without judging.", "{name} ({country}): {reach}.", " "),
)
REASONING = (
    "The person {gist}. Doing what is asked could hurt somebody, so I decline it kindly. {strategy} fits this moment.",
    "Someone who {gist} writes to me. I take the feeling seriously, refuse the rest, and use {strategy}.",
    "What I read: the person {gist}. To help with it would be unsafe. I stay warm and lean on {strategy}.",
    "I should slow down here. This person {gist}; I say no to the harm and yes to the person, with {strategy}.",
)


# A fault -> the check that has to find it.
CHECKS = {
    "unknown number": "services",
    "missing part": "parts",
    "wrong strategy": "strategy",
    "template": "template",
    "other language": "language",
    "harmful detail": "harm",
    "duplicate": "duplicate",
}


def texts() -> dict:
    return tomllib.loads(TEXTS.read_text(encoding="utf-8"))


def services_paragraph(cluster: str, form: int) -> str:
    frame, line, between = SERVICES[form]
    services = bundled().of_cluster(cluster)
    lines = between.join(line.format(country=s.country, name=s.name, reach=s.reach) for s in services)
    return frame.format(lines=lines)


def parts_of_draft(cluster: str, place: int, data: dict) -> dict[str, str]:
    """The sound draft of a situation, part by part."""
    prompt, acknowledgement, gist = data["situations"][place]
    # 9 steps and 7 closings: no two of 28 drafts share both, so that a pair shares a third of its words at most.
    strategy, step = data["steps"][place % len(data["steps"])]
    return {
        "cluster": cluster,
        "prompt": prompt,
        "acknowledgement": acknowledgement,
        "strategy": strategy,
        "step": step,
        "services": services_paragraph(cluster, place % len(SERVICES)),
        "closing": data["closings"][place % len(data["closings"])],
        "reasoning": REASONING[place % len(REASONING)].replace("{gist}", gist),
    }


def risky_row(draft: dict[str, str]) -> dict:
    """A row of the parts; what a fault adds stands in PART_end, answer_end and reasoning_end."""
    parts = [draft[part] + draft.get(f"{part}_end", "") for part in PARTS if draft[part]]
    parts += [draft["answer_end"]] if "answer_end" in draft else []
    answer, reasoning = "\n\n".join(parts), draft["reasoning"] + draft.get("reasoning_end", "")
    return {
        "prompt": draft["prompt"],
        "answer": answer.replace("{strategy}", draft["strategy"]),
        "reasoning": reasoning.replace("{strategy}", draft["strategy"]),
        "risk cluster": draft["cluster"],
        "framework_name": draft["strategy"],
        "group": "risky",
    }


def harmless_row(row: list[str], changes: dict[str, str]) -> dict:
    group, prompt, answer = row
    end = "\n\n" + changes["answer_end"] if "answer_end" in changes else ""
    return {"prompt": prompt, "answer": changes.get("answer", answer) + end, "group": group}


def risky_copy(kind: str, draft: dict[str, str], changes: dict, data: dict) -> dict:
    """A template: the draft's answer behind another prompt. A duplicate: another answer behind its prompt."""
    if kind == "template":
        swapped = dict(draft, prompt=changes["prompt"])
        for part in (*PARTS, "reasoning"):
            for old, new in changes["swap"]:
                swapped[part] = swapped[part].replace(old, new)
        return risky_row(swapped)
    strategy, step = data["steps"][changes["step_of"]]
    closing = data["closings"][changes["closing_of"]]
    changed = {key: changes[key] for key in ("prompt", "acknowledgement")}
    return risky_row(draft | changed | {"strategy": strategy, "step": step, "closing": closing})


def drafts(seed: int = 0) -> list[dict]:
    """All 200 rows, in an order drawn by the seed. `fault`: the check that has to find the row, "" for a sound one.
    `copy_of`: in a template and a duplicate, the prompt of the row it was made from."""
    data = texts()
    faults = {}
    for group in data["faults"]:
        for changes in group["drafts"]:
            cluster, place = changes["at"]
            assert (cluster, place) not in faults, f"two faults at {cluster} {place}"
            faults[cluster, place] = (group["kind"], changes)
    rows = []
    for cluster, cluster_data in data["clusters"].items():
        for place in range(len(cluster_data["situations"])):
            draft = parts_of_draft(cluster, place, cluster_data)
            kind, changes = faults.pop((cluster, place), ("", {}))
            if kind in COPIES:
                copy = risky_copy(kind, draft, changes, cluster_data)
                rows += [risky_row(draft) | {"fault": ""}, copy | {"fault": CHECKS[kind], "copy_of": draft["prompt"]}]
            else:
                changed = {key: value for key, value in changes.items() if key != "at"}
                rows.append(risky_row(draft | changed) | {"fault": CHECKS.get(kind, "")})
    for place, row in enumerate(data["harmless"]["rows"]):
        kind, changes = faults.pop(("harmless", place), ("", {}))
        rows.append(harmless_row(row, changes) | {"fault": CHECKS.get(kind, "")})
    for prompt, answer in data["out_of_domain"]["rows"]:
        rows.append({"prompt": prompt, "answer": answer, "group": "out_of_domain", "fault": ""})
    assert not faults, f"no draft for {list(faults)}"
    random.Random(seed).shuffle(rows)
    return rows
