"""The flags of `python -m psysafe.serve`, and the place where it listens."""

import argparse
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from psysafe import services
from psysafe.cli import Parser, add_settings, read_settings, refuse_without_effect, setting, shown
from psysafe.program import UserError
from psysafe.services import Services

KEY_VARIABLE = "PSYSAFE_API_KEY"
NAME = r"[A-Za-z0-9][\w.:@/-]{0,99}"  # of a model
HOST = r"(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])"
ORIGIN = rf"(?:http://{HOST}(?!:80$)|https://{HOST}(?!:443$))(?::\d+)?"  # a browser leaves out the usual port
HELP = """The key that clients have to send is taken from the environment variable PSYSAFE_API_KEY alone; without one
only this machine is served. docs/serving.md has clients, fields and errors."""


@dataclass(frozen=True)
class Limits:
    """How much at once, how much for one request, and how long."""

    slots: int = setting(0, "Answers computed together; 0 for what fits in memory, up to 64 (CPU: 8).")
    context: int = setting(0, "Tokens of prompt and answer together; 0 for the model's limit, but at most 8,192.")
    max_queue: int = setting(64, "Answers that may wait; what comes beyond gets status 429.")
    max_new_tokens: int = setting(2048, "Tokens of an answer at most, its reasoning included.")
    max_think_tokens: int = setting(0, "Reasoning longer than this is closed, where a request says nothing; 0: never.")
    request_timeout: float = setting(600.0, "Seconds for a request, its time in the queue included.")
    grace: float = setting(30.0, "Seconds for answers that are on their way when SIGTERM comes.")
    max_body: int = setting(4_000_000, "Bytes of a request.")

    def __post_init__(self):
        minimum = {"max_new_tokens": 1, "request_timeout": 0.001, "max_body": 1}
        for name in self.__dataclass_fields__:
            value, least = getattr(self, name), minimum.get(name, 0)
            if not least <= value < 2**31:
                raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least {least}, and below 2^31")


@dataclass(frozen=True)
class Settings:
    """What is served, where, and to whom."""

    limits: Limits
    model: str | None
    adapters: dict[str, str]  # name -> folder or hub id
    base_name: str | None  # None: the base is not served
    system: str
    host: str
    port: int
    origins: tuple[str, ...]
    device: str
    dtype: str
    deterministic: bool
    services: Services | None  # on the page; None: the bundled ones


def parse(argv: Sequence[str], description: str) -> Settings:
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m psysafe.serve", description=description, epilog=HELP, formatter_class=kind,
                    allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("--model", help="folder, hub id or random:CONFIG.json (the first adapter's base, else the bundled model)")
    help_text = "adapters (PEFT), each with the name under which it is asked for"
    add("--adapter", nargs="+", action="extend", default=[], metavar="NAME=DIR", help=help_text)
    add("--name", default="base", help="under which the base is asked for (base)")
    add("--no-base", action="store_true", help="serve the adapters alone")
    add("--system", default="none", metavar="v0|v1|none|FILE", help="system prompt where a request has none (none)")
    services.add_arguments(parser, "helplines on the page")
    add("--host", default="127.0.0.1", help="where to listen (127.0.0.1: for this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="0 for any that is free (8000)")
    help_text = "web pages that may ask, such as http://localhost:3000"
    add("--cors", nargs="+", action="extend", default=[], metavar="ORIGIN", help=help_text)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="(auto: bfloat16 on a GPU)")
    add("--deterministic", action="store_true", help="read prompts one by one: in bfloat16 others change no answer")
    add_settings(parser, Limits)
    args = parser.parse_args(argv)
    reasons = {"--name": "with --no-base"} if args.no_base else {}
    refuse_without_effect(argv, reasons | services.without_effect(args))
    return Settings(
        limits=Limits(**read_settings(Limits, args)),
        model=args.model,
        adapters=_adapters(args.adapter, args.name, args.no_base),
        base_name=None if args.no_base else args.name,
        system=args.system,
        host=args.host,
        port=args.port,
        origins=tuple(map(_origin, args.cors)),
        device=args.device,
        dtype=args.dtype,
        deterministic=args.deterministic,
        services=services.from_arguments(args, every_cluster=False),
    )


def _adapters(words: Sequence[str], base_name: str, no_base: bool) -> dict[str, str]:
    """NAME=DIR words as a dict; UserError for a word of another form, and for a name that stands twice."""
    adapters: dict[str, str] = {}
    if not re.fullmatch(NAME, base_name):
        raise UserError(f"--name {shown(base_name)}: expected letters, digits and any of _ . : @ / -")
    for word in words:
        name, equals, folder = word.partition("=")
        if not (equals and folder and re.fullmatch(NAME, name)):
            raise UserError(f"--adapter {shown(word)}: expected NAME=DIR, such as tuned=runs/tiny")
        if name in adapters or (name == base_name and not no_base):
            raise UserError(f"--adapter {shown(word)}: {name} is the name of another model; give each its own")
        adapters[name] = folder
    if no_base and not adapters:
        raise UserError("--no-base: then there is nothing to serve; give --adapter NAME=DIR, or leave it out")
    return adapters


def _origin(text: str) -> str:
    if not re.fullmatch(ORIGIN, text):
        raise UserError(f"--cors {shown(text)}: expected an origin as browsers send it, such as http://localhost:3000")
    return text


def bind(host: str, port: int, key: str) -> socket.socket:
    """The socket for connections, not yet listening. UserError where it cannot be, or must not be without a key."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}, expected 0 to 65535")
    try:
        family, _, _, _, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))  # IPv4 first
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host {shown(host)}: no address of this machine ({error}); try 127.0.0.1") from None
    if not key and not ipaddress.ip_address(address[0]).is_loopback:
        remedy = f"set {KEY_VARIABLE} to a key of your own, or take --host 127.0.0.1"
        raise UserError(f"--host {host}: without a key only this machine is served; {remedy}")
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give another --port or --host") from None
    return listener


def host_names(host: str, listener: socket.socket) -> frozenset[str] | None:
    """What the Host header of a request to this socket may say; None for anything, where it listens on all addresses
    (then there is a key, which no web page of others knows)."""
    address, port = listener.getsockname()[:2]
    ip = ipaddress.ip_address(address)
    if ip.is_unspecified:
        return None
    names = {host.lower(), address} | ({"localhost", "127.0.0.1", "::1"} if ip.is_loopback else set())
    names = {f"[{name}]" if ":" in name else name for name in names}
    return frozenset({f"{name}:{port}" for name in names} | (names if port in (80, 443) else set()))
