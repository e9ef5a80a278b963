"""Numbers, addresses and services in a text, and those that are known.

A row teaches a model what to give to people in danger, so every number and every address in it has to be one that the
project knows. `known_services` is the only place where the tools for rows of one's own take them from.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from psysafe.files import clusters
from psysafe.services import Service, bundled, checked_services

ROUND_THE_CLOCK = re.compile(r"\b24\s?/\s?7\b")
# Three or more digits, with the marks that stand inside phone numbers. Years are none.
NUMBER = re.compile(r"(?<![\w])\+?\(?\d+(?:\)?[ ./-]?\(?\d+)*")
YEAR = re.compile(r"(?:19|20)\d\d")
MIN_DIGITS = 3
# Names with dots between them, after a scheme, a mailbox or neither. The last name has two small letters or more, so
# that "z.B." and "end.Then" are no host, or two letters or more outside ASCII.
HOST = re.compile(r"(?:https?://)?(?:[\w.+-]+@)?((?:[\w-]+\.)+(?:[a-z]{2,}|[^\W\d_a-zA-Z]{2,}))(?![\w-])")


class Services(NamedTuple):
    by_cluster: dict[str, list[Service]]
    emergency: dict[str, str]  # country -> number

    def all(self) -> list[Service]:
        return list(dict.fromkeys(service for services in self.by_cluster.values() for service in services))

    def numbers(self) -> set[str]:
        """The digits of every number that may be given."""
        phones = [service.phone for service in self.all() if service.phone]
        return {re.sub(r"\D", "", number) for number in [*phones, *self.emergency.values()]}

    def hosts(self) -> set[str]:
        return {host_name(service.host) for service in self.all()}

    def named_in(self, text: str) -> bool:
        """Whether a text names a service, with or without a way to reach it."""
        return any(service.name.lower() in text.lower() for service in self.all())


def known_services(names: Sequence[str] = (), unchecked: bool = False) -> Services:
    """The services that rows may name: of these country codes and files, or, without any, of the bundled rows."""
    services = checked_services(names, unchecked) if names else bundled()
    return Services({name: services.of_cluster(name) for name in clusters()["clusters"]}, services.emergency)


def numbers_in(text: str) -> list[str]:
    """What may be a phone number, as it is written, with ordinary digits."""
    text = ROUND_THE_CLOCK.sub(" ", HOST.sub(" ", unicodedata.normalize("NFKC", text)))
    numbers = [match[0] for match in NUMBER.finditer(text)]
    return [number for number in numbers if len(re.sub(r"\D", "", number)) >= MIN_DIGITS and not YEAR.fullmatch(number)]


def hosts_in(text: str) -> list[str]:
    """The host of every web or mail address, written out or not."""
    return [host_name(match[1]) for match in HOST.finditer(unicodedata.normalize("NFKC", text))]


def host_name(address: str) -> str:
    return address.lower().removeprefix("www.").partition("/")[0]


def unknown_contacts(text: str, services: Services) -> list[str]:
    """Numbers and addresses of a text that no known service has."""
    numbers, hosts = services.numbers(), services.hosts()
    unknown = [number for number in numbers_in(text) if re.sub(r"\D", "", number) not in numbers]
    return unknown + [host for host in hosts_in(text) if host not in hosts]
