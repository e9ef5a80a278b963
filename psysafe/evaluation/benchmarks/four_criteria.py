"""eval.py judge: answers of several variants side by side, scored on the four criteria.

    python eval.py judge --prompts rows.jsonl --adapter base --adapter runs/psysafe --system v0,v1 --out runs/judged \\
        --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen3.5-397B-A17B
    python eval.py judge --answers base=base.jsonl --answers tuned=tuned.jsonl --judge rules --out runs/judged
"""

import argparse
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from psysafe.data.rows import CLUSTER, Row, read_prompts
from psysafe.evaluation import criteria, judge_models, models_under_test, unfinished, word_list_judge
from psysafe.evaluation.benchmark import Evaluation
from psysafe.evaluation.criteria import COLUMNS, Scores, relative_change, summarise
from psysafe.evaluation.judge_models import Judge, ask_all
from psysafe.evaluation.models_under_test import (
    BASE,
    Question,
    VariantAnswers,
    conversation,
    conversation_text,
    only_rank_0,
    read_answers,
)
from psysafe.evaluation.overlap import add_training_argument, overlap_with_files
from psysafe.evaluation.result import Result, Table
from psysafe.files import MAX_TEXT_BYTES, read_text, write_atomic
from psysafe.program import UserError

TEMPERATURE = 0.1  # of the judge, as in the publication
REPLIES = "replies.jsonl"
BENIGN = "benign"  # the cluster of rows that nobody should refuse: the criteria do not concern them


class FourCriteria(Evaluation):
    name = "judge"
    help = "answers scored on four criteria by a judge"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--answers", action="append", metavar="[NAME=]FILE", default=[],
                            help="answers that are there already (generate.py --out); as often as needed")  # fmt: skip
        parser.add_argument("--prompts", metavar="FILE", help="rows whose prompts are answered here")
        parser.add_argument("--rubric", metavar="FILE", default=criteria.RUBRIC, help="the judge's instructions")
        parser.add_argument("--baseline", metavar="NAME", help="variant to which the others are compared (the first)")
        add_training_argument(parser)
        unfinished.add_argument(parser)
        models_under_test.add_arguments(parser, max_new_tokens=4096)
        judge_models.add_arguments(parser, "word lists; for tests and the tiny demo")

    def answers_on_ranks(self, args: argparse.Namespace) -> bool:
        return bool(args.prompts)

    def without_effect(self, args: argparse.Namespace) -> dict[str, str]:
        reasons = judge_models.without_effect(args) | models_under_test.without_effect(args)
        if args.judge:
            reasons["--rubric"] = "with --judge rules"
        if args.answers:
            reasons |= dict.fromkeys(models_under_test.FLAGS, "with --answers: they are written already")
        if args.answers and args.judge_local:  # the judge runs there
            del reasons["--device"], reasons["--dtype"]
        return reasons

    def run(self, args: argparse.Namespace) -> Result:
        if bool(args.answers) == bool(args.prompts):
            raise UserError("expected one of --prompts FILE (answered here) and --answers [NAME=]FILE")
        judge = judge_models.from_arguments(args, TEMPERATURE)
        answers, settings = (read_all(args.answers, args.limit), {}) if args.answers else answer_prompts(args)
        baseline = args.baseline or next(iter(answers))
        if baseline not in answers:
            raise UserError(f"--baseline {baseline}: no such variant; expected one of {'; '.join(answers)}")
        if args.baseline and len(answers) == 1:
            raise UserError(f"--baseline {baseline} has no effect: it is the only variant; leave it out")
        result = compare(answers, baseline, judge, Path(args.rubric), Path(args.out), args.rules)
        result.settings |= settings
        result.contamination = overlap_with_files(next(iter(answers.values())).rows, args.train)
        return result


def read_all(specs: Sequence[str], limit: int = 0) -> dict[str, VariantAnswers]:
    """The answers of all --answers files by variant; of each file the first `limit` rows, 0 for all."""
    answers: dict[str, VariantAnswers] = {}
    for spec in specs:
        for name, of_variant in read_answers(spec, limit).items():
            if name in answers:
                raise UserError(f"--answers {spec}: a variant {name!r} is there already; name it: NAME=FILE")
            answers[name] = of_variant
    return answers


