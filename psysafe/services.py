"""Helplines by country, from files of assets/services/ or of one's own (docs/services.md says what each key means)."""

import argparse
import datetime
import functools
import hashlib
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from psysafe.cli import say
from psysafe.files import ASSETS, MAX_TEXT_BYTES, clusters, expand, read_text
from psysafe.program import UserError

FOLDER = ASSETS / "services"
BUNDLED = ("US", "UK")  # whose services stand in the bundled rows, in this order
MAX_AGE = datetime.timedelta(days=365)  # of a check
ONE_DAY = datetime.timedelta(days=1)
FLAGS = ("--services", "--unchecked")  # of `add_arguments`


@dataclass(frozen=True)
class Service:
    key: str
    clusters: tuple[str, ...]  # that it is for
    name: str
    country: str
    url: str
    source: str  # the page on which number and address were read, or are to be checked
    phone: str = ""  # "" for a service that is reached over its page
    contact: str = ""  # how a text introduces the number: "call or text 988"
    hours: str = ""  # "" where they are not certain
    page_date: datetime.date | None = None  # that the source states
    checked: bool = False  # whether somebody has looked at the live page
    checked_on: datetime.date | None = None

    @property
    def host(self) -> str:
        """The page as a person would type it."""
        return self.url.removeprefix("https://").removesuffix("/")

    @property
    def reach(self) -> str:
        """`116 123, samaritans.org`, or the page alone."""
        return f"{self.contact}, {self.host}" if self.contact else self.host

    @property
    def line(self) -> str:
        """As the bundled rows name it: `UK: Samaritans, 116 123, samaritans.org.`"""
        return f"{self.country}: {self.name}, {self.reach}."

    def named_in(self, text: str) -> bool:
        """Whether the text names the service with a way to reach it."""
        named = self.name.lower() in text.lower()
        return named and any(stands_in(contact, text) for contact in (self.phone, self.host) if contact)


@dataclass(frozen=True)
class Services:
    names: tuple[str, ...]  # of the files, as they were asked for
    services: tuple[Service, ...]
    emergency: dict[str, str]  # country -> number; the countries in order
    digest: str  # SHA-256 of the files' text

    def of_cluster(self, cluster: str) -> list[Service]:
        """The services of a cluster, in the order of the countries."""
        return [service for service in self.services if cluster in service.clusters]

    def crisis(self) -> list[Service]:
        return self.of_cluster(clusters()["order"][0])

    def emergency_text(self) -> str:
        return ", ".join(f"{number} ({country})" for country, number in self.emergency.items())


def stands_in(contact: str, text: str) -> bool:
    """A number or page as a word of its own: 988 is not in 1988, and stopitnow.org not in stopitnow.org.uk."""
    return re.search(rf"(?<![\w.-]){re.escape(contact)}(?![\w-]|\.\w)", text, re.IGNORECASE) is not None


@functools.cache
def bundled() -> Services:
    """The services of the bundled rows and prompts."""
    return read_services(BUNDLED)


@functools.cache
def shipped() -> Services:
    """The services of every country that comes with the project."""
    return read_services(countries())


def countries() -> list[str]:
    """The codes of the files that come with the project, those of the bundled rows first."""
    others = sorted({path.stem for path in FOLDER.glob("*.toml")} - set(BUNDLED))
    return [*BUNDLED, *others]


def read_services(names: Sequence[str], today: datetime.date | None = None) -> Services:
    """The services of country codes (AU) and files. UserError of one line names file, entry and key.

    today: for tests; a checked_on that is yet to come is a mistake in the file.
    """
    emergency: dict[str, str] = {}
    services: list[Service] = []
    texts = []
    for name in names:
        path, text = _text(name)
        country, number, entries = _parsed(path, text, today or datetime.date.today())
        if country in emergency:
            raise UserError(f"{path}: services of {country} stand in an earlier file, too; give each country once")
        emergency[country] = number
        services += entries
        texts.append(text)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Services(tuple(names), tuple(services), emergency, digest)


