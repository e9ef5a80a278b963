"""Schema problems with line numbers."""

import argparse
from pathlib import Path

from psysafe.data.chat_template import chat_pieces, read_turns
from psysafe.data.rows import CATEGORY, CLUSTER, Row, read_file, schema_problems
from psysafe.data.text import normalise
from psysafe.files import clusters
from psysafe.program import UserError

REQUIRED = ("prompt", "answer", CLUSTER, CATEGORY, "framework_name")
EXPECTED_ROW = f"expected an object with {', '.join(REQUIRED)}, or with messages"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    strategies = {name: entry["strategies"] for name, entry in clusters()["clusters"].items()} | {"benign": []}
    problems = [problem for path in args.files for problem in validate(path, strategies)]
    print("\n".join(problems) if problems else "no problems")
    return 1 if problems else 0


def validate(path: str | Path, strategies: dict[str, list[str]]) -> list[str]:
    """Everything that is wrong with a file's rows, a line each. strategies: of every known cluster."""
    problems: list[str] = []
    first_with: dict[str, str] = {}  # normalised prompt -> where it stands first
    for row in read_file(path):
        fields = row.fields
        row_problems = schema_problems(fields, EXPECTED_ROW, REQUIRED, ("reasoning", "reasoning_language"))
        if isinstance(fields, dict) and isinstance(fields.get("messages"), list):
            row_problems += _message_problems(row)
        elif isinstance(fields, dict) and row.messages is None:
            row_problems += _strategy_problems(fields, strategies)
            if isinstance(fields.get("prompt"), str):
                first = first_with.setdefault(normalise(fields["prompt"]), row.where)
                if first != row.where:
                    row_problems.append(f"the same prompt as {first}")
        problems += [f"{row.where}: {problem}" for problem in row_problems]
    return problems


def _message_problems(row: Row) -> list[str]:
    try:
        chat_pieces(read_turns(row.messages), row.tools)
    except UserError as error:
        return [str(error)]
    return []


def _strategy_problems(fields: dict, strategies: dict[str, list[str]]) -> list[str]:
    cluster, strategy = fields.get(CLUSTER), fields.get("framework_name")
    if not isinstance(cluster, str):
        return []
    if cluster not in strategies:
        return [f"unknown {CLUSTER} {cluster!r}; known: {', '.join(strategies)}"]
    if strategies[cluster] and strategy not in strategies[cluster]:
        return [f"{strategy!r} is no strategy of {cluster!r}: {', '.join(strategies[cluster])}"]
    return []
