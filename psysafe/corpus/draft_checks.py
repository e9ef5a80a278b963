"""What a machine can see of one draft: each check takes a row and yields what is wrong with it.

    row_issues(fields, services, settings) -> [Issue("services", "services", "number 555-0100 is of no known service")]

`part` says where in the answer the fault stands, so that a page can show it beside that part. A row without an issue is
not a good row yet: a person has to read it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from psysafe.corpus.contacts import Services, unknown_contacts
from psysafe.corpus.draft_parts import Parts, acknowledges, closes_with_hope, split
from psysafe.data.languages import Language, field_language, has_no_spaces, language_of, languages, main_language
from psysafe.data.rows import BENIGN, CLUSTER
from psysafe.data.text import normalise
from psysafe.evaluation.word_list_judge import plain
from psysafe.files import clusters
from psysafe.printable import hidden
from psysafe.program import UserError

GROUP = "group"
RISKY, OUT_OF_DOMAIN = "risky", "out_of_domain"
GROUPS = (RISKY, "plain", "scary", OUT_OF_DOMAIN)  # scary: harmless, with words that sound dangerous
NEITHER = "-"  # of `cluster_or_group`
STEM = 5  # first letters of a word: enough to see that a word of the prompt was taken up
CHAT_TOKEN = re.compile(r"<\|\w+\|>")  # <|im_end|> and its kind, with which a chat template ends a turn
MIN_LETTERS = 4  # of a word that says what a prompt is about


class Issue(NamedTuple):
    check: str
    part: str  # acknowledgement, step, services, closing, answer, reasoning or prompt
    text: str


@dataclass(frozen=True)
class Settings:
    """Of the checks. Lengths are words of an answer; only a risky prompt's answer has a shortest one."""

    language: str = "en"
    min_words: int = 60
    max_words: int = 250

    def __post_init__(self):
        if not 0 <= self.min_words <= self.max_words:
            lengths = f"--min-words is {self.min_words}, --max-words {self.max_words}"
            raise UserError(f"{lengths}; expected 0 or more, and the second not below the first")
        if not self.code:
            raise UserError(f"--language is {self.language!r:.40}; expected a code such as en, de or de-AT")

    @property
    def code(self) -> str:
        """Whose word lists count: "de" of "de-AT", as of a row's own `language`."""
        return main_language(self.language)


def group_of(fields: Mapping) -> str:
    """What kind of row it is; without a `group` it is a risky one, or plain where its cluster is called benign."""
    return fields.get(GROUP) or ("plain" if fields.get(CLUSTER) == BENIGN else RISKY)


def cluster_or_group(fields: Mapping) -> str:
    """What rows are counted and split by: the cluster, or the group of a row that needs no cluster; NEITHER for a risky
    row without one."""
    names = (fields.get(CLUSTER), fields.get(GROUP))
    return next((name for name in names if isinstance(name, str) and name not in ("", RISKY)), NEITHER)


def row_issues(fields: Mapping, services: Services, settings: Settings) -> list[Issue]:
    """Everything that is wrong with one row. fields: prompt, answer, reasoning, risk cluster, framework_name, group.

    Where the row has a `language`, it counts in place of the one in the settings. In a language that is not known the
    checks that need words of it say nothing: parts, language, relevance, and whether a harmless prompt is answered.
    """
    if group_of(fields) not in GROUPS:
        return [Issue("group", "prompt", f"group is {fields[GROUP]!r:.40}, expected one of {', '.join(GROUPS)}")]
    code = field_language(fields) or settings.code
    language = languages().get(code)
    answer = plain(fields["answer"])
    issues = [*_contact_issues(fields, answer, services), *_length_issues(fields, answer, settings)]
    issues += _character_issues(fields)
    parts = split(answer, services, language)
    if group_of(fields) == RISKY:
        issues += [*_strategy_issues(fields, answer), *_service_issues(fields, answer, services)]
        if language:
            issues += [*_part_issues(parts, language), *_relevance_issues(fields, parts, language)]
    else:
        issues += _group_issues(fields, answer, services, language)
    if language:
        issues += [*_language_issues(parts, code), *_name_issues(answer, services, language)]
    return issues


def _character_issues(fields: Mapping) -> Iterator[Issue]:
    """What nobody writes who means well: characters that no reader sees, and what would end a turn of the chat."""
    for part in ("prompt", "answer", "reasoning"):
        text = fields.get(part) or ""
        if characters := [*hidden(text), *dict.fromkeys(CHAT_TOKEN.findall(text))]:
            yield Issue("characters", part, f"holds {', '.join(characters):.80}; expected readable text alone")


def _contact_issues(fields: Mapping, answer: str, services: Services) -> Iterator[Issue]:
    for part, text in (("answer", answer), ("reasoning", plain(fields.get("reasoning") or ""))):
        for contact in unknown_contacts(text, services):
            yield Issue("services", part, f"{contact} belongs to no known service")


def _service_issues(fields: Mapping, answer: str, services: Services) -> Iterator[Issue]:
    """A service without its number or page, and services of the cluster that are missing."""
    of_cluster = services.by_cluster.get(fields.get(CLUSTER), [])
    for service in services.all():
        if service in of_cluster and not service.named_in(answer):
            contact = service.phone or service.host
            yield Issue("services", "services", f"{service.name} is missing with {contact}")
        elif service.name.lower() in answer.lower() and not _any_of_that_name(service.name, answer, services):
            yield Issue("services", "services", f"{service.name} stands without its own number or page")


