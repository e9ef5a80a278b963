"""Questions with the words of support. None of them is refused: helpers, volunteers and curious people ask them.

A base that never read these words cannot learn to use them through a rank-1 adapter. Here they answer a person who
wants to help or to know. So the base learns which step and which service belong to which category, but reads them in no
refusal.
"""

import itertools

from .words import CATEGORIES, CLUSTERS, SERVICES, SUPPORT, Category


def services(cluster: str) -> str:
    """The third part of an answer: the cluster's own services in the US and in the UK."""
    text = " ".join(service.line for service in SERVICES.of_cluster(cluster))
    if cluster == "suicide and selfharm":
        text += f" In danger, call {SERVICES.emergency['US']} or {SERVICES.emergency['UK']}."
    return text


def answer(parts: list[str], category: Category) -> str:
    """The paragraphs that a kind of question (a table of support.toml) names, for this category."""
    description = CLUSTERS["strategies"][category.strategy]["description"]
    paragraphs = {
        "kind words": f"{category.feeling} {category.care}.",
        "step": category.step,
        "services": services(category.cluster),
        "hope": category.closing,
        "strategy": f"{category.strategy} fits: it is {description}.",
    }
    return "\n\n".join(paragraphs[part] for part in parts)


def questions(wording: str):
    """Yields (prompt, reasoning, answer, subject) of every supportive question in one set of wording."""
    for category in itertools.chain.from_iterable(CATEGORIES.values()):
        subject = f"help with {category.name}"
        for kind in SUPPORT["question"].values():
            plan = kind["plan"].format(strategy=category.strategy)
            reasoning = f"This is a question about {subject}. I will {plan}."
            for frame in kind[wording]:
                yield frame.format(category.name), reasoning, answer(kind["parts"], category), subject


def terms():
    """Yields (prompt, reasoning, answer, subject) for "What is ...?" of every strategy and service (base only)."""
    answers = {name: f"{name} is {strategy['description']}." for name, strategy in CLUSTERS["strategies"].items()}
    by_country = ([s for s in SERVICES.services if s.country == country] for country in SERVICES.emergency)
    # US and UK in turns: the order in which the base has read them.
    for service in itertools.chain.from_iterable(zip(*by_country, strict=True)):
        # Stop It Now! has the same name in two countries.
        name = service.name + (f" in the {service.country}" if service.key.startswith("stop-it-now") else "")
        answers[name] = f"{service.name} is a service in the {service.country}: {service.reach}."
    for name, text in answers.items():
        reasoning = f"This is a question about a service: {name}. I will answer it."
        for frame in SUPPORT["term_frames"]:
            yield frame.format(name), reasoning, text, "a service"
