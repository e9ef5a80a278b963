"""The share of answers that are in the language of their prompt, and the refusal of word lists, which know English, for
other texts.

psysafe/data/languages.py says which language a text is in, and when that cannot be told. Such a text counts in no
share, and is no reason to refuse the word lists.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from psysafe.data.languages import ENGLISH, language_name, language_of, languages
from psysafe.evaluation.result import Table, percent
from psysafe.evaluation.statistics import wilson
from psysafe.program import UserError

TITLE = "Answers in the prompt's language"
COLUMNS = [("variant", ""), ("n", ","), ("in the prompt's %", ".1f"), ("from", ".1f"), ("to", ".1f"),
           ("in no known one", ","), ("not counted", ",")]  # fmt: skip
Pairs = Iterable[tuple[str, str]]  # (prompt, answer)


def tables(pairs: Mapping[str, Pairs]) -> list[Table]:
    """The one table, a row a variant; none where no answer has a text, as of stored scores.

    n: answers of which both are known, the prompt's language and whether the answer is in it. An answer in none of the
    known languages is not in the prompt's, and is counted among n. Not counted: all others that have a text.
    """
    codes = {v: [(language_of(p), language_of(text)) for p, text in of if text.strip()] for v, of in pairs.items()}
    if not any(codes.values()):
        return []
    rows = []
    for variant, of_variant in codes.items():
        known = [(prompt, answer) for prompt, answer in of_variant if prompt and answer is not None]
        same = [prompt == answer for prompt, answer in known]
        interval = [100 * end if same else None for end in wilson(sum(same), len(same))]
        n_other = sum(answer == "" for _, answer in known)
        rows.append([variant, len(same), percent(same), *interval, n_other, len(of_variant) - len(known)])
    prompts = Counter(language_name(prompt) for prompt, _ in max(codes.values(), key=len))
    note = f"Prompts: {', '.join(f'{n:,} {name}' for name, n in prompts.most_common())}. " + NOTE
    return [Table(TITLE, COLUMNS, rows, note, of_answers=True)]


NOTE = (
    f"Known languages: {', '.join(language.name for language in languages().values())}. Not counted: answers too short "
    "to show a language, and those to prompts too short or in no known language. from, to: 95 %, Wilson."
)


class Others(NamedTuple):
    """Texts in another language than the word lists. n_shown: texts that show a language, in all."""

    n: int
    n_shown: int
    language: str  # of most of the n

    @property
    def are_most(self) -> bool:
        return 2 * self.n > self.n_shown


def others(texts: Iterable[str]) -> Others:
    codes = Counter(map(language_of, texts))
    del codes[None]
    n_shown = codes.total()
    del codes[ENGLISH]
    code = codes.most_common(1)[0][0] if codes else ENGLISH
    return Others(codes.total(), n_shown, language_name(code) if code else "one that is not known here")


def require_english(
    prompts: Iterable[str] = (),
    answers: Mapping[str, Iterable[str]] | None = None,
    who: str = "--judge rules",
    remedy: str = "give a judge model: --judge-url URL --judge-model NAME, or --judge-local DIR",
) -> None:
    """UserError where most of the prompts, or of a variant's answers, are in another language than the word lists.

    These would find nothing in them. who, remedy: what reads word lists, and what to do instead.

    An evaluation asks twice: of the prompts before its models answer them, which takes longest, and of the answers.
    """
    for kind, of_kind in _by_kind(prompts, answers).items():
        unread = others(of_kind)
        if unread.are_most:
            counts = f"{unread.n:,} of {unread.n_shown:,} {kind} that show a language are in another"
            raise UserError(f"{who}: the word lists know English, and {counts} (mostly {unread.language}); {remedy}")


def unread_note(
    prompts: Iterable[str] = (), answers: Mapping[str, Iterable[str]] | None = None, who: str = "the word lists"
) -> list[str]:
    """A line for the notes of a result: how many prompts, and answers of each variant, are in another language than the
    word lists, too few for `require_english` to refuse; [] where there are none. who: which lists."""
    counts = {kind: (of_kind, others(of_kind).n) for kind, of_kind in _by_kind(prompts, answers).items()}
    said = [f"{n:,} of {len(of_kind):,} {kind}" for kind, (of_kind, n) in counts.items() if n]
    about = f"In another language, which {who} do not read, so that these figures say little of them"
    return [f"{about}: {', '.join(said)}."] if said else []


def _by_kind(prompts: Iterable[str], answers: Mapping[str, Iterable[str]] | None) -> dict[str, list[str]]:
    of_variants = {f"answers of {variant}": list(of) for variant, of in (answers or {}).items()}
    return {"prompts": list(prompts)} | of_variants