def require_checked(services: Services, unchecked: bool = False, today: datetime.date | None = None) -> None:
    """UserError that names the entries which nobody has looked up on the live page, unless `unchecked` allows them.

    Entries that somebody looked up more than MAX_AGE ago are named in a warning on stderr. today: for tests.
    """
    flag = f"--services {' '.join(services.names)}"
    names = [f"{service.name} ({service.country})" for service in services.services if not service.checked]
    if names and not unchecked:
        raise UserError(
            f"{flag}: not checked on the live page: {', '.join(names)}; check them and set checked and checked_on in a "
            "file of your own, or allow them with --unchecked"
        )
    today = today or datetime.date.today()
    old = [f"{s.name} ({s.country}, {s.checked_on})" for s in services.services if _is_old(s, today)]
    if old:
        say(f"warning: {flag}: checked more than a year ago: {', '.join(old)}; look at their pages again")


def _is_old(service: Service, today: datetime.date) -> bool:
    return service.checked and today - service.checked_on > MAX_AGE


def require_clusters(services: Services) -> None:
    """UserError that names the clusters for which there is no service."""
    missing = [name for name in clusters()["order"] if not services.of_cluster(name)]
    if missing:
        raise UserError(
            f"--services {' '.join(services.names)}: no service for {', '.join(missing)}; expected one for each of "
            f"{', '.join(clusters()['order'])}"
        )


def to_check(services: Services, today: datetime.date) -> list[str]:
    """A line for each entry that nobody has checked, or not within MAX_AGE."""
    lines = []
    for service in services.services:
        name = f"{service.country}: {service.name}, {service.reach}"
        if not service.checked:
            dated = f", which is dated {service.page_date}" if service.page_date else ""
            lines.append(f"{name}: not checked; look at {service.source}{dated}")
        elif _is_old(service, today):
            lines.append(f"{name}: checked on {service.checked_on}, more than a year ago; look at {service.source}")
    return lines


# On a command line


def add_arguments(parser: argparse.ArgumentParser, about: str, required: bool = False) -> None:
    """--services and --unchecked, for `from_arguments`. about: what the helplines are for."""
    default = "" if required else " (US UK)"
    parser.add_argument("--services", nargs="+", default=[], required=required, metavar="FILE",
                        help=f"{about}: countries of the project, or files{default}")  # fmt: skip
    parser.add_argument("--unchecked", action="store_true", help="also helplines of --services that nobody has checked")


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    """For `refuse_without_effect`."""
    return {} if args.services else {"--unchecked": "without --services FILE"}


def from_arguments(args: argparse.Namespace, every_cluster: bool = True) -> Services | None:
    """The helplines of --services, None without it. UserError as of `require_checked`, and of `require_clusters`
    unless only those of a crisis are shown."""
    return checked_services(args.services, args.unchecked, every_cluster) if args.services else None


def checked_services(names: Sequence[str], unchecked: bool = False, every_cluster: bool = True) -> Services:
    """The services of country codes and files that may be used. Arguments and errors as of `from_arguments`."""
    services = read_services(names)
    if every_cluster:
        require_clusters(services)
    require_checked(services, unchecked)  # last: it may warn, and services that are refused have one line, the error
    return services


def paths(names: Sequence[str]) -> list[str]:
    """The files of country codes and files, for commands that must not overwrite what they read."""
    return [str(_path(name)) for name in names]


def refuse_in_folder(names: Sequence[str], out: str) -> None:
    """UserError where a file of --services lies in the folder `out` under a name that an evaluation writes there."""
    for path in map(Path, paths(names)):
        if path.suffix in WRITTEN and path.is_file() and path.resolve().is_relative_to(Path(out).resolve()):
            raise UserError(f"--out {out}: {path} is a file of --services, and might be overwritten; give another")


# A file

WRITTEN = (".json", ".jsonl", ".md", ".html", ".csv", ".tex")  # how the files of evaluations and pages end
REQUIRED = ("clusters", "name", "url", "source", "checked")


def _path(name: str) -> Path:
    return FOLDER / f"{name}.toml" if name in countries() else Path(expand(name))


def _text(name: str) -> tuple[Path, str]:
    path = _path(name)
    try:
        return path, read_text(path, MAX_TEXT_BYTES)
    except OSError as error:
        reason, known = error.strerror or error, ", ".join(countries())
        raise UserError(f"--services {name}: cannot be read ({reason}); expected a file or one of {known}") from None


