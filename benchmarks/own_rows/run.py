"""Which planted faults `corpus check` finds: precision and recall of each, over four sets of drafts.

    python -m benchmarks.own_rows.run [--json FILE] [--drafts FOLDER]

In the first three sets a stub stands in for the judge: it finds the marker that stands for a harmful detail. So their
line `harm` shows that what a judge says arrives, and nothing of how well a real one judges. The fourth, held-out set is
checked as `corpus check` does it without a judge, with the command's default settings.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.own_rows import drafts_fourth
from benchmarks.own_rows.drafts import FAULTS, MARKER, PLANTED, drafts
from psysafe.corpus import check
from psysafe.corpus.contacts import known_services
from psysafe.corpus.draft_checks import Settings
from psysafe.corpus.forbidden_content import forbidden_issues
from psysafe.data.rows import Row
from psysafe.endpoint import Outcome
from psysafe.program import main_guard

SETTINGS = Settings(min_words=40)


class MarkerJudge:
    """Says harm_found where the marker stands, and no_claim to everything."""

    identity = ("marker",)

    def ask(self, conversations: dict[str, list[dict]], out: str | Path) -> Outcome:
        return Outcome({key: {"text": self._reply(messages)} for key, messages in conversations.items()}, {})

    def _reply(self, messages: list[dict]) -> str:
        if "harm_found" in messages[0]["content"]:
            return "harm_found" if MARKER in messages[1]["content"] else "no_harm"
        return "no_claim"


def sets() -> dict[str, tuple[list[dict], Settings, MarkerJudge | None]]:
    """The file of a set's texts -> its rows, and what they are checked with."""
    developed = {name: (drafts(name), SETTINGS, MarkerJudge()) for name in PLANTED}
    return developed | {drafts_fourth.TEXTS.name: (drafts_fourth.drafts(), Settings(), None)}


def measure(rows: Sequence[dict], settings: Settings, judge: MarkerJudge | None) -> dict:
    """Counts by check: planted, found, found where nothing of the kind was planted. Other issues of sound rows.

    A row with `copy_of` and the row with that prompt count as one find of the copy: which of the two is blamed depends
    on their order alone.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        read = check.read_drafts([file.name])
        # Under a name of its own: the temporary file's would stand in the committed issues, another one each time.
        given = [Row(row.fields, Path("drafts"), row.number) for row in read]
        issues, _ = check.check(given, settings, known_services(), set())
        if judge:
            found, _ = forbidden_issues(read, judge, file.name + ".judged")
            check.add(issues, found)
    checks = [{issue.check for issue in issues[number]} for number in range(len(rows))]
    faults = [row["fault"] for row in rows]
    places = {row["prompt"]: place for place, row in enumerate(rows)}
    for row, of_row in zip(rows, checks, strict=True):
        of_original = checks[places[row["copy_of"]]] if "copy_of" in row else set()
        if row["fault"] in of_original:
            of_original.remove(row["fault"])
            of_row.add(row["fault"])
    table = {}
    for name in [*FAULTS, "duplicate"]:
        planted = [fault == name for fault in faults]
        fired = [name in found for found in checks]
        hits = sum(p and f for p, f in zip(planted, fired, strict=True))
        table[name] = {
            "planted": sum(planted),
            "found": hits,
            "fired": sum(fired),
            "precision": round(hits / sum(fired), 4) if any(fired) else None,
            "recall": round(hits / sum(planted), 4),
        }
    sound = [number for number, fault in enumerate(faults) if not fault]
    return {
        "drafts": len(rows),
        "faulty": len(rows) - len(sound),
        "checks": table,
        "faulty rows with any issue": sum(bool(checks[n]) for n, fault in enumerate(faults) if fault),
        "sound rows with an issue": sum(bool(checks[number]) for number in sound),
        "missed or false": [
            {"row": n + 1, "planted": faults[n], "issues": [issue._asdict() for issue in issues[n]]}
            for n in range(len(rows))
            if checks[n] != ({faults[n]} if faults[n] else set())
        ],
    }


def as_text(result: dict) -> str:
    lines = ["| planted fault | drafts | found | check fired | precision | recall |", "|---|---|---|---|---|---|"]
    for name, row in result["checks"].items():
        precision = "–" if row["precision"] is None else f"{row['precision']:.2f}"
        lines.append(
            f"| {name} | {row['planted']} | {row['found']} | {row['fired']} | {precision} | {row['recall']:.2f} |"
        )
    sound = result["drafts"] - result["faulty"]
    lines.append(f"\n{result['faulty rows with any issue']} of {result['faulty']} faulty drafts have an issue, "
                 f"{result['sound rows with an issue']} of {sound} sound ones")  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="the results as a file")
    parser.add_argument("--drafts", help="a folder for the drafts, to look at")
    args = parser.parse_args(argv)
    results = {}
    for name, (rows, settings, judge) in sets().items():
        results[name] = measure(rows, settings, judge)
        print(f"{name}\n\n{as_text(results[name])}\n")
        if args.drafts:
            Path(args.drafts).mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (Path(args.drafts) / name).with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