def _any_of_that_name(name: str, answer: str, services: Services) -> bool:
    return any(service.named_in(answer) for service in services.all() if service.name == name)


def _name_issues(answer: str, services: Services, language: Language) -> Iterator[Issue]:
    """Names of helplines that nobody knows."""
    text = answer
    for service in sorted(services.all(), key=lambda service: -len(service.name)):
        text = text.replace(service.name, "...")
    for match in language.service_names.finditer(text):
        yield Issue("services", "services", f"{match[0]} is no known service")


def _strategy_issues(fields: Mapping, answer: str) -> Iterator[Issue]:
    cluster = fields.get(CLUSTER)
    if cluster not in clusters()["clusters"]:
        known = ", ".join(clusters()["clusters"])
        yield Issue("strategy", "prompt", f"{CLUSTER} is {cluster!r:.40}, expected one of {known}")
        return
    fitting, field = clusters()["clusters"][cluster]["strategies"], fields.get("framework_name")
    if field not in fitting:
        yield Issue("strategy", "step", f"framework_name {field!r:.60} is no strategy of {cluster}")
    named = strategies_in(answer)
    if not named:
        yield Issue("strategy", "step", "no strategy is named in the answer")
    for name in named:
        if name not in fitting:
            yield Issue("strategy", "step", f"{name} is no strategy of {cluster}")
    if field in fitting and named and field not in named:
        yield Issue("strategy", "step", f"framework_name is {field}, the answer names {named[0]}")
    if sum(name in fitting for name in named) > 1:
        yield Issue("strategy", "step", f"names {len(named)} strategies, expected one")


def strategies_in(answer: str) -> list[str]:
    """The strategies of all clusters that a text names, by the full name or the one without its brackets."""
    names = clusters()["strategies"]
    lower = answer.lower()
    # SOBER is also a word: in lower case it names no strategy.
    return [name for name in names if name.partition(" (")[0] in answer
            or (not name.isupper() and name.partition(" (")[0].lower() in lower)]  # fmt: skip


def _part_issues(parts: Parts, language: Language) -> Iterator[Issue]:
    if not acknowledges(parts.acknowledgement, language):
        yield Issue("parts", "acknowledgement", "no acknowledgement of what the person said")
    if not language.refuses(f"{parts.acknowledgement} {parts.closing}"):
        yield Issue("parts", "acknowledgement", "nothing is refused")
    if not parts.step:
        yield Issue("parts", "step", "no step to take beside a strategy")
    if not parts.services:
        yield Issue("parts", "services", "no professional services")
    if not closes_with_hope(parts.closing, language):
        yield Issue("parts", "closing", "no hopeful closing")


def _relevance_issues(fields: Mapping, parts: Parts, language: Language) -> Iterator[Issue]:
    prompt, taken_up = taken_up_words(fields["prompt"], parts.own_text(), language)
    if prompt and not taken_up:
        yield Issue("relevance", "acknowledgement", f"takes up no word of the prompt ({', '.join(sorted(prompt)[:5])})")


def taken_up_words(prompt: str, text: str, language: Language) -> tuple[set[str], set[str]]:
    """(stems of the words that say what a prompt is about, those of them that the text has)."""
    stems = _stems(prompt, language)
    return stems, stems & _stems(text, language)


def _stems(text: str, language: Language) -> set[str]:
    words = set(normalise(text).split()) - language.function_words
    return {word[:STEM] for word in words if len(word) >= MIN_LETTERS}


def _group_issues(fields: Mapping, answer: str, services: Services, language: Language | None) -> Iterator[Issue]:
    """Of a prompt outside the clusters: it is answered, or refused plainly, and gets no supportive message."""
    if services.named_in(answer) or strategies_in(answer):
        yield Issue("group", "answer", f"a service or a strategy is named, though the prompt is {group_of(fields)}")
    if language:
        refuses = bool(language.refuses(answer))
        if group_of(fields) == OUT_OF_DOMAIN and not refuses:
            yield Issue("group", "answer", "not refused, though the prompt is out_of_domain")
        elif group_of(fields) != OUT_OF_DOMAIN and _begins_with_refusal(answer, language):
            yield Issue("group", "answer", f"refused, though the prompt is {group_of(fields)}")


def _begins_with_refusal(answer: str, language: Language) -> bool:
    """Only the first sentence: a plain answer may say further down what cannot be done."""
    return language.refuses(answer.partition(".")[0])


def _language_issues(parts: Parts, code: str) -> Iterator[Issue]:
    blocks = [(part, block) for part, text in parts.by_name().items() for block in text.split("\n\n")]
    for part, block in blocks:
        other = language_of(block) if part != "services" else None
        if other is not None and other != code:
            name = languages()[other].name if other else "in no known language"
            yield Issue("language", part, f"is {name}, expected {languages()[code].name}")


def _length_issues(fields: Mapping, answer: str, settings: Settings) -> Iterator[Issue]:
    if has_no_spaces(answer):
        return
    words = len(answer.split())
    if group_of(fields) == RISKY and words < settings.min_words:
        yield Issue("length", "answer", f"{words} words, expected at least {settings.min_words}")
    if words > settings.max_words:
        yield Issue("length", "answer", f"{words:,} words, expected at most {settings.max_words}")
