"""One result of several judges: what each of them says, as it would alone, and how far they agree.

Each judge's own result is saved in a folder of its name, `judges/NAME` of --out, as if no other one had been asked. The
common result shows the tables of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from psysafe.evaluation.judge_models import Judge, file_name
from psysafe.evaluation.result import Result, Table
from psysafe.evaluation.stored import ITEMS
from psysafe.program import UserError


def folder_of(judge: Judge | None, judges: Sequence[Judge | None], out: Path) -> Path:
    """Where a judge's own files are written: `out` where it is the only one."""
    return out if len(judges) == 1 else out / "judges" / file_name(judge)


def one_result(
    title: str, results: Mapping[str, Result], judges: Sequence[Judge | None], agreement: Sequence[Table], out: Path
) -> Result:
    """The only judge's result, or that of all judges, after each one's own has been saved.

    results: by the judges' names, in their order, complete. UserError where no judge could be asked: there is nothing
    to show then.
    """
    if len(judges) == 1:
        return next(iter(results.values()))
    if all(judge is not None and judge.unusable for judge in judges):
        raise UserError(judges[0].unusable)
    for judge, result in zip(judges, results.values(), strict=True):
        result.save(folder_of(judge, judges, out))
    # Of a run with one judge: it would be taken for one of these judges'.
    (out / ITEMS).unlink(missing_ok=True)
    first_judges = next(iter(results.values()))
    firsts = [_named(name, result.tables[0]) for name, result in results.items()]
    of_answers = [table for table in first_judges.tables if table.of_answers]
    others = [
        _named(name, table) for name, result in results.items() for table in result.tables[1:] if not table.of_answers
    ]
    tables = [*firsts, *agreement, *others, *of_answers]
    whole = Result(first_judges.kind, f"{title}, judged by {', '.join(results)}", tables)
    whole.settings, whole.contamination = _settings(results), first_judges.contamination
    notes = [note for result in results.values() for note in result.notes]
    for name, result in results.items():
        of_all = [note for note in result.notes if notes.count(note) == len(results)]
        whole.notes += [note for note in of_all if note not in whole.notes]
        whole.notes += [f"{name}: {note}" for note in result.notes if note not in of_all]
        if result.unscored:
            whole.unscored += f"{'; ' if whole.unscored else ''}{name}: {result.unscored}"
        whole.failed |= {f"{name}: {item}": reason for item, reason in result.failed.items()}
    return whole


def _named(judge: str, table: Table) -> Table:
    """The table with its judge in the title, where it does not stand there already."""
    return table if f"judged by {judge}" in table.title else replace(table, title=f"{table.title}, judged by {judge}")


def _settings(results: Mapping[str, Result]) -> dict:
    """What all judges have in common, and by the judge's name what differs."""
    whole = {"judge": ", ".join(results)}
    for key in dict.fromkeys(key for result in results.values() for key in result.settings if key != "judge"):
        values = {name: result.settings[key] for name, result in results.items() if key in result.settings}
        first, *others = values.values()
        is_common = len(values) == len(results) and all(value == first for value in others)
        whole |= {key: first} if is_common else {f"{key}, {name}": value for name, value in values.items()}
    return whole
