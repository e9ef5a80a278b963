"""Prompts of many kinds for the base alone: answered ones, risky ones, and ones that are refused for another reason.

Where the clusters and benign.toml are read closely (every wish in every sentence), this text is read widely: thousands
of wordings by several authors, so that the base understands a stranger's words. The folder next/ has prompts in the
same format that the committed base has not read: with them it would have to be trained again.
"""

import itertools
import json
import re

from .words import BENIGN, FOLDER, RISK, VARIATION, read

REFUSED, ANSWERED = read(FOLDER / "wishes_refused.toml"), read(FOLDER / "wishes_answered.toml")
TEXT = [
    json.loads(line)
    for path in sorted((FOLDER / "text").glob("*.jsonl"))
    for line in path.read_text(encoding="utf-8").splitlines()
]
Prompt = tuple[str, str, str]  # prompt, reasoning, answer
FRAMES_OF_A_WISH = 3  # of the many sentences in VARIATION["wish_frames"]
LAW = "It is against the law because it harms people. The police or an advice centre can tell you more."


def expand(text: str) -> list[str]:
    """Every text that [a|b] stands for: "[a|b] c" -> ["a c", "b c"]."""
    parts = [part.split("|") for part in re.split(r"\[(.*?)\]", text)]
    return ["".join(choice).strip() for choice in itertools.product(*parts)]


def wordings(wishes: dict[str, list[str]]) -> dict[str, list[str]]:
    """Kind -> prompts of one topic: "said" (whole prompts) and "framed" (its asks and things in sentences)."""
    people, frames = RISK["people"]["base"], VARIATION["wish_frames"]
    asks = [ask for pattern in wishes.get("asks", ()) for ask in expand(pattern)]
    # 7 is prime to the number of frames: neighbours in the list differ in frame.
    framed = [
        _sentence(frames[(FRAMES_OF_A_WISH * i + 7 * k) % len(frames)], ask)
        for i, ask in enumerate(asks)
        for k in range(FRAMES_OF_A_WISH)
    ]
    framed += [
        _sentence(frame, thing.format(who=people[i % len(people)]))
        for thing in wishes.get("things", ())
        for i, frame in enumerate(RISK["thing_frames"])
    ]
    return {"said": list(wishes["says"])} | ({"framed": framed} if framed else {})


def _sentence(frame: str, item: str) -> str:
    text = frame.format(item)
    return text[0].upper() + text[1:] if frame.startswith("{") else text


def risky() -> dict[str, dict[str, list[str]]]:
    """Category -> kind -> prompts."""
    kinds = {category: wordings(wishes) for category, wishes in REFUSED["risky"].items()}
    for entry in TEXT:
        if entry["group"] == "risky":
            kinds[entry["category"]]["said"].extend(entry["prompts"])
    return kinds


def out_of_domain() -> dict[str, list[Prompt]]:
    """Kind -> prompts that are refused for a reason outside the risk clusters; the class stands for the answer."""
    kinds = {name: wordings(wishes) for name, wishes in REFUSED["out_of_domain"].items()}
    for entry in TEXT:
        if entry["group"] == "out_of_domain":
            kinds[entry["class"]]["said"].extend(entry["prompts"])
    return {
        f"{name}, {kind}": [(prompt, f"This is about {name}. I will refuse.", name) for prompt in prompts]
        for name, by_kind in kinds.items()
        for kind, prompts in by_kind.items()
    }


def answered(group: str) -> dict[str, list[Prompt]]:
    """Kind -> the harmless prompts of a group, "scary" or "plain", that stand in lists."""
    return {
        f"{topic}, {kind}": [(prompt, _plan(topic), wishes["answer"]) for prompt in prompts]
        for topic, wishes in ANSWERED[group].items()
        for kind, prompts in wordings(wishes).items()
    }


def written(group: str) -> dict[str, list[Prompt]]:
    """The harmless prompts of a group, "scary" or "plain", that stand in files: one kind."""
    entries = [entry for entry in TEXT if entry["group"] == group]
    return {group: [(prompt, _plan(e["topic"]), e["answer"]) for e in entries for prompt in e["prompts"]]}


def sums() -> dict[str, list[Prompt]]:
    """Additions, subtractions and multiplications of small numbers, in words and in signs."""
    results = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}
    signs = {"plus": ("plus", "+"), "minus": ("minus", "-"), "times": ("times", "x", "*")}
    largest = {"plus": 20, "minus": 20, "times": 10}
    frames = BENIGN["wording"]["sums"]["base"]
    kinds = {}
    for name, result in results.items():
        numbers = range(1, largest[name] + 1)
        pairs = [(a, b) for a in numbers for b in numbers if name != "minus" or a >= b]
        kinds[name] = [
            (frames[(a + b + i) % len(frames)].format(f"{a} {sign} {b}"),
             f"This is a question about maths: {a} {name} {b}. I will answer it.",
             f"{a} {name} {b} is {result(a, b)}.")
            for a, b in pairs for i, sign in enumerate(signs[name])
        ]  # fmt: skip
    return kinds


def law() -> dict[str, list[Prompt]]:
    """Questions of somebody who wants to know about what is forbidden, or to be safe from it: they are answered."""
    return {
        name: [
            (frame.format(thing), _plan(f"the law: {name}"), LAW)
            for thing in wishes["things"]
            for frame in VARIATION["law_frames"]
        ]
        for name, wishes in REFUSED["out_of_domain"].items()
    }


def _plan(topic: str) -> str:
    return f"This is a question about {topic}. I will answer it."
