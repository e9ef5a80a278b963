"""Tools for the rows before training.

    python -m psysafe.corpus stats FILE... [--model DIR] [--max-tokens N] [--plot DIR] [--json FILE]
    python -m psysafe.corpus validate FILE...
    python -m psysafe.corpus split FILE... --out DIR [--val 100] [--test 100] [--seed 42] [--quoted-in SYSTEM ...]
    python -m psysafe.corpus leakage --held-out FILE... [--training FILE...] [--system SYSTEM...] [--benchmark FILE...]
    python -m psysafe.corpus impute FILE... --out FILE --url URL --model-name NAME [--key-variable VARIABLE]

validate and leakage exit with 1 when they find something, impute when a row is left without reasoning.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from psysafe.checkpoint.base import resolve_model
from psysafe.corpus import tools
from psysafe.corpus.impute import impute
from psysafe.data.documents import read_rows
from psysafe.data.prompts import system_text
from psysafe.data.tokenizer import load_tokenizer
from psysafe.endpoint import Endpoint, key_from
from psysafe.files import ASSETS, expand, write_atomic
from psysafe.program import UserError, main_guard


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m psysafe.corpus", description="Tools for the rows before training.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, add in (
        ("stats", run_stats, add_stats),
        ("validate", run_validate, add_validate),
        ("split", run_split, add_split),
        ("leakage", run_leakage, add_leakage),
        ("impute", run_impute, add_impute),
    ):
        command = commands.add_parser(name, help=run.__doc__.split(".")[0])
        add(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    return args.run(args)


def add_stats(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument("--model", default="assets:tiny", help="whose tokenizer counts (default: the bundled one)")
    command.add_argument("--max-tokens", type=int, default=4096, help="the limit that rows are counted against (4096)")
    command.add_argument("--plot", metavar="DIR", help="write lengths.png there")
    command.add_argument("--json", metavar="FILE", help="write the numbers there as well")


def run_stats(args) -> int:
    """Rows, clusters, categories, duplicates, token lengths."""
    rows = read_rows([expand(path) for path in args.files])
    found = tools.stats(rows, load_tokenizer(resolve_model(args.model)[0]), args.max_tokens)
    print(tools.stats_text(found))
    lengths = found.pop("lengths")
    if args.json:
        write_atomic(args.json, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    if args.plot:
        folder = Path(args.plot)
        folder.mkdir(parents=True, exist_ok=True)
        tools.plot_lengths(lengths, args.max_tokens, folder / "lengths.png")
        print(f"\nhistogram in {folder / 'lengths.png'}")
    return 0


def add_validate(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", metavar="FILE")


def run_validate(args) -> int:
    """Schema problems with line numbers."""
    clusters = tomllib.loads((ASSETS / "clusters.toml").read_text(encoding="utf-8"))["clusters"]
    known = {name: entry["strategies"] for name, entry in clusters.items()} | {"benign": []}
    problems = [problem for path in args.files for problem in tools.validate(expand(path), known)]
    print("\n".join(problems) if problems else "no problems")
    return 1 if problems else 0


def add_split(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument("--out", required=True, metavar="DIR", help="receives train.jsonl, val.jsonl and test.jsonl")
    command.add_argument("--val", type=int, default=100, help="validation rows a cluster (100)")
    command.add_argument("--test", type=int, default=100, help="test rows a cluster (100)")
    command.add_argument("--seed", type=int, default=tools.SPLIT_SEED)
    quoted = "prompts quoted in these system prompts stay in train"
    command.add_argument("--quoted-in", nargs="*", default=[], metavar="SYSTEM", help=quoted)


def run_split(args) -> int:
    """Stratified train, val and test files."""
    if args.val < 0 or args.test < 0:
        raise UserError(f"--val {args.val} --test {args.test}: expected numbers that are not negative")
    rows = read_rows([expand(path) for path in args.files])
    quoted = [system_text(name) or "" for name in args.quoted_in]
    parts = tools.split(rows, args.val, args.test, args.seed, quoted)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, members in parts.items():
        tools.write_rows(members, out / f"{name}.jsonl")
        print(f"{len(members):>7,}  {out / name}.jsonl")
    return 0


def add_leakage(command: argparse.ArgumentParser) -> None:
    command.add_argument("--held-out", nargs="+", required=True, metavar="FILE", help="validation and test rows")
    command.add_argument("--training", nargs="*", default=[], metavar="FILE", help="training rows")
    command.add_argument("--system", nargs="*", default=[], metavar="SYSTEM", help="v0, v1 or files")
    command.add_argument("--benchmark", nargs="*", default=[], metavar="FILE", help="XSTest, SORRY-Bench, ...")


def run_leakage(args) -> int:
    """Held-out prompts and answers that stand in training rows, system prompts or benchmarks."""
    leaks = tools.leakage(
        read_rows([expand(path) for path in args.held_out]),
        read_rows([expand(path) for path in args.training]) if args.training else [],
        {f"system prompt {name}": system_text(name) or "" for name in args.system},
        [expand(path) for path in args.benchmark],
    )
    print("\n".join(str(leak) for leak in leaks) if leaks else "no leaks")
    return 1 if leaks else 0


def add_impute(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument("--out", required=True, metavar="FILE", help="JSONL of all rows, reasoning filled in")
    command.add_argument("--url", required=True, help="OpenAI-compatible endpoint, like http://localhost:8000/v1")
    command.add_argument("--model-name", required=True, help="the model's name at the endpoint")
    command.add_argument("--key-variable", default="PSYSAFE_API_KEY", help="environment variable that holds the key")
    command.add_argument("--workers", type=int, default=8, help="requests under way at once (8)")
    command.add_argument("--temperature", type=float, default=0.7)
    command.add_argument("--max-tokens", type=int, default=2048, help="longest reply (2048)")


def run_impute(args) -> int:
    """Reasoning traces for rows that have none, from a model behind an endpoint."""
    rows = read_rows([expand(path) for path in args.files])
    options = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    endpoint = Endpoint(args.url, args.model_name, key_from(args.key_variable), **options)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = out.with_name(out.name + ".traces.jsonl")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    filled, failed = impute(rows, endpoint, journal, args.workers, say)
    tools.write_rows(filled, out)
    for where, reason in failed.items():
        print(f"{where}: no reasoning: {reason}")
    print(f"{len(filled) - len(failed):,} of {len(filled):,} rows have reasoning or need none; {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
