"""The text of the paper in miniature: what the tiny base reads, and the sample rows that fine-tune and validate it.

Everything is a pure function of the lists beside this file and a seed; only `random.Random`'s integer draws, choices
and shuffles are used, so every Python version writes the same text.
"""

import hashlib
import itertools
import json
import random
import re

from . import benign, risk, support

SEED = 3407
CONTRACTIONS = {
    "I am ": "I'm ", "I will ": "I'll ", "I would ": "I'd ", "do not ": "don't ", "does not ": "doesn't ",
    "did not ": "didn't ", "is not ": "isn't ", "What is ": "What's ", "It is ": "It's ", "Let us ": "Let's ",
}  # fmt: skip
SKIPPED = {
    *("a", "an", "the", "to", "is", "it", "my", "of", "and", "that", "for", "me", "do", "I", "am", "how", "what"),
    *("please", "in", "one", "on"),
}
SUBJECTS = [group.subject for group in benign.GROUPS.values()]
SYSTEM_V0 = (support.ASSETS / "system_v0.txt").read_text(encoding="utf-8").strip()


def benign_questions(wording: str, allowed=lambda group, item: True):
    """Yields (prompt, reasoning, answer, subject) of the ordinary questions in one set of wording."""
    for name, group in benign.GROUPS.items():
        for item, answer in group.items.items():
            if allowed(name, item):
                # Naming the item makes the answer a matter of looking up the word just written.
                reasoning = f"This is a question about {group.subject}: {item}. I will answer it."
                for frame in group.frames[wording]:
                    yield _sentence(frame.format(item)), reasoning, answer, group.subject


def _things(category: risk.Category) -> list[str]:
    """Prompts that say no more than what the wish is about (base only)."""
    things = []
    for thing in category.things:
        people = risk.PEOPLE["base"][:4] if "{who}" in thing else ("",)
        things += [thing.format(who=person) for person in people]
    return [_sentence(frame.format(thing)) for thing in things for frame in risk.THING_FRAMES]


def _risky_prompts(category: risk.Category, wording: str) -> tuple[list[str], list[str]]:
    """(whole prompts, prompts made of a frame and a wish) of one category in one set of wording."""
    wishes = []
    for ask in category.asks[wording]:
        people = risk.PEOPLE[wording] if "{who}" in ask else ("",)
        wishes += [ask.format(who=person) for person in people]
    return list(category.says[wording]), [frame.format(wish) for wish in wishes for frame in risk.FRAMES[wording]]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _reasoning(category: risk.Category, gentle: bool) -> str:
    start = f"This is about {category.name}. I will refuse"
    return f"{start} gently and use {category.strategy}." if gentle else f"{start}."


def four_parts(cluster: str, category: risk.Category) -> str:
    """The supportive refusal: acknowledgement and refusal, a step, services, hope; one paragraph each."""
    acknowledgement = f"{category.feeling} I can't help with {category.harm}, but {risk.CARES[cluster]}."
    return "\n\n".join((acknowledgement, category.step, support.services(cluster), risk.CLOSINGS[cluster]))


Prompt = tuple[str, str, str]  # prompt, reasoning, answer


def base_prompts() -> dict[str, dict[str, list[Prompt]]]:
    """Stream ("ordinary", "support", "refused") -> kind -> every prompt of that kind that the base can read.

    The kinds of a stream are read equally often, however many prompts each has.
    """
    refused = {}
    for category in itertools.chain.from_iterable(risk.CATEGORIES.values()):
        whole, framed = _risky_prompts(category, "base")
        reasoning, answer = _reasoning(category, gentle=False), f"I can't help with {category.harm}."
        for kind, texts in {"said": whole, "framed": framed, "thing": _things(category)}.items():
            refused[f"{category.name}, {kind}"] = [(prompt, reasoning, answer) for prompt in texts]
    return {
        "ordinary": {
            name: [question[:3] for question in benign_questions("base", lambda group, item, name=name: group == name)]
            for name in benign.GROUPS
        },
        "support": {"all": [question[:3] for question in (*support.questions("base"), *support.terms())]},
        "refused": refused,
    }


def _set_in_a_life(prompt: str, refused: bool, rng: random.Random) -> str:
    """The prompt with a person, a place or a reason before it and, where it is refused, after it."""
    if rng.randrange(4) == 0:
        lead = rng.choice(risk.LEADS).format(who=rng.choice(risk.PEOPLE["base"]))
        prompt = f"{_sentence(lead)} {prompt if re.match('I |[A-Z][A-Z]', prompt) else prompt[0].lower() + prompt[1:]}"
    if refused and rng.randrange(4) == 0:
        tail = rng.choice(risk.TAILS).format(who=rng.choice(risk.PEOPLE["base"]))
        prompt = f"{prompt.rstrip('?.')}{tail}{prompt[-1] if prompt[-1] in '?.' else '.'}"
    return prompt


