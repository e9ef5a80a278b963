"""Answers in other languages, translated into English before they are judged: chunk by chunk, and checked.

Long answers are cut at paragraphs, else lines, else sentences, else words. A chunk that comes back untranslated is
asked for once more in other words. If it stays so, its whole answer is a failed item: a judge that reads English only
would call it harmless, and nobody would notice.
"""

import argparse
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from psysafe.cli import whole_number
from psysafe.data.languages import CODE_OR_ADDRESS
from psysafe.endpoint import Endpoint, ItemFailed, RetryPolicy, key_from, run_items
from psysafe.evaluation.replies import without_reasoning
from psysafe.journal import key_of
from psysafe.program import UserError

KEY_VARIABLE = "PSYSAFE_TRANSLATOR_KEY"  # the judge's key is the judge's: it goes to no other host
CHUNK = 2000  # characters
REQUESTS = (
    "Translate the following text into English. Reply with the translation only.\n\n",
    "The text below is not in English. Write down in English what it says, all of it and nothing else. Do not repeat "
    "it in its own language.\n\n",
)
# Where a text may be cut, the best place first: paragraphs, lines, sentences (Chinese ones end without a space), words.
BORDERS = (r"\n\s*\n\s*", r"\n\s*", r"(?<=[.!?\u2026\u0964\u0965])\s+|(?<=[\u3002\uff01\uff1f])", r"\s+")

# Words that stand in nearly every sentence of one of the two languages, and hardly ever in the other.
ENGLISH = frozenset((
    "the", "of", "and", "to", "in", "is", "for", "with", "that", "you", "it", "are", "be", "by", "this", "can", "not",
    "if", "your", "at", "from", "have", "do", "will", "they", "should", "when", "what", "i", "we", "no", "yes", "there",
    "how", "was", "were", "has", "would", "could",
))  # fmt: skip
FRENCH = frozenset((
    "le", "la", "les", "des", "de", "du", "une", "un", "et", "est", "que", "qui", "dans", "pour", "vous", "je", "nous",
    "pas", "ne", "sur", "avec", "ce", "il", "elle", "au", "aux", "en", "sont", "cette", "ces", "votre", "mais", "ou",
    "si", "par", "tu", "ma", "vos",
))  # fmt: skip
NO_ENGLISH_WORD = 12  # words among which English has at least one of ENGLISH
FOREIGN_SHARE = 0.25  # of letters in another script; a translation may quote a word or two
IN_NAMES = 2  # French words that a line of English may have in names, as in La Paz and Le Monde
LONG_LINE = 20  # letters from which a line is looked at alone: one paragraph of five may have stayed as it was


class Translations(NamedTuple):
    """texts: in English, by the caller's keys; failed: why there is none; n_chunks: distinct ones; n_second_try: of
    those that were translated, how many only at the second try."""

    texts: dict
    failed: dict
    n_chunks: int
    n_second_try: int


class Translator:
    """A model behind an OpenAI-compatible endpoint that is asked for translations, `workers` chunks at once."""

    def __init__(self, endpoint: Endpoint, workers: int, chunk: int):
        """chunk: most characters of a text that one request holds."""
        self.endpoint, self.workers, self.chunk = endpoint, workers, chunk

    def translate(self, texts: Mapping, out: str | Path) -> Translations:
        """texts: by any key. What `out` (JSONL) holds is not asked again; a failed chunk is not in it."""
        pieces = {key: cut(text, self.chunk) for key, text in texts.items()}
        distinct = dict.fromkeys(piece.strip() for of_text in pieces.values() for piece in of_text)
        identity = self.endpoint.model, self.endpoint.options, REQUESTS
        saved = {piece: key_of("translation", *identity, piece) for piece in distinct if piece}
        outcome = run_items({saved[piece]: piece for piece in saved}, self._ask, out, self.workers, "translations")
        english, failed = {}, {}
        for key, of_text in pieces.items():
            places = [(i, saved[piece.strip()]) for i, piece in enumerate(of_text, 1) if piece.strip()]
            broken = [(i, outcome.failed[name]) for i, name in places if name in outcome.failed]
            if broken:
                place = f"chunk {broken[0][0]} of {len(of_text)}: " if len(of_text) > 1 else ""
                failed[key] = f"translation: {place}{broken[0][1]}"
            else:
                replies = {name: outcome.rows[name]["text"] for _, name in places}
                english[key] = joined(of_text, [replies.get(saved.get(piece.strip()), "") for piece in of_text])
        n_second_try = sum(row["tries"] > 1 for row in outcome.rows.values())
        return Translations(english, failed, len(saved), n_second_try)

    def _ask(self, text: str) -> dict:
        """{"text", "tries"} of one chunk; ItemFailed where every try came back untranslated."""
        reason = ""
        for tries, request in enumerate(REQUESTS, 1):
            reply = without_reasoning(self.endpoint.chat([{"role": "user", "content": request + text}]).text)
            reason = untranslated(text, reply) if reply and reply.strip() else "nothing but reasoning"
            if not reason:
                return {"text": reply.strip(), "tries": tries}
        raise ItemFailed(f"it came back untranslated in {len(REQUESTS)} tries ({reason})")


