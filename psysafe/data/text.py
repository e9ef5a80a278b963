"""When two texts count as the same."""

import functools
import re
import unicodedata

# ’ and ‘, the modifier letter that some keyboards give instead, and the reversed quotation mark.
APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\u201b", "'"))
FIRST_MARK = "\u0300"  # of Unicode's marks: what comes before it, as most texts do, need not be looked up


def normalise(text: str) -> str:
    """The words of a text, in lower case, with single spaces: "‘I can’t’ -- _really_!" -> "i can't really".

    The one definition of "the same text": the search for leaks between files and the overlap of a benchmark with
    training rows both compare this form. A word is letters, the marks on them and digits, with apostrophes inside. So
    these make no difference: case, white space, punctuation and underscores, quotation marks of every kind, curly or
    straight apostrophes, composed or decomposed accents, full-width or ordinary characters (NFKC). An apostrophe inside
    a word does ("we're" is not "were"); one at its edge does not, since nothing tells it from a quotation mark. A text
    without any word ("???", an emoji) is only the same as itself.
    """
    # casefold() can take composed characters apart, so NFKC comes before and after it.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    marks = "".join(sorted(filter(_is_mark, set(folded))))
    return " ".join(_word(marks).findall(folded.translate(APOSTROPHES))) or " ".join(text.split())


def _is_mark(character: str) -> bool:
    """Whether it belongs to the letter before it. A variation selector only says how an emoji is drawn."""
    if character < FIRST_MARK or unicodedata.category(character) not in ("Mn", "Mc"):
        return False
    return not unicodedata.name(character, "").startswith("VARIATION SELECTOR")


@functools.lru_cache
def _word(marks: str) -> re.Pattern:
    """A word of letters, digits and these marks. \\w has no marks, though the vowels of Hindi and Thai are such."""
    letters = f"[^\\W_](?:[^\\W_]|[{marks}])*" if marks else "[^\\W_]+"
    return re.compile(f"{letters}(?:'{letters})*")


def contains_words(text: str, words: str) -> bool:
    """Whether a normalised text contains these normalised words as whole words: "with" does not contain "it"."""
    return bool(words) and f" {words} " in f" {text} "