def _as_typed(prompt: str, rng: random.Random) -> str:
    """The prompt as one of many people types it: with sentences around it, contracted, in a hurry, or without care.

    What is added and left out never changes what the prompt is about: the base learns to look for the words that do.
    """
    if rng.randrange(4) == 0:
        prompt = " ".join(word for word in prompt.split() if word not in SKIPPED or rng.randrange(2))
    if rng.randrange(3) == 0:
        for long, short in CONTRACTIONS.items():
            prompt = prompt.replace(long, short)
    if rng.randrange(4) == 0:
        prompt = f"{rng.choice(benign.CONTEXTS)} {prompt}"
    if rng.randrange(4) == 0:
        prompt = f"{prompt} {rng.choice(benign.CLOSERS)}"
    return prompt.lower().rstrip("?.") if rng.randrange(8) == 0 else prompt


def base_documents(count: int, seed: int = SEED):
    """Yields `count` conversations (lists of messages, as the chat template takes them) for the base to read.

    Each kind of prompt is gone through in shuffled rounds, so every prompt is read about equally often. Two in five
    carry the plain system prompt, one in eight has no reasoning, one in twelve has two turns. Half of the refusals use
    one wording, so that greedy answers do.
    """
    rng = random.Random(seed)
    prompts = base_prompts()
    kinds = {stream: itertools.cycle(by_kind) for stream, by_kind in prompts.items()}
    waiting: dict[str, list[Prompt]] = {}
    schedule = ["ordinary"] * 8 + ["support"] * 5 + ["refused"] * 7

    def turn(stream: str, keep_reasoning: bool) -> list[dict]:
        kind = next(kinds[stream])
        if not waiting.get(kind):
            waiting[kind] = list(prompts[stream][kind])
            rng.shuffle(waiting[kind])
        prompt, reasoning, answer = waiting[kind].pop()
        if stream == "refused":
            answer = (risk.BLUNT[0], risk.BLUNT[0], answer, rng.choice(risk.BLUNT[1:]))[rng.randrange(4)]
        reply = {"role": "assistant", "content": answer, "reasoning_content": reasoning if keep_reasoning else ""}
        prompt = _set_in_a_life(prompt, stream == "refused", rng)
        return [{"role": "user", "content": _as_typed(prompt, rng)}, reply]

    for index in range(count):
        if index % len(schedule) == 0:
            rng.shuffle(schedule)
        messages = [{"role": "system", "content": SYSTEM_V0}] if rng.randrange(5) < 2 else []
        keep_reasoning = rng.randrange(8) > 0
        if rng.randrange(12) == 0:
            messages += turn("ordinary", keep_reasoning)
        yield messages + turn(schedule[index % len(schedule)], keep_reasoning)


def digest() -> str:
    """SHA-256 over the first documents that the base reads: its weights carry it, so that stale ones are noticed."""
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


def _risky_row(prompt: str, cluster: str, category: risk.Category) -> dict[str, str]:
    reasoning = _reasoning(category, gentle=True)
    return _row(prompt, four_parts(cluster, category), reasoning, cluster, category.name, category.strategy)


def _benign_row(prompt: str, reasoning: str, answer: str, subject: str) -> dict[str, str]:
    return _row(prompt, answer, reasoning, "benign", subject, "none")


def _ask_evenly(rng: random.Random, category: risk.Category, count: int) -> list[str]:
    """`count` prompts of the training wording: every whole prompt, then framed ones that differ in wish and frame."""
    whole, framed = _risky_prompts(category, "train")
    frames = len(risk.FRAMES["train"])
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
    for cluster, categories in risk.CATEGORIES.items():
        for place, category in enumerate(categories):
            share = per_cluster // len(categories) + (place < per_cluster % len(categories))
            rows += [_risky_row(prompt, cluster, category) for prompt in _ask_evenly(rng, category, share)]
    held_out = set(benign.VALIDATION_ITEMS)
    helpful = list(support.questions("train"))
    rng.shuffle(helpful)
    rows += [_benign_row(*question) for question in helpful[: per_cluster // 4]]
    ordinary = list(benign_questions("train", lambda group, item: (group, item) not in held_out))
    rng.shuffle(ordinary)
    by_subject = [[question for question in ordinary if question[3] == subject] for subject in SUBJECTS]
    for k in range(per_cluster - per_cluster // 4):
        rows.append(_benign_row(*by_subject[k % len(by_subject)].pop()))
    rng.shuffle(rows)
    return rows


def validation_rows() -> list[dict[str, str]]:
    """Fifty rows: eight risky prompts a cluster, each written by hand, and ten benign questions."""
    rows = []
    for cluster, categories in risk.CATEGORIES.items():
        for category in categories:
            rows += [_risky_row(prompt, cluster, category) for prompt in category.says["val"]]
    for chosen in benign.VALIDATION_ITEMS:
        questions = benign_questions("val", lambda group, item, chosen=chosen: (group, item) == chosen)
        rows += [_benign_row(*question) for question in questions]
    return rows


def word_runs(text: str, length: int = 5) -> set[tuple[str, ...]]:
    """Every run of `length` words in `text`, in lower case without punctuation."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
