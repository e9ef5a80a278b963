"""The text of the paper in miniature: what the tiny base reads, and the sample rows that fine-tune and validate it.

Everything is a pure function of a seed and of the word lists, which are data (the TOML files that words.py reads). Only
`random.Random`'s integer draws, choices and shuffles are used, so every Python version writes the same text.
"""

import hashlib
import itertools
import json
import random
import re

from . import support, wide
from .wide import Prompt
from .words import ASSETS, BENIGN, CATEGORIES, GROUPS, RISK, VARIATION, Category

SEED = 3407
PEOPLE = RISK["people"]
SYSTEM_V0 = (ASSETS / "system_v0.txt").read_text(encoding="utf-8").strip()


def benign_questions(wording: str, allowed=lambda group, item: True):
    """Yields (prompt, reasoning, answer, subject) of the ordinary questions in one set of wording."""
    for name, group in GROUPS.items():
        for item, answer in group.items.items():
            if allowed(name, item):
                # The reasoning names the item, so that the answer only has to look up the word just written.
                reasoning = f"This is a question about {group.subject}: {item}. I will answer it."
                for frame in group.frames[wording]:
                    yield _sentence(frame.format(item)), reasoning, answer, group.subject


def _things(category: Category) -> list[str]:
    """Prompts that say no more than what the wish is about (base only)."""
    things = []
    for thing in category.things:
        people = PEOPLE["base"][:4] if "{who}" in thing else ("",)
        things += [thing.format(who=person) for person in people]
    return [_sentence(frame.format(thing)) for thing in things for frame in RISK["thing_frames"]]


def _risky_prompts(category: Category, wording: str) -> tuple[list[str], list[str]]:
    """(whole prompts, prompts made of a frame and a wish) of one category in one set of wording."""
    wishes = []
    for ask in category.asks[wording]:
        people = PEOPLE[wording] if "{who}" in ask else ("",)
        wishes += [ask.format(who=person) for person in people]
    return list(category.says[wording]), [frame.format(wish) for wish in wishes for frame in RISK["frames"][wording]]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _reasoning(category: Category, gentle: bool) -> str:
    start = f"This is about {category.name}. I will refuse"
    return f"{start} gently and use {category.strategy}." if gentle else f"{start}."


def four_parts(category: Category) -> str:
    """The supportive refusal: acknowledgement and refusal, a step, services, hope; one paragraph each."""
    acknowledgement = f"{category.feeling} I can't help with {category.harm}, but {category.care}."
    return "\n\n".join((acknowledgement, category.step, support.services(category.cluster), category.closing))


# Of 40 documents, how many come from a stream. Refusals are two in five: a base that refuses more often takes a
# stranger's words for a risk, one that refuses less often answers a risky wish that it has not read.
SCHEDULE = {
    "ordinary": 3,
    "scary": 6,
    "scary lists": 4,
    "plain": 5,
    "plain lists": 4,
    "sums": 1,
    "law": 1,
    "support": 3,
    "risky": 7,
    "out of domain": 6,
}


def base_prompts() -> dict[str, dict[str, list[Prompt]]]:
    """Stream (a key of SCHEDULE) -> kind -> every prompt of that kind that the base can read.

    The kinds of a stream are read equally often, whether they have many prompts or few. A prompt that shares five words
    in a row with the sample rows is left out.
    """
    streams = {
        "ordinary": {
            name: [question[:3] for question in benign_questions("base", lambda group, item, name=name: group == name)]
            for name in GROUPS
        },
        "scary": wide.written("scary"),
        "scary lists": wide.answered("scary"),
        "plain": wide.written("plain"),
        "plain lists": wide.answered("plain"),
        "sums": wide.sums(),
        "law": wide.law(),
        "support": {"all": [question[:3] for question in (*support.questions("base"), *support.terms())]},
        "risky": _risky_kinds(),
        "out of domain": wide.out_of_domain(),
    }
    rows = set().union(*(word_runs(row["prompt"]) for row in (*training_rows(), *validation_rows())))
    return {
        stream: {kind: [p for p in prompts if rows.isdisjoint(word_runs(p[0]))] for kind, prompts in kinds.items()}
        for stream, kinds in streams.items()
    }


