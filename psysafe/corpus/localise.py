"""The services in rows, replaced by those of another country. Other text stays, and no number is guessed.

`US: NAME, NUMBER, PAGE. UK: ...` becomes the given services of the row's cluster in the same form. Anywhere else a
known name, number or page becomes that of the given service of the same cluster, and the emergency numbers after "call"
and its kind become the given ones. In rows without a cluster it is the cluster of the service that they name.

The call words are English. In a row of another language emergency and short numbers are not replaced: every number of
three digits or more, except years and 24/7, that no given service has is listed as unknown.
"""

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from psysafe.cli import out_file, say
from psysafe.corpus.contacts import numbers_in
from psysafe.corpus.outputs import refuse_inputs
from psysafe.data.languages import ENGLISH, row_language_or_english
from psysafe.data.rows import CLUSTER, Row, read_file, training_rows, write_rows
from psysafe.evaluation.word_lists import NUMBER, PAGE, SHORT_NUMBER
from psysafe.printable import counted, plain
from psysafe.services import Service, Services, add_arguments, checked_services, paths, shipped

SHOWN = 20  # lines of what is unknown
SHORT = 4  # digits of a number that may count something: "988" is replaced only where somebody calls it
CALL = r"\b(?:call|text|dial|ring|phone)(?:ing)?(?: or (?:call|text|dial|ring|phone))?(?: to)? "
COUNTRY = r"(?:(?: in the| in)? (?:US|UK)\b| \((?:US|UK)\))?"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", metavar="FILE", help="rows in any form that docs/recipe.md lists")
    add_arguments(parser, "helplines (docs/services.md)", required=True)
    parser.add_argument("--out", type=out_file, required=True, metavar="FILE",
                        help="JSONL: the same rows with other services")  # fmt: skip
    parser.add_argument("--keep-unknown", action="store_true",
                        help="write the rows although unknown numbers and pages stay in them")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """1, and nothing is written, where a row has numbers or pages that are unknown, unless --keep-unknown is given."""
    refuse_inputs("--out", args.out, {"the rows": [args.rows], "--services": paths(args.services)})
    services = checked_services(args.services, args.unchecked)
    rows = read_file(args.rows)
    training_rows(rows)  # for its errors; the rows keep the fields that they have
    localiser = Localiser(shipped(), services)
    new_rows, unknown = [], []
    for row in rows:
        fields = localiser.fields(row.fields)
        new_rows.append(Row(fields, row.file, row.number, row.line))
        unknown += [f"{row.where}: {contact}" for contact in localiser.unknown(fields)]
    changed = sum(old.fields != new.fields for old, new in zip(rows, new_rows, strict=True))
    for line in unknown[:SHOWN]:
        print(plain(line))
    if len(unknown) > SHOWN:
        print(f"... and {len(unknown) - SHOWN:,} more")
    if unknown and not args.keep_unknown:
        say(f"{counted(len(unknown), 'unknown contact')} (number or page), so nothing was written; replace them in the "
            "rows, or leave them there with --keep-unknown")  # fmt: skip
        return 1
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_rows(new_rows, Path(args.out))
    print(f"{changed:,} of {counted(len(rows), 'row')} name other services now: {args.out}")
    return 0


