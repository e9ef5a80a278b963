"""The system prompt v1 with the services of another country, as a file for --system."""

import argparse
import re
import tomllib
from pathlib import Path

from psysafe.cli import out_file
from psysafe.corpus.outputs import refuse_inputs
from psysafe.data.prompts import system_text
from psysafe.files import ASSETS, clusters, read_text, write_atomic
from psysafe.services import Services, add_arguments, bundled, checked_services, paths


def arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, "helplines (docs/services.md)", required=True)
    parser.add_argument("--out", type=out_file, required=True, metavar="FILE",
                        help="text file to write, for --system FILE")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    refuse_inputs("--out", args.out, {"--services": paths(args.services)})
    services = checked_services(args.services, args.unchecked)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, system_prompt(services) + "\n")
    print(f"the system prompt v1 with services of {', '.join(services.emergency)}: {args.out}")
    return 0


def system_prompt(services: Services) -> str:
    """v1, in which each cluster names the given services."""
    text = system_text("v1")
    passages = tomllib.loads(read_text(ASSETS / "system_v1_passages.toml"))["passage"]
    replacements = {p["bundled"]: _filled(p["given"], services) for p in passages}
    for name in clusters()["clusters"]:
        replacements[_lines(bundled(), name)] = _lines(services, name)
    for old, new in replacements.items():
        assert text.count(old) == 1, old  # both files are ours, and a test compares them
        text = text.replace(old, new)
    return text


def _lines(services: Services, cluster: str) -> str:
    return " ".join(service.line for service in services.of_cluster(cluster))


def _filled(template: str, services: Services) -> str:
    """{emergency} and {services of CLUSTER} filled in."""
    text = template.replace("{emergency}", " or ".join(dict.fromkeys(services.emergency.values())))
    return re.sub(r"\{services of ([^}]+)\}", lambda match: _lines(services, match[1]), text)