def _risky_kinds() -> dict[str, list[Prompt]]:
    kinds = {}
    wide_risky = wide.risky()
    for category in itertools.chain.from_iterable(CATEGORIES.values()):
        whole, framed = _risky_prompts(category, "base")
        texts = {"said": whole, "framed": framed, "things": _things(category)}
        for kind, prompts in wide_risky[category.name].items():
            texts.setdefault(kind, []).extend(prompts)
        reasoning, answer = _reasoning(category, gentle=False), f"I can't help with {category.harm}."
        for kind, prompts in texts.items():
            kinds[f"{category.name}, {kind}"] = [(prompt, reasoning, answer) for prompt in prompts]
    return kinds


def _with_circumstances(prompt: str, refused: bool, rng: random.Random) -> str:
    """The prompt, at times with a person, a place or a reason before it or after it."""
    if rng.randrange(8) == 0:
        lead = rng.choice(VARIATION["leads"]).format(who=rng.choice(PEOPLE["base"]))
        prompt = f"{_sentence(lead)} {prompt if re.match('I |[A-Z][A-Z]', prompt) else prompt[0].lower() + prompt[1:]}"
    if rng.randrange(8 if refused else 16) == 0:
        tail = rng.choice(VARIATION["tails"]).format(who=rng.choice(PEOPLE["base"]))
        prompt = f"{prompt.rstrip('?.')}{tail}{prompt[-1] if prompt[-1] in '?.' else '.'}"
    return prompt


def _as_typed(prompt: str, rng: random.Random) -> str:
    """The prompt as people type it: with sentences around it, with contractions, in a hurry, or without capitals."""
    if rng.randrange(8) == 0:
        prompt = " ".join(word for word in prompt.split() if word not in VARIATION["skipped"] or rng.randrange(2))
    if rng.randrange(3) == 0:
        for long, short in VARIATION["contractions"].items():
            prompt = prompt.replace(long, short)
    if rng.randrange(10) == 0:
        prompt = f"{rng.choice(VARIATION['contexts'])} {prompt}"
    if rng.randrange(10) == 0:
        prompt = f"{prompt} {rng.choice(VARIATION['closers'])}"
    return prompt.lower().rstrip("?.") if rng.randrange(6) == 0 else prompt


def base_documents(count: int, seed: int = SEED):
    """Yields `count` conversations (lists of messages, as the chat template takes them) for the base to read.

    The prompts of a kind come in shuffled rounds, so every prompt is read about equally often. Two documents in five
    have the plain system prompt, one in eight has no reasoning, one in twelve has two turns.
    """
    rng = random.Random(seed)
    prompts = base_prompts()
    kinds = {stream: itertools.cycle(by_kind) for stream, by_kind in prompts.items()}
    waiting: dict[tuple[str, str], list[Prompt]] = {}  # stream, kind -> prompts of its round that are still to be read
    schedule = [stream for stream, count in SCHEDULE.items() for _ in range(count)]

    def turn(stream: str, with_reasoning: bool) -> list[dict]:
        kind = next(kinds[stream])
        if not waiting.get((stream, kind)):
            waiting[stream, kind] = list(prompts[stream][kind])
            rng.shuffle(waiting[stream, kind])
        prompt, reasoning, answer = waiting[stream, kind].pop()
        # Half of the refusals use one wording, so that greedy answers use it, too.
        if stream == "risky":
            usual, *others = RISK["blunt"]
            answer = (usual, usual, answer, rng.choice(others))[rng.randrange(4)]
        elif stream == "out of domain":
            usual, *others = RISK["blunt_with_reason"]
            answer = (usual, rng.choice(others))[rng.randrange(2)].format(answer)
        reply = {"role": "assistant", "content": answer, "reasoning_content": reasoning if with_reasoning else ""}
        prompt = _with_circumstances(prompt, stream in ("risky", "out of domain"), rng)
        return [{"role": "user", "content": _as_typed(prompt, rng)}, reply]

    for index in range(count):
        if index % len(schedule) == 0:
            rng.shuffle(schedule)
        messages = [{"role": "system", "content": SYSTEM_V0}] if rng.randrange(5) < 2 else []
        with_reasoning = rng.randrange(8) > 0
        if rng.randrange(12) == 0:
            messages += turn("ordinary", with_reasoning)
        yield messages + turn(schedule[index % len(schedule)], with_reasoning)


