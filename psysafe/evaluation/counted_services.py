"""Whose helplines count as the right ones where word lists judge: those of --services, else the bundled ones."""

import argparse

from psysafe import services
from psysafe.evaluation.result import Result
from psysafe.services import Services


def add_arguments(parser: argparse.ArgumentParser) -> None:
    services.add_arguments(parser, "the helplines that count")


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    """Of an evaluation in which helplines count only where --judge rules is one of the judges."""
    return services.without_effect(args) if args.judge else dict.fromkeys(services.FLAGS, "without --judge rules")


def record(result: Result, given: Services | None) -> None:
    """Says in a result whose helplines counted, where they are not the bundled ones."""
    if given:
        result.settings["services"] = f"{' '.join(given.names)} (SHA-256 {given.digest[:16]})"
        result.notes.append(f"Helplines that count: those of {', '.join(given.emergency)}.")
