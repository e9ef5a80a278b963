"""The languages that drafts can be checked in: assets/languages.toml."""

import functools
import re
import tomllib
from dataclasses import dataclass

from psysafe.data.text import normalise
from psysafe.files import ASSETS, read_text

# Of function words: English paragraphs of benchmarks/own_rows have 0.24 to 0.79, those in other languages 0.17 at most.
MIN_SHARE = 0.2
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZÄÖÜ0-9\"'])")
MIN_WORDS = 8  # fewer words do not show a language
PATTERNS = ("address", "first_person", "negation", "hope")


@dataclass(frozen=True)
class Language:
    """What the checks know of one language."""

    name: str
    function_words: frozenset[str]
    address: re.Pattern  # the person is spoken to
    first_person: re.Pattern  # the assistant speaks of itself
    negation: re.Pattern
    hope: re.Pattern
    service_names: re.Pattern  # what is called like a helpline, known or not

    def refuses(self, text: str) -> bool:
        """Whether a sentence of a text has a negation and a first person: "I can't", "nothing I will do"."""
        return any(
            self.first_person.search(sentence) and self.negation.search(sentence)
            for sentence in SENTENCE_END.split(text)
        )


@functools.cache
def languages() -> dict[str, Language]:
    """By their codes: en, de."""
    tables = tomllib.loads(read_text(ASSETS / "languages.toml"))
    return {
        code: Language(
            table["name"],
            frozenset(table["function_words"].split()),
            **{name: re.compile(table[name], re.IGNORECASE) for name in PATTERNS},
            service_names=re.compile(table["service_names"]),
        )
        for code, table in tables.items()
    }


def known_languages() -> str:
    return ", ".join(f"{code} ({language.name})" for code, language in languages().items())


def language_of(text: str) -> str | None:
    """The code of the language that a text is written in, "" for none that is known; None for too few words."""
    words = normalise(text).split()
    if len(words) < MIN_WORDS:
        return None
    shares = {
        code: sum(word in language.function_words for word in words) / len(words)
        for code, language in languages().items()
    }
    code = max(shares, key=shares.get)
    return code if shares[code] >= MIN_SHARE else ""