def digest() -> str:
    """SHA-256 of the first documents that the base reads. The weights' file carries it, so that a test notices weights
    that were trained on another text."""
    documents = json.dumps(list(base_documents(20_000)), sort_keys=True)
    return hashlib.sha256(documents.encode()).hexdigest()


def _row(prompt, answer, reasoning, cluster, category, framework) -> dict[str, str]:
    return {
        "prompt": prompt,
        "answer": answer,
        "reasoning": reasoning,
        "risk cluster": cluster,
        "risk category": category,
        "framework_name": framework,
        "author": "psysafe",
    }


def _risky_row(prompt: str, category: Category) -> dict[str, str]:
    reasoning = _reasoning(category, gentle=True)
    return _row(prompt, four_parts(category), reasoning, category.cluster, category.name, category.strategy)


def _benign_row(prompt: str, reasoning: str, answer: str, subject: str) -> dict[str, str]:
    return _row(prompt, answer, reasoning, "benign", subject, "none")


def _ask_evenly(rng: random.Random, category: Category, count: int) -> list[str]:
    """`count` prompts of the training wording: every whole prompt, then framed ones that differ in wish and frame."""
    whole, framed = _risky_prompts(category, "train")
    frames = len(RISK["frames"]["train"])
    wishes = [framed[i : i + frames] for i in range(0, len(framed), frames)]
    rng.shuffle(wishes)
    first = rng.randrange(frames)
    rest = range(count - len(whole))
    # 3 is prime to the 11 frames: neighbours in the list differ in wish and in frame.
    return whole[:count] + [wishes[k % len(wishes)][(first + 3 * k + k // len(wishes)) % frames] for k in rest]


def training_rows(per_cluster: int = 40, seed: int = SEED) -> list[dict[str, str]]:
    """The sample rows: `per_cluster` for each of the five clusters and as many benign ones, shuffled."""
    rng = random.Random(seed + 1)
    rows = []
    for categories in CATEGORIES.values():
        for place, category in enumerate(categories):
            share = per_cluster // len(categories) + (place < per_cluster % len(categories))
            rows += [_risky_row(prompt, category) for prompt in _ask_evenly(rng, category, share)]
    held_out = BENIGN["validation"].items()
    helpful = list(support.questions("train"))
    rng.shuffle(helpful)
    rows += [_benign_row(*question) for question in helpful[: per_cluster // 4]]
    ordinary = list(benign_questions("train", lambda group, item: (group, item) not in held_out))
    rng.shuffle(ordinary)
    subjects = [group.subject for group in GROUPS.values()]
    by_subject = [[question for question in ordinary if question[3] == subject] for subject in subjects]
    for k in range(per_cluster - per_cluster // 4):
        rows.append(_benign_row(*by_subject[k % len(by_subject)].pop()))
    rng.shuffle(rows)
    return rows


def validation_rows() -> list[dict[str, str]]:
    """Fifty rows: eight risky prompts a cluster, each written by hand, and ten benign questions."""
    rows = []
    for category in itertools.chain.from_iterable(CATEGORIES.values()):
        rows += [_risky_row(prompt, category) for prompt in category.says["val"]]
    for chosen in BENIGN["validation"].items():
        questions = benign_questions("val", lambda group, item, chosen=chosen: (group, item) == chosen)
        rows += [_benign_row(*question) for question in questions]
    return rows


def word_runs(text: str, length: int = 5) -> set[tuple[str, ...]]:
    """Every run of `length` words in `text`, in lower case without punctuation."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
