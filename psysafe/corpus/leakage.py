"""Held-out prompts and answers that stand in training rows, system prompts or benchmarks."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from psysafe.cli import out_file
from psysafe.corpus.outputs import refuse_inputs, write_json
from psysafe.corpus.texts import TEMPLATE_CHARACTERS, answer_of, first_user_text, prompts_of, template, whole_words
from psysafe.data.prompts import system_text
from psysafe.data.rows import Row, read_rows
from psysafe.data.text import contains_words, normalise
from psysafe.printable import counted, plain

EXAMPLES = 3  # leaks shown of each kind


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--held-out", nargs="+", required=True, metavar="FILE", help="validation and test rows")
    parser.add_argument("--training", nargs="*", default=[], metavar="FILE", help="training rows")
    parser.add_argument("--system", nargs="*", default=[], metavar="SYSTEM", help="v0, v1 or files")
    parser.add_argument("--benchmark", nargs="*", default=[], metavar="FILE", help="XSTest, SORRY-Bench, ...")
    parser.add_argument("--json", type=out_file, metavar="FILE", help="write every leak there")


def run(args: argparse.Namespace) -> int:
    if args.json:
        names = "held_out", "training", "system", "benchmark"
        refuse_inputs("--json", args.json, {f"--{name.replace('_', '-')}": getattr(args, name) for name in names})
    leaks = leakage(
        read_rows(args.held_out),
        read_rows(args.training),
        {f"system prompt {name}": system_text(name) or "" for name in args.system},
        args.benchmark,
    )
    if args.json:  # before the text, which says that it is there
        write_json(args.json, as_json(leaks))
    print(plain(as_text(leaks, args.json or "")) if leaks else "no leaks")
    return 1 if leaks else 0


@dataclass(frozen=True)
class Leak:
    """One row whose prompt or answer stands somewhere that it should not."""

    row: Row
    what: str  # "prompt" or "answer"
    where: str  # a row, a system prompt or a benchmark
    file: str  # the same without the row's number
    exact: bool

    def __str__(self) -> str:
        return f"{self.row.where}: its {self.what} stands in {self.where} ({'exactly' if self.exact else 'normalised'})"


def as_text(leaks: Sequence[Leak], path: str) -> str:
    """Counts by kind with a few examples: templated rows leak by the thousand. path: of the file that lists all."""
    rows = {leak.row.where for leak in leaks}
    remedy = "" if path else "; --json FILE lists every one"
    lines = [f"{counted(len(leaks), 'leak')} of {counted(len(rows), 'row')}{remedy}"]
    for kind, members in _by_kind(leaks).items():
        lines += [f"\n{len(members):,} {kind}", *(f"  {leak}" for leak in members[:EXAMPLES])]
        lines += [f"  and {len(members) - EXAMPLES:,} more"] if len(members) > EXAMPLES else []
    return "\n".join([*lines, f"\nall of them in {path}"] if path else lines)


def as_json(leaks: Sequence[Leak]) -> dict:
    """The counts by kind, and every leak."""
    every = [{"row": x.row.where, "what": x.what, "where": x.where, "exact": x.exact} for x in leaks]
    return {"counts": {kind: len(members) for kind, members in _by_kind(leaks).items()}, "leaks": every}


def _by_kind(leaks: Sequence[Leak]) -> dict[str, list[Leak]]:
    """What stands where, and whether exactly -> its leaks."""
    kinds: dict[str, list[Leak]] = {}
    for leak in leaks:
        exactly = "exactly" if leak.exact else "normalised"
        kinds.setdefault(f"{leak.what}s of {leak.row.file} stand in {leak.file} ({exactly})", []).append(leak)
    return kinds


def leakage(
    held_out: Sequence[Row],
    training: Sequence[Row] = (),
    system_prompts: Mapping[str, str] | None = None,
    benchmarks: Sequence[str | Path] = (),
) -> list[Leak]:
    """Prompts of held-out rows, and the first 200 characters of their answers, that stand in a system prompt (by name)
    or in a training row; and prompts of benchmarks that are rows, held out or not."""
    leaks = []
    by_prompt, by_template = {}, {}
    for row in training:
        by_prompt.setdefault(normalise(first_user_text(row.fields)), row)
        by_template.setdefault(template(answer_of(row)), row)
    for row in held_out:
        prompt, answer = first_user_text(row.fields), answer_of(row)
        leaks += _quoted(row, system_prompts or {})
        twin = by_prompt.get(normalise(prompt)) if prompt else None
        if twin:
            leaks.append(Leak(row, "prompt", twin.where, str(twin.file), prompt == first_user_text(twin.fields)))
        twin = by_template.get(template(answer)) if answer else None
        if twin:
            leaks.append(Leak(row, "answer", twin.where, str(twin.file), _start(answer) == _start(answer_of(twin))))
    for path in benchmarks:
        leaks += _asked((*training, *held_out), path)
    return leaks


def _quoted(row: Row, system_prompts: Mapping[str, str]) -> Iterable[Leak]:
    """Leaks of a row into system prompts."""
    prompt, answer = first_user_text(row.fields), answer_of(row)
    for what, text, words in (("prompt", prompt, normalise(prompt)), ("answer", _start(answer), whole_words(answer))):
        for name, system in system_prompts.items():
            if contains_words(normalise(system), words):
                yield Leak(row, what, name, name, text in system)


def _asked(rows: Iterable[Row], path: str | Path) -> Iterable[Leak]:
    """Leaks of rows into a benchmark."""
    prompts = set(prompts_of(path))
    normalised = {normalise(prompt) for prompt in prompts}
    for row in rows:
        if normalise(first_user_text(row.fields)) in normalised:
            yield Leak(row, "prompt", str(path), str(path), first_user_text(row.fields) in prompts)


def _start(answer: str) -> str:
    return answer[:TEMPLATE_CHARACTERS]