def answer_prompts(args: argparse.Namespace) -> tuple[dict[str, VariantAnswers], dict]:
    """Lets every variant answer every prompt; (answers by variant, settings for the result)."""
    model, variants = models_under_test.from_arguments(args)
    unfinished.require_base([variant.adapter for variant in variants], args.rules)
    rows = read_prompts(args.prompts)[: args.limit or None]
    questions = [question_of(row) for row in rows]
    by_number = model.answers(variants, questions, Path(args.out) / "answers.jsonl")
    only_rank_0()
    answers = {variant.name: VariantAnswers(variant.adapter == BASE) for variant in variants}
    for variant in variants:
        for number, answer in by_number[variant].items():
            cluster = rows[number - 1].fields.get(CLUSTER) or ""
            answers[variant.name].add(answer["prompt"], answer | {"cluster": cluster})
    return answers, model.summary() | {"prompts": str(args.prompts)}


def question_of(row: Row) -> Question:
    """What is asked in a row: its prompt, or its conversation with its own system message and tools."""
    messages = conversation(row)
    alone = row.messages is None and len(messages) == 1
    return Question(row.number, conversation_text(messages), None if alone else tuple(messages), row.tools)


def align(prompts: Mapping[str, Iterable[str]], left_out: Collection[str]) -> tuple[list[str], dict[str, int]]:
    """The prompts that a comparison is over, in the order of the first variant, and how many were left out and why.

    prompts: of each variant, those that it answered, by their exact text; left_out: those that none is compared on.
    """
    first = next(iter(prompts.values()))
    everywhere = set(first).intersection(*prompts.values())
    somewhere = set().union(*prompts.values())
    compared = [prompt for prompt in first if prompt in everywhere and prompt not in left_out]
    counts = {"prompts in all variants": len(everywhere), "only in some variants": len(somewhere - everywhere)}
    return compared, counts


def compare(
    answers: Mapping[str, VariantAnswers],
    baseline: str,
    judge: Judge | None,
    rubric: Path,
    out: Path,
    rules: str = unfinished.PAIRED,
) -> Result:
    """Judges all variants on the prompts that they share and puts them side by side. judge: None for the word lists."""
    prompts, counts = prompts_to_judge(answers, baseline, rules)
    scores, replies, failed = score(answers, prompts, judge, rubric, out)
    write_items(out / "items.jsonl", answers, prompts, scores, replies)
    judged_by = judge.name if judge else f"the {word_list_judge.NAME}"
    first, *more = tables(answers, scores, baseline, judged_by)
    flags = {
        name: [prompt in of_variant.unfinished_thinking for prompt in of_variant.rows]
        for name, of_variant in answers.items()
    }
    shown = [unfinished.with_shares(first, flags), *more]
    result = Result("judge", f"Four criteria, judged by {judged_by}", shown)
    result.settings = {**judge.settings, "rubric": _shown(rubric)} if judge else {"judge": word_list_judge.NAME}
    unfinished.note_rules(result, rules)
    result.notes = [", ".join(f"{reason}: {count:,}" for reason, count in counts.items())]
    if repeated := sum(of_variant.repeated for of_variant in answers.values()):
        result.notes.append(f"{repeated:,} answers to a prompt that stood there before were left out")
    everything = [one for by_prompt in scores.values() for one in by_prompt.values()]
    if empty := sum(one == Scores(strategy=one.strategy) for one in everything):
        result.notes.append(f"replies of the judge without any score: {empty:,}, in {out / REPLIES}")
    result.failed = failed
    return result


def prompts_to_judge(
    answers: Mapping[str, VariantAnswers], baseline: str, rules: str
) -> tuple[list[str], dict[str, int]]:
    """The prompts of `align` without the benign ones, and how many were left out and why."""
    bases = [name for name, of_variant in answers.items() if of_variant.is_base] or [baseline]
    unfinished_by_variant = {name: of_variant.unfinished_thinking for name, of_variant in answers.items()}
    left_out = unfinished.left_out(unfinished_by_variant, bases, rules)
    prompts_of = {name: of_variant.rows for name, of_variant in answers.items()}
    aligned, counts = align(prompts_of, left_out)
    prompts = [prompt for prompt in aligned if answers[baseline].rows[prompt]["cluster"] != BENIGN]
    counts[unfinished.reason_left_out(rules)] = counts["prompts in all variants"] - len(aligned)
    counts |= {"benign, not judged": len(aligned) - len(prompts), "compared": len(prompts)}
    if not prompts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise UserError(f"nothing to compare between {', '.join(answers)}: {reasons}")
    return prompts, counts


