"""The words of support in questions that nobody is refused: helpers, volunteers and curious people ask.

A base that never read these words cannot learn to use them through a rank-1 adapter. Here they stand as an answer to a
person who wants to help or to know, so the base knows which step and which service belong to which trouble, but has
never met them in a refusal.
"""

import tomllib
from pathlib import Path

from .risk import CARES, CATEGORIES, CLOSINGS, Category

ASSETS = Path(__file__).resolve().parents[2] / "psysafe" / "assets"
CLUSTERS = tomllib.loads((ASSETS / "clusters.toml").read_text(encoding="utf-8"))

FRAMES = {
    "helper": {
        "base": ("A caller speaks about {}. What does the helper say?", "I answer calls about {}. What do I say?",
                 "How does a good helper speak with a person about {}?", "Write what a helper says about {}.",
                 "A friend told me about {}. How do I support them?", "Show me a supportive talk about {}."),
        "train": ("At the helpline someone brings up {}. Which words fit?",),
    },
    "card": {
        "base": ("Write a help card about {}.", "Make a small poster on help with {}.",
                 "A leaflet about support with {}, please.", "What belongs on a help page about {}?"),
        "train": ("Our clinic prints a card about {}. Write it.",),
    },
    "step": {
        "base": ("Name a coping step for {}.", "Which first step helps with {}?",
                 "What small step do helpers teach about {}?", "Tell me one step that helps people with {}."),
        "train": ("Which coping step do you know about {}?",),
    },
    "services": {
        "base": ("Which services help with {}?", "Where can people call about {}?",
                 "List a service for {} in the US and the UK.", "Who helps people with {}?"),
        "train": ("My club collects services about {}. Which are they?",),
    },
    "kind words": {
        "base": ("Write a kind first sentence about {}.", "How do I begin a talk about {} with care?"),
        "train": (),
    },
    "hope": {
        "base": ("End a leaflet about {} with hope.", "Give me a hopeful last sentence about {}."),
        "train": (),
    },
    "strategy": {
        "base": ("Which strategy fits {}?", "Which strategy do helpers use with {}?"),
        "train": (),
    },
}  # fmt: skip

TERM_FRAMES = ("What is {}?", "Tell me about {}.", "Explain {} in one sentence.", "I heard of {}. What is it?",
               "Can you tell me what {} is?")  # fmt: skip


def host(resource: dict) -> str:
    """The page of a resource as a person would type it."""
    return resource["url"].removeprefix("https://")


def reach(resource: dict) -> str:
    """How a resource is reached: `116 123, samaritans.org`, or its page alone."""
    return f"{resource['contact']}, {host(resource)}" if "contact" in resource else host(resource)


def services(cluster: str) -> str:
    """The third part of an answer: the cluster's own services in the US and in the UK."""
    us, uk = (CLUSTERS["resources"][CLUSTERS["clusters"][cluster]["resources"][land]] for land in ("US", "UK"))
    text = f"US: {us['name']}, {reach(us)}. UK: {uk['name']}, {reach(uk)}."
    if cluster == "suicide and selfharm":
        text += f" In danger, call {CLUSTERS['emergency']['US']} or {CLUSTERS['emergency']['UK']}."
    return text


def answer(kind: str, cluster: str, category: Category) -> str:
    """What a question of this kind (a key of `FRAMES`) about this category is answered with."""
    kind_words = f"{category.feeling} {CARES[cluster]}."
    description = CLUSTERS["strategies"][category.strategy]["description"]
    parts = {
        "helper": (kind_words, category.step, services(cluster), CLOSINGS[cluster]),
        "card": (category.step, services(cluster), CLOSINGS[cluster]),
        "step": (category.step,),
        "services": (services(cluster),),
        "kind words": (kind_words,),
        "hope": (CLOSINGS[cluster],),
        "strategy": (f"{category.strategy} fits: it is {description}.",),
    }
    return "\n\n".join(parts[kind])


def questions(wording: str):
    """Yields (prompt, reasoning, answer, subject) of every supportive question in one set of wording."""
    for cluster, categories in CATEGORIES.items():
        for category in categories:
            subject = f"help with {category.name}"
            plans = {"services": "name services", "kind words": "find kind words", "hope": "give hope"}
            for kind, frames in FRAMES.items():
                plan = plans.get(kind, f"answer gently and use {category.strategy}")
                reasoning = f"This is a question about {subject}. I will {plan}."
                for frame in frames[wording]:
                    yield frame.format(category.name), reasoning, answer(kind, cluster, category), subject


def terms():
    """Yields (prompt, reasoning, answer, subject) for "What is ...?" of every strategy and service (base only)."""
    known = {name: f"{name} is {strategy['description']}." for name, strategy in CLUSTERS["strategies"].items()}
    for key, resource in CLUSTERS["resources"].items():
        # Stop It Now! bears one name in two countries.
        name = resource["name"] + (f" in the {resource['country']}" if key.startswith("stop-it-now") else "")
        known[name] = f"{resource['name']} is a service in the {resource['country']}: {reach(resource)}."
    for name, text in known.items():
        reasoning = f"This is a question about a service: {name}. I will answer it."
        for frame in TERM_FRAMES:
            yield frame.format(name), reasoning, text, "a service"