def _parsed(path: Path, text: str, today: datetime.date) -> tuple[str, str, list[Service]]:
    """(country, emergency number, services) of a file's text."""
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML ({str(error).splitlines()[0]})") from None
    if unknown := content.keys() - {"country", "emergency", "services"}:
        raise UserError(f"{path}: {min(unknown)!a:.60} is no key of it; expected country, emergency, services")
    country, emergency = (_required_text(path, content, key) for key in ("country", "emergency"))
    if not re.fullmatch("[A-Z]{2}", country):
        raise UserError(f"{path}: country is {country!a:.60}; expected two capital letters, such as AU")
    if not re.fullmatch(r"\d{2,6}", emergency):
        raise UserError(f"{path}: emergency is {emergency!a:.60}; expected the digits of a number")
    tables = content.get("services")
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"{path}: no services in it; expected a table [services.NAME] for each")
    return country, emergency, [_service(path, country, key, table, today) for key, table in tables.items()]


def _service(path: Path, country: str, key: str, table: object, today: datetime.date) -> Service:
    where = f"{path}: services.{key}"
    if not isinstance(table, dict):
        raise UserError(f"{where}: {table!a:.60}; expected a table [services.{key}]")
    for name in REQUIRED:
        if name not in table:
            raise UserError(f"{where}: no {name} in it; expected {', '.join(REQUIRED)}")
    for name, value in table.items():
        rule = RULES.get(name)
        if rule is None:
            raise UserError(f"{where}: {name!a:.60} is no key of a service; expected some of {', '.join(RULES)}")
        if not rule.holds(value):
            raise UserError(f"{where}: {name} is {value!a:.60}; expected {rule.expected}")
    _check_together(where, table)
    # A day more: east of here it may be tomorrow already.
    if "checked_on" in table and table["checked_on"] > today + ONE_DAY:
        expected = "expected the day on which somebody looked at the page"
        raise UserError(f"{where}: checked_on is {table['checked_on']}, which is yet to come; {expected}")
    values = table | {"clusters": tuple(table["clusters"])}
    return Service(key=key, country=country, **values)


def _check_together(where: str, table: dict) -> None:
    if ("phone" in table) != ("contact" in table) or table.get("phone", "") not in table.get("contact", ""):
        raise UserError(f"{where}: expected phone and contact, with the number in contact, or neither")
    if table["checked"] != ("checked_on" in table):
        there = "with" if "checked_on" in table else "without"
        given = f"checked = {str(table['checked']).lower()} {there} checked_on"
        expected = "expected checked = true and the day in checked_on, or checked = false alone"
        raise UserError(f"{where}: {given}; {expected}")


@dataclass(frozen=True)
class _Rule:
    holds: Callable[[object], bool]
    expected: str


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value == value.strip() != "" and value.isprintable()


def _is_date(value: object) -> bool:
    return isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)


def _are_clusters(value: object) -> bool:
    known = clusters()["clusters"]
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name in known for name in value)


def _is_address(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"https?://[\w.-]+\.\w+(?:/[^\s\"<>]*)?", value) is not None


_TEXT = _Rule(_is_text, "a text of one line without blanks around it")
_DATE = _Rule(_is_date, "a date, such as 2026-01-31 (without quotation marks)")
_ADDRESS = _Rule(_is_address, "an address that begins with https://")
RULES = {
    "clusters": _Rule(_are_clusters, "a list of clusters of clusters.toml"),
    "name": _TEXT,
    "phone": _Rule(lambda v: _is_text(v) and bool(re.fullmatch(r"\+?[\d ()-]*\d[A-Z\d-]*", v)), "a phone number"),
    "contact": _TEXT,
    "hours": _TEXT,
    "url": _Rule(lambda v: _is_address(v) and v.startswith("https://"), "an address that begins with https://"),
    "source": _ADDRESS,
    "page_date": _DATE,
    "checked": _Rule(lambda v: isinstance(v, bool), "true or false"),
    "checked_on": _DATE,
}


def _required_text(path: Path, content: dict, key: str) -> str:
    value = content.get(key)
    if not _is_text(value):
        raise UserError(f"{path}: {key} is {value!a:.60}; expected a text")
    return value
