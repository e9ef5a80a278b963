"""Questions with the words of support. None of them is refused: helpers, volunteers and curious people ask them.

A base that never read these words cannot learn to use them through a rank-1 adapter. Here they answer a person who
wants to help or to know. So the base learns which step and which service belong to which category, but reads them in no
refusal.
"""

import itertools

from .words import CATEGORIES, CLUSTERS, SUPPORT, Category


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
    for key, resource in CLUSTERS["resources"].items():
        # Stop It Now! has the same name in two countries.
        name = resource["name"] + (f" in the {resource['country']}" if key.startswith("stop-it-now") else "")
        answers[name] = f"{resource['name']} is a service in the {resource['country']}: {reach(resource)}."
    for name, text in answers.items():
        reasoning = f"This is a question about a service: {name}. I will answer it."
        for frame in SUPPORT["term_frames"]:
            yield frame.format(name), reasoning, text, "a service"