class Localiser:
    """Replaces what a text says of the known services by what the given ones say."""

    def __init__(self, known: Services, given: Services):
        self.given = given
        self.own_contacts = {text for service in given.services for text in _contacts(service)}
        self.own_contacts |= set(given.emergency.values())
        same = {_pieces(service) for service in given.services}  # not by key: a file of one's own may correct a number
        self.known = [service for service in known.services if _pieces(service) not in same]
        self.numbers = sorted(set(known.emergency.values()) | set(given.emergency.values()), key=len, reverse=True)

    def fields(self, fields: dict) -> dict:
        """The row with every text in it rewritten, except its prompts."""
        cluster, is_english = fields.get(CLUSTER), _is_english(fields)
        return _rewritten(fields, lambda text: self.text(text, cluster, is_english))

    def text(self, text: str, cluster: object = None, is_english: bool = True) -> str:
        """is_english: of the row. In another language nothing beside English call words is replaced."""
        text = self._mentions(self._lists(text, cluster), cluster)
        return self._emergency(self._short_numbers(text, cluster)) if is_english else text

    def unknown(self, fields: dict) -> list[str]:
        """Numbers and pages in the row's texts that are of no given service."""
        contacts: dict[str, None] = {}
        texts = _texts(fields)
        is_english = _is_english(fields)
        for text in texts:
            text = _typed(text)
            for own in sorted(self.own_contacts, key=len, reverse=True):
                text = _whole(own).sub(" ", text)
            for pattern in (NUMBER, SHORT_NUMBER, PAGE):
                contacts |= dict.fromkeys(match.group().rstrip(".,;)") for match in pattern.finditer(text))
            contacts |= {} if is_english else dict.fromkeys(numbers_in(text))
        return list(contacts)

    def _cluster_of(self, service: Service, cluster: object) -> str:
        return cluster if cluster in service.clusters else service.clusters[0]

    def _lists(self, text: str, cluster: object) -> str:
        """Lists of one line a country, as the bundled rows have them."""
        by_line = {service.line: service for service in (*self.known, *self.given.services)}
        any_line = "|".join(re.escape(line) for line in sorted(by_line, key=len, reverse=True))

        def replacement(match: re.Match) -> str:
            first = next(service for line, service in by_line.items() if match.group().startswith(line))
            return " ".join(service.line for service in self.given.of_cluster(self._cluster_of(first, cluster)))

        return re.sub(rf"(?:{any_line})(?: (?:{any_line}))*", replacement, text)

    def _mentions(self, text: str, cluster: object) -> str:
        """Names, numbers and pages that stand alone, in one pass: what was put in is not read again."""
        replacements: dict[str, str] = {}
        for service in self.known:
            given = self._counterpart(service, cluster)
            for old, new in zip(_pieces(service), _pieces(given), strict=True):
                if old:
                    replacements.setdefault(old, new or given.host)
            for start in ("https://", "http://", ""):  # as people write an address
                new = given.url if start else given.host
                replacements.setdefault(f"{start}{service.host}", new)
                replacements.setdefault(f"{start}www.{service.host}", new)
        replacements |= {own: own for service in self.given.services for own in _pieces(service) if own}
        pattern = "|".join(_whole(old).pattern for old in sorted(replacements, key=len, reverse=True))
        return re.sub(pattern, lambda match: replacements[_typed(match.group())], text)

    def _short_numbers(self, text: str, cluster: object) -> str:
        """`call 988`. Not `text 988`, because not every service reads texts."""
        for service in self.known:
            given = self._counterpart(service, cluster)
            if 0 < len(service.phone) <= SHORT and given.phone:
                pattern = rf"(\b(?:call|dial|ring|phone)(?:ing)? ){re.escape(service.phone)}(?![\w-]|[ ]\d)"
                text = re.sub(pattern, lambda match, new=given.phone: match[1] + new, text, flags=re.IGNORECASE)
        return text

    def _counterpart(self, service: Service, cluster: object) -> Service:
        """The given service for one that is known: of its country and key, else of its country, else the first."""
        candidates = self.given.of_cluster(self._cluster_of(service, cluster))
        return min(candidates, key=lambda s: (s.country != service.country, s.key != service.key))

    def _emergency(self, text: str) -> str:
        one = rf"(?:{'|'.join(self.numbers)})\b{COUNTRY}"
        given = self.given.emergency
        new = " or ".join(dict.fromkeys(given.values()))
        return re.sub(rf"({CALL}){one}(?:(?:,? or |, |/){one})*", lambda match: match[1] + new, text, flags=re.I)


def _is_english(fields: dict) -> bool:
    """Whether short numbers stand beside English words ("call 988") in a row, which no other language has."""
    return row_language_or_english(fields, "\n".join(_texts(fields))) == ENGLISH


def _contacts(service: Service) -> list[str]:
    return [text for text in (service.url, service.host, service.contact, service.phone) if text]


def _pieces(service: Service) -> tuple[str, str, str, str, str]:
    """What a text may say of a service, in the order in which it corresponds to that of another."""
    phone = service.phone if len(service.phone) > SHORT else ""
    return service.name, service.contact, phone, service.url, service.host


def _whole(text: str) -> re.Pattern:
    """The text as a word of its own; a page never as part of a longer address."""
    escaped = "".join(SAME_TO_READ.get(character, re.escape(character)) for character in text)
    return re.compile(rf"(?<![\w.@/-]){escaped}(?![\w-]|[./]\w)")


# A character of the files -> a pattern of what texts have instead: hard and narrow spaces, hyphens, apostrophes.
SAME_TO_READ = {" ": "[ \u00a0\u202f]", "-": "[-\u2010\u2011]", "'": "['\u2019]"}


def _typed(text: str) -> str:
    """The text in the characters that the files have."""
    for character, pattern in SAME_TO_READ.items():
        text = re.sub(pattern, character, text)
    return text


PROMPTS = {"prompt", "question", "instruction", "input", "context", "system", "system_prompt", CLUSTER}


def _rewritten(value: object, change: Callable[[str], str]) -> object:
    """The value with every text in it changed, but those of the person who asks."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_rewritten(item, change) for item in value]
    if isinstance(value, dict):
        if value.get("role", value.get("from")) in ("user", "human"):
            return value
        return {key: item if key in PROMPTS else _rewritten(item, change) for key, item in value.items()}
    return value


def _texts(value: object) -> Iterable[str]:
    """Every text that `_rewritten` changes."""
    texts: list[str] = []
    _rewritten(value, lambda text: texts.append(text) or text)
    return texts
