"""Which language a text is in, and what the checks of drafts know of that language: assets/languages.toml.

    language_of(text) -> "en", "de"   a language with a table, which has a fifth of its words or more among its frequent
                                      ones, and more than any other's
                         ""           in none of these: words enough, and few of them are frequent ones of any; or
                                      letters of another script
                         None         unknown: fewer than eight words, or nearly as much of one language as of another

The one definition of the whole project: the checks of drafts, the judges by word lists and the share of answers in the
prompt's language all ask here. It cannot tell languages without a table from each other, nor a list of names from such
a language (of 1,327 English answers of the project it takes two for one, a list of helplines and a quotation in
French). A text in two languages is in the one that has more of its words.
"""

import functools
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from psysafe.data.text import normalise
from psysafe.files import ASSETS, read_text

# Share of a text's words that are frequent ones of its language. Paragraphs of benchmarks/own_rows: English ones have
# 0.24 to 0.79, those in other languages at most 0.17.
MIN_SHARE = 0.2
# The second language's share, divided by the best one's. Related languages share words: a Dutch text has nearly as many
# frequent words of English as of German. English and German texts of the project have at most 0.67.
MAX_SECOND = 0.75
MIN_WORDS = 8  # fewer words do not show a language
MIN_LETTERS = 8  # of another script, which shows without words that no known language is meant
CODE_OR_ADDRESS = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\bhttps?://\S+", re.DOTALL)  # in no language
# Where a sentence may end; Devanagari, Arabic and Urdu have marks of their own.
SENTENCE_END = re.compile(r"(?<=[.!?\u0964\u0965\u061f\u06d4])\s+")
OPENING = "\"'\u201c\u2018\u201e\u00ab(\u00bf\u00a1"  # what may stand before the first letter of a sentence
ENGLISH = "en"  # what word lists of psysafe/evaluation read, and what a row is in that says and shows nothing
PATTERNS = ("address", "first_person", "negation", "hope")
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts, as Unicode names them


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
            self.first_person.search(sentence) and self.negation.search(sentence) for sentence in sentences(text)
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


def language_name(code: str | None) -> str:
    """A language's name for a reader. code: as `language_of` returns it."""
    return languages()[code].name if code else "in no known language" if code == "" else "unknown"


def language_of(text: str) -> str | None:
    """The code of the language that a text is written in, "" for none that is known, None where nothing shows it."""
    words = [word for word in normalise(CODE_OR_ADDRESS.sub(" ", text)).split() if not word.isnumeric()]
    if _is_in_other_script(words):
        return ""
    if len(words) < MIN_WORDS:
        return None
    shares = {
        code: sum(word in language.function_words for word in words) / len(words)
        for code, language in languages().items()
    }
    code = max(shares, key=shares.get)
    second = max((share for other, share in shares.items() if other != code), default=0.0)
    if shares[code] < MIN_SHARE:
        return ""
    return code if second <= MAX_SECOND * shares[code] else None


def html_lang(text: str) -> str:
    """For HTML's attribute `lang`: a known language other than English, in which our pages are; "" for none."""
    code = language_of(text)
    return code if code and code != ENGLISH else ""


def field_language(fields: Mapping) -> str | None:
    """The code that a row's field `language` says ("en" of "en-GB"); None where it says nothing."""
    named = fields.get("language")
    return main_language(named) or None if isinstance(named, str) else None


def main_language(code: str) -> str:
    """ "en" of "en-GB" and "EN"."""
    return re.split("[-_]", code.strip())[0].lower()


def row_language(fields: Mapping, text: str) -> str | None:
    """The code that a row's field says, which may have no table here, else what `language_of` says of its text."""
    return field_language(fields) or language_of(text)


def row_language_or_english(fields: Mapping, text: str) -> str:
    """`row_language`, and English where that is unknown."""
    code = row_language(fields, text)
    return ENGLISH if code is None else code


def _is_in_other_script(words: Iterable[str]) -> bool:
    """Whether most letters are of scripts in which no known language is written."""
    scripts = [script_of(letter) for word in words for letter in word if letter.isalpha()]
    n_other = sum(script not in _known_scripts() for script in scripts)
    return n_other >= MIN_LETTERS and 2 * n_other > len(scripts)


@functools.cache
def _known_scripts() -> set[str]:
    return {script_of(letter) for one in languages().values() for word in one.function_words for letter in word}


def script_of(letter: str) -> str:
    """The first word of its Unicode name: LATIN, CYRILLIC, CJK."""
    return "LATIN" if letter.isascii() else unicodedata.name(letter, "").partition(" ")[0]


def has_no_spaces(text: str) -> bool:
    """Whether most letters are of scripts that put no spaces between words, so that words cannot be counted."""
    scripts = [script_of(letter) for letter in text if letter.isalpha()]
    return 2 * sum(script in WITHOUT_SPACES for script in scripts) > len(scripts)


def sentences(text: str) -> list[str]:
    """A text's sentences, without the white space between them.

    One ends at . ! ? (and the marks of Devanagari, Arabic, Urdu) with white space after it, if what comes next is a
    digit, a letter that is not a small one, or one of OPENING. So "z.B. so" has no end in it, and an end mark with a
    closing quotation mark or bracket after it is none.
    """
    pieces, start = [], 0
    for match in SENTENCE_END.finditer(text):
        if _may_begin_sentence(text[match.end() : match.end() + 1]):
            pieces.append(text[start : match.start()])
            start = match.end()
    return [*pieces, text[start:]]


def _may_begin_sentence(character: str) -> bool:
    return character != "" and (
        character in OPENING or character.isdigit() or (character.isalpha() and not character.islower())
    )
