"""eval.py judge: answers of several settings side by side, scored on the four criteria.

    python eval.py judge --prompts rows.jsonl --adapter base --adapter runs/psysafe --system v0,v1 --out runs/judged \\
        --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen3.5-397B-A17B
    python eval.py judge --answers base=base.jsonl --answers tuned=tuned.jsonl --judge rules --out runs/judged
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from psysafe.data.rows import read_table
from psysafe.evaluation import criteria as judge
from psysafe.evaluation import judge_models as judges
from psysafe.evaluation import word_list_judge as rules
from psysafe.evaluation.models_under_test import BASE, Answered, Question, add_arguments, from_arguments, read_answers
from psysafe.evaluation.overlap import overlap, training_prompts
from psysafe.evaluation.result import Result, Table
from psysafe.evaluation.scores import Scores, align, relative_change, summarise
from psysafe.files import write_atomic
from psysafe.program import UserError

TEMPERATURE = 0.1
REPLIES = "replies.jsonl"
BENIGN = "benign"  # the cluster of rows that nobody should refuse: the criteria do not concern them
COLUMNS = [("setting", ""), ("n", ","), ("refusal %", ".1f"), ("grounding", ".2f"), ("references %", ".1f"),
           ("relevance", ".2f"), ("overall %", ".1f")]  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", action="append", metavar="[NAME=]FILE", default=[],
                        help="answers that are there already (generate.py --out); as often as needed")  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help="rows whose prompts are answered here")
    parser.add_argument("--rubric", metavar="FILE", default=judge.RUBRIC, help="the judge's instructions")
    parser.add_argument("--baseline", metavar="NAME", help="setting to which the others are compared (the first)")
    parser.add_argument("--train", nargs="*", default=[], metavar="FILE", help="training rows, to look for the prompts")
    add_arguments(parser, max_new_tokens=4096)
    judges.add_arguments(parser, "word lists; for tests and the tiny demo")


def run(args: argparse.Namespace) -> Result:
    if bool(args.answers) == bool(args.prompts):
        raise UserError("expected one of --prompts FILE (answered here) and --answers [NAME=]FILE")
    who = judges.from_arguments(args, TEMPERATURE)
    settings = {}
    if args.answers:
        answered: dict[str, Answered] = {}
        for spec in args.answers:
            for name, rows in read_answers(spec).items():
                if name in answered:
                    raise UserError(f"--answers {spec}: a setting {name!r} is there already; name it: NAME=FILE")
                answered[name] = rows
    else:
        answered, settings = answer_prompts(args)
    baseline = args.baseline or next(iter(answered))
    if baseline not in answered:
        raise UserError(f"--baseline {baseline}: no such setting; expected one of {'; '.join(answered)}")
    result = compare(answered, baseline, who, Path(args.rubric), Path(args.out))
    result.settings |= settings
    if args.train:
        result.contamination = overlap(next(iter(answered.values())).rows, training_prompts(args.train))
    return result


def answer_prompts(args: argparse.Namespace) -> tuple[dict[str, Answered], dict]:
    """Answers every prompt under every setting; (answers by setting, what they were made with)."""
    subject, settings = from_arguments(args)
    rows = read_table(args.prompts, ["prompt"])[: args.limit or None]
    questions = [Question(number, row["prompt"]) for number, row in enumerate(rows, 1)]
    made = subject.answers(settings, questions, Path(args.out) / "answers.jsonl")
    answered = {}
    for setting, by_number in made.items():
        mine = Answered(setting.adapter == BASE, {})
        for number, row in by_number.items():
            mine.repeated += row["prompt"] in mine.rows
            mine.rows.setdefault(row["prompt"], row | {"cluster": rows[number - 1].get("risk cluster", "")})
        answered[setting.name] = mine
    return answered, subject.facts() | {"prompts": str(args.prompts)}


def compare(
    answered: Mapping[str, Answered], baseline: str, who: judges.Judge | None, rubric: Path, out: Path
) -> Result:
    """Judges all settings on the prompts that they share and puts them side by side. who: None for the rules."""
    bases = [name for name, rows in answered.items() if rows.is_base] or [baseline]
    prompts, counts = align(
        {name: rows.rows for name, rows in answered.items()}, {n: rows.stuck for n, rows in answered.items()}, bases
    )
    asked = len(prompts)
    prompts = [p for p in prompts if answered[baseline].rows[p]["cluster"] != BENIGN]
    del counts["compared"]  # comes last, without the benign ones
    counts |= {"benign, not judged": asked - len(prompts), "compared": len(prompts)}
    if not prompts:
        found = ", ".join(f"{value} {key}" for key, value in counts.items())
        raise UserError(f"nothing to compare between {', '.join(answered)}: {found}")
    scored, replies, failed = score(answered, prompts, who, rubric, out)
    items = [
        {"setting": name, "prompt": prompt, **answered[name].rows[prompt], **asdict(scored[name][prompt])}
        | ({"reply": replies[name, prompt]} if (name, prompt) in replies else {})
        for name in answered
        for prompt in prompts
        if prompt in scored[name]
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "items.jsonl", "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))

    by = f"the {rules.NAME}" if who is None else who.name
    result = Result("judge", f"Four criteria, judged by {by}", [])
    result.settings = {"judge": rules.NAME} if who is None else {**who.settings, "rubric": _shown(rubric)}
    result.notes = [", ".join(f"{key}: {value:,}" for key, value in counts.items())]
    repeated = sum(rows.repeated for rows in answered.values())
    if repeated:
        result.notes.append(f"{repeated:,} answers to a prompt that stood there before were left out")
    empty = sum(scores == Scores(strategy=scores.strategy) for rows in scored.values() for scores in rows.values())
    if empty:
        result.notes.append(f"replies of the judge without any score: {empty:,}, in {out / REPLIES}")
    result.failed = failed
    result.tables = tables(answered, scored, baseline, by)
    return result


def _shown(rubric: Path) -> str:
    return "this project's wording (psysafe/assets/rubric.txt)" if rubric == judge.RUBRIC else str(rubric)


def score(answered, prompts: Sequence[str], who, rubric: Path, out: Path):
    """(scores by setting and prompt, the judge's replies, failed items)."""
    if who is None:
        try:
            scored = {
                name: {p: rules.judge(p, rows.rows[p]["answer"], rows.rows[p]["cluster"]).scores for p in prompts}
                for name, rows in answered.items()
            }
        except ValueError as error:
            raise UserError(f"answers of {', '.join(answered)}: {error}") from None
        return scored, {}, {}
    try:
        instructions = rubric.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{rubric}: not UTF-8 at byte {error.start}; expected the judge's instructions") from None
    asked = {}
    for name, rows in answered.items():
        for prompt in prompts:
            messages = judge.messages(instructions, prompt, rows.rows[prompt]["answer"])
            asked[name, prompt] = judges.item_key(who, messages), messages
    outcome = who.ask(dict(asked.values()), out / REPLIES)
    scored: dict[str, dict[str, Scores]] = {name: {} for name in answered}
    replies, failed = {}, {}
    for (name, prompt), (key, _) in asked.items():
        if key in outcome.rows:
            replies[name, prompt] = outcome.rows[key]["text"]
            scored[name][prompt] = judge.parse(replies[name, prompt])
        else:
            failed[f"{name}: {prompt[:60]}"] = outcome.failed[key]
    return scored, replies, failed


def tables(answered, scored: Mapping[str, Mapping[str, Scores]], baseline: str, by: str) -> list[Table]:
    """by: who judged; the tables of scores say so."""
    summaries = {name: summarise(rows.values()) for name, rows in scored.items()}

    def cells(name: str, s) -> list:
        return [name, s.n, s.refusal, [s.grounding, s.grounding_std], s.references, [s.relevance, s.relevance_std],
                s.overall]  # fmt: skip

    same = all(n == s.n for s in summaries.values() for n in s.counts.values())
    note = "" if same else "a criterion was missing in some replies: see the next table"
    rows = [cells(name, s) for name, s in summaries.items()]
    found = [Table(f"All prompts, judged by {by}", COLUMNS, rows, note, bars=["overall %"])]
    if not same:
        names = list(summaries[baseline].counts)
        found.append(Table("Answers that each figure is over", [("setting", ""), *((n, ",") for n in names)],
                           [[name, *s.counts.values()] for name, s in summaries.items()]))  # fmt: skip
    if len(summaries) > 1:
        changes = {n: relative_change(s, summaries[baseline]) for n, s in summaries.items() if n != baseline}
        columns = [("setting", ""), *((f"{name} %", "+.1f") for name in changes[next(iter(changes))])]
        rows = [[name, *change.values()] for name, change in changes.items()]
        note = "–: nothing to divide by" if any(None in row for row in rows) else ""
        found.append(Table(f"Relative change to {baseline}", columns, rows, note))
    clusters = list(dict.fromkeys(row["cluster"] for row in answered[baseline].rows.values() if row["cluster"]))
    rows = []
    for cluster in clusters:
        for name, by_prompt in scored.items():
            mine = [s for prompt, s in by_prompt.items() if answered[name].rows[prompt]["cluster"] == cluster]
            if mine:
                rows.append([cluster, *cells(name, summarise(mine))])
    if rows:
        found.append(Table(f"Per cluster, judged by {by}", [("cluster", ""), *COLUMNS], rows))
    return found