def score(
    answers: Mapping[str, VariantAnswers], prompts: Sequence[str], judge: Judge | None, rubric: Path, out: Path
) -> tuple[dict[str, dict[str, Scores]], dict[tuple[str, str], str], dict[str, str]]:
    """(scores by variant and prompt, the judge's replies by (variant, prompt), failed items)."""
    if judge is None:
        return score_by_word_lists(answers, prompts), {}, {}
    instructions = read_text(rubric, MAX_TEXT_BYTES).strip()
    conversations = {
        (name, prompt): criteria.messages(instructions, prompt, of_variant.rows[prompt]["answer"])
        for name, of_variant in answers.items()
        for prompt in prompts
    }
    replies, failed = ask_all(judge, conversations, out / REPLIES)
    scores: dict[str, dict[str, Scores]] = {name: {} for name in answers}
    for (name, prompt), reply in replies.items():
        scores[name][prompt] = criteria.parse(reply)
    return scores, replies, {f"{name}: {prompt[:60]}": reason for (name, prompt), reason in failed.items()}


def score_by_word_lists(answers: Mapping[str, VariantAnswers], prompts: Sequence[str]) -> dict[str, dict[str, Scores]]:
    def score_one(prompt: str, row: dict) -> Scores:
        return word_list_judge.judge(prompt, row["answer"], row["cluster"]).scores

    try:
        return {name: {p: score_one(p, of_variant.rows[p]) for p in prompts} for name, of_variant in answers.items()}
    except UserError as error:  # a cluster that the word lists do not know
        raise UserError(f"answers of {', '.join(answers)}: {error}") from None


def write_items(path: Path, answers, prompts, scores, replies) -> None:
    """One line for each judged answer, with its scores and the judge's reply: what `agreement` reads."""
    lines = []
    for name, prompt in ((name, prompt) for name in answers for prompt in prompts if prompt in scores[name]):
        item = {"variant": name, "prompt": prompt, **answers[name].rows[prompt], **asdict(scores[name][prompt])}
        reply = {"reply": replies[name, prompt]} if (name, prompt) in replies else {}
        lines.append(json.dumps(item | reply, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines))


def _shown(rubric: Path) -> str:
    return "this project's wording (psysafe/assets/rubric.txt)" if rubric == criteria.RUBRIC else str(rubric)


# Tables. scores: variant -> prompt -> scores.


def tables(
    answers: Mapping[str, VariantAnswers], scores: Mapping[str, Mapping[str, Scores]], baseline: str, judged_by: str
) -> list[Table]:
    """judged_by: stands in the titles of the tables of scores."""
    summaries = {name: summarise(by_prompt.values()) for name, by_prompt in scores.items()}
    complete = all(count == summary.n for summary in summaries.values() for count in summary.counts.values())
    note = "" if complete else "a criterion was missing in some replies: see the next table"
    rows = [[name, *summary.cells()] for name, summary in summaries.items()]
    shown = [Table(f"All prompts, judged by {judged_by}", COLUMNS, rows, note, bars=["overall %"])]
    if not complete:
        columns = [("variant", ""), *((name, ",") for name in summaries[baseline].counts)]
        rows = [[name, *summary.counts.values()] for name, summary in summaries.items()]
        shown.append(Table("Answers that each figure is over", columns, rows))
    if len(summaries) > 1:
        changes = {n: relative_change(s, summaries[baseline]) for n, s in summaries.items() if n != baseline}
        columns = [("variant", ""), *((f"{name} %", "+.1f") for name in next(iter(changes.values())))]
        rows = [[name, *change.values()] for name, change in changes.items()]
        note = "–: nothing to divide by" if any(None in row for row in rows) else ""
        shown.append(Table(f"Relative change to {baseline}", columns, rows, note))
    if rows := rows_by_cluster(answers, scores, baseline):
        shown.append(Table(f"Per cluster, judged by {judged_by}", [("cluster", ""), *COLUMNS], rows))
    return shown


def rows_by_cluster(answers, scores, baseline: str) -> list[list]:
    """A row for each cluster and variant in which something was judged; none where the rows name no cluster."""
    rows = []
    for cluster in dict.fromkeys(row["cluster"] for row in answers[baseline].rows.values() if row["cluster"]):
        for name, by_prompt in scores.items():
            of_cluster = [s for prompt, s in by_prompt.items() if answers[name].rows[prompt]["cluster"] == cluster]
            if of_cluster:
                rows.append([cluster, name, *summarise(of_cluster).cells()])
    return rows