def cut(text: str, size: int) -> list[str]:
    """Pieces of at most `size` characters that are the text when joined; each ends at the best border in reach."""
    pieces = []
    while len(text) > size:
        ends = ([m.end() for m in re.finditer(border, text[: size + 1])] for border in BORDERS)
        fitting = ([end for end in of_kind if 0 < end <= size] for of_kind in ends)
        end = next((of_kind[-1] for of_kind in fitting if of_kind), size)
        while end > 1 and unicodedata.category(text[end]).startswith("M"):  # a vowel sign belongs to its letter
            end -= 1
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def joined(pieces: list[str], translations: list[str]) -> str:
    """The translations, with the spaces and empty lines that stood between the pieces."""
    parts = []
    for number, (piece, translation) in enumerate(zip(pieces, translations, strict=True), 1):
        before = piece[: len(piece) - len(piece.lstrip())]
        after = piece[len(piece.rstrip()) :] if piece.strip() else ""
        parts.append(before + translation + (after or (" " if number < len(pieces) else "")))
    return "".join(parts)


def untranslated(source: str, reply: str) -> str:
    """Why a reply is no English translation of the source; "" for one that may be. Code and addresses do not count."""
    source, reply = (CODE_OR_ADDRESS.sub(" ", text) for text in (source, reply))
    if not letters(reply):  # numbers are the same in every language; of a text with letters nothing else is one
        return "no words in it" if letters(source) else ""
    long_lines = [line for line in reply.splitlines() if len(letters(line)) >= LONG_LINE]
    reason = foreign(reply) or next(filter(None, (foreign(line, is_line=True) for line in long_lines)), "")
    same = " ".join(source.split()).casefold() == " ".join(reply.split()).casefold()
    return reason or ("the same text" if same and not counts(reply)[1] else "")


def foreign(text: str, is_line: bool = False) -> str:
    """Why a text is not English; "" where nothing says so. is_line: a part, which may be a list of things or names."""
    of_text = letters(text)
    if sum(not unicodedata.name(c, "").startswith("LATIN") for c in of_text) >= FOREIGN_SHARE * len(of_text):
        return "mostly in another script"
    n_words, english, french = counts(text)
    if is_line:
        return "not English" if french > max(english, IN_NAMES) else ""
    return "not English" if french > english or (not english and n_words >= NO_ENGLISH_WORD) else ""


def letters(text: str) -> list[str]:
    return [c for c in text if unicodedata.category(c).startswith("L")]


def counts(text: str) -> tuple[int, int, int]:
    """(words, those of them that are plainly English, those that are plainly French)."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    return len(words), sum(word in ENGLISH for word in words), sum(word in FRENCH for word in words)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--translator-url", metavar="URL", help="endpoint that translates answers into English")
    parser.add_argument("--translator-model", metavar="NAME", help="the model to ask for there")
    help_text = f"environment variable with that endpoint's key ({KEY_VARIABLE})"
    parser.add_argument("--translator-key-env", metavar="NAME", default=KEY_VARIABLE, help=help_text)
    help_text = f"characters that one request translates; longer answers are cut at paragraphs or sentences ({CHUNK:,})"
    parser.add_argument("--translator-chars", type=whole_number, default=CHUNK, metavar="N", help=help_text)


def from_arguments(args: argparse.Namespace) -> Translator:
    if not args.translator_model:
        raise UserError("--translator-url needs --translator-model NAME, the model to ask for there")
    key, retry_policy = key_from(args.translator_key_env), RetryPolicy(deadline_s=args.deadline)
    endpoint = Endpoint(args.translator_url, args.translator_model, key, retry_policy, temperature=0.0)
    return Translator(endpoint, args.workers, args.translator_chars)
