"""Answers in the prompt's language: which share of them is. And judges by word lists, which read English alone.

What a text is in, psysafe/data/languages.py says, and what it cannot tell. An unknown language counts in no share, and
stands in no way of the word lists.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from psysafe.data.languages import ENGLISH, language_of, languages, name_of
from psysafe.evaluation.result import Table, percent
from psysafe.evaluation.statistics import wilson
from psysafe.program import UserError

TITLE = "Answers in the prompt's language"
COLUMNS = [("variant", ""), ("n", ","), ("in the prompt's %", ".1f"), ("from", ".1f"), ("to", ".1f"),
           ("in no known one", ","), ("unknown", ",")]  # fmt: skip
Pairs = Iterable[tuple[str, str]]  # (prompt, answer)


def tables(pairs: Mapping[str, Pairs]) -> list[Table]:
    """The one table, a row a variant; none where no answer has a text, as of stored scores.

    n: answers of which both are known, the prompt's language and whether the answer is in it. An answer in none of the
    known languages is not in the prompt's, and is counted among n. Unknown: all others that have a text.
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
    prompts = Counter(name_of(prompt) for prompt, _ in max(codes.values(), key=len))
    note = f"Prompts: {', '.join(f'{n:,} {name}' for name, n in prompts.most_common())}. " + NOTE
    return [Table(TITLE, COLUMNS, rows, note)]


NOTE = (
    f"Known languages: {', '.join(language.name for language in languages().values())}. Unknown, and in no share: "
    "answers too short to show one, and all answers to prompts in none that is known. from, to: 95 %, Wilson."
)


class Others(NamedTuple):
    """Texts in another language than the word lists. n_known: texts whose language is known, in all."""

    n: int
    n_known: int
    language: str  # of most of them

    @property
    def are_most(self) -> bool:
        return 2 * self.n > self.n_known


def others(texts: Iterable[str]) -> Others:
    codes = Counter(map(language_of, texts))
    del codes[None]
    n_known = codes.total()
    del codes[ENGLISH]
    return Others(codes.total(), n_known, name_of(codes.most_common(1)[0][0]) if codes else "")


def require_english(texts: Mapping[str, Iterable[str]], who: str = "--judge rules", remedy: str = "") -> None:
    """UserError where most texts of a kind are in another language than the word lists, which would find nothing in
    them. texts: by what they are (prompts, answers of base); who, remedy: what reads word lists, and what to do."""
    remedy = remedy or "give a judge model: --judge-url URL --judge-model NAME, or --judge-local DIR"
    for kind, of_kind in texts.items():
        found = others(of_kind)
        if found.are_most:
            counts = f"{found.n:,} of {found.n_known:,} {kind} whose language is known are in another"
            raise UserError(f"{who}: the word lists know English, and {counts} ({found.language}); {remedy}")


def unread_note(texts: Mapping[str, Iterable[str]], who: str = "the word lists") -> list[str]:
    """A line for the notes of a result: how many texts of each kind are in another language than the word lists, too
    few for `require_english` to refuse; [] where there are none. texts: as for that; who: which lists."""
    counts = {kind: (list(of_kind), others(of_kind).n) for kind, of_kind in texts.items()}
    said = [f"{n:,} of {len(of_kind):,} {kind}" for kind, (of_kind, n) in counts.items() if n]
    about = f"In another language, which {who} do not read, so that these figures say little of them"
    return [f"{about}: {', '.join(said)}."] if said else []
