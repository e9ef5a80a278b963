"""eval.py judge: answers of several variants side by side, scored on the four criteria.

    python eval.py judge --prompts rows.jsonl --adapter base --adapter runs/psysafe --system v0,v1 --out runs/judged \\
        --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen3.5-397B-A17B
    python eval.py judge --answers base=base.jsonl --answers tuned=tuned.jsonl --judge rules --out runs/judged
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from psysafe import services
from psysafe.data.rows import BENIGN, Row, read_prompts
from psysafe.evaluation import (
    answer_language,
    counted_services,
    criteria,
    judge_agreement,
    judge_input,
    judge_models,
    models_under_test,
    sample,
    several_judges,
    stored,
    transcript,
    unfinished,
    word_list_judge,
)
from psysafe.evaluation.benchmark import Evaluation
from psysafe.evaluation.criteria import Scores
from psysafe.evaluation.criteria_tables import tables
from psysafe.evaluation.judge_input import JudgeInput
from psysafe.evaluation.judge_models import Judge, ask_all, ask_apart
from psysafe.evaluation.labels import read_label
from psysafe.evaluation.models_under_test import (
    BASE,
    Question,
    VariantAnswers,
    conversation,
    conversation_text,
    only_rank_0,
)
from psysafe.evaluation.overlap import add_training_argument, overlap_with_files
from psysafe.evaluation.result import Result, Table, nothing_measured
from psysafe.evaluation.rules_accuracy import with_accuracy
from psysafe.evaluation.sample import Sample
from psysafe.evaluation.stored import read_all
from psysafe.files import write_json_lines
from psysafe.program import UserError
from psysafe.services import Services

TEMPERATURE = 0.1  # of the judge, as in the publication
REPLIES = "replies.jsonl"


class FourCriteria(Evaluation):
    name = "judge"
    help = "answers scored on four criteria by a judge"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        stored.add_arguments(parser)
        parser.add_argument("--prompts", metavar="FILE", help="rows whose prompts are answered here")
        parser.add_argument("--baseline", metavar="NAME", help="variant to which the others are compared (the first)")
        counted_services.add_arguments(parser)
        sample.add_argument(parser)
        add_training_argument(parser)
        unfinished.add_argument(parser)
        models_under_test.add_arguments(parser, max_new_tokens=4096)
        judge_models.add_arguments(parser, "word lists; for tests and the tiny demo", several=True)
        judge_input.add_arguments(parser)

    def answers_on_ranks(self, args: argparse.Namespace) -> bool:
        return bool(args.prompts)

    def without_effect(self, args: argparse.Namespace) -> dict[str, str]:
        reasons = judge_models.without_effect(args) | models_under_test.without_effect(args)
        reasons |= judge_input.without_effect(args) | counted_services.without_effect(args)
        reasons |= stored.without_effect(args)
        if args.replies or args.scores:
            return reasons | {"--sample-per-cluster": f"with {stored.given(args)}: all of its rows are read"}
        return {flag: why for flag, why in reasons.items() if flag != "--seed" or not args.sample_per_cluster}

    def run(self, args: argparse.Namespace) -> Result:
        if bool(stored.given(args)) == bool(args.prompts):
            ways = "--prompts FILE (answered here), --answers [NAME=]FILE, --replies FILE and --scores FILE"
            raise UserError(f"expected one of {ways}")
        paths = [path for _, path in map(stored.name_and_path, args.answers)]
        stored.refuse_items(args.out, [*paths, *filter(None, (args.replies, args.scores))])
        return self._read_again(args) if args.replies or args.scores else self._judged(args)

    def _judged(self, args: argparse.Namespace) -> Result:
        judges = judge_models.every_from_arguments(args, TEMPERATURE)
        given = services.from_arguments(args)
        own = criteria.own_instructions()
        inputs = [judge and judge_input.from_arguments(args, judge, own, may_be_rubric=True) for judge in judges]
        drawn, note, settings = sample.from_arguments(args), "", {}
        if args.answers:
            answers = read_all(args.answers, args.limit)
        else:
            rows = read_prompts(args.prompts)[: args.limit or None]
            rows, note = sampled(rows, drawn) if drawn else (rows, "")
            if None in judges:
                answer_language.require_english([question_of(row).prompt for row in rows])
            answers, settings = answer_prompts(args, rows)
        baseline, of_compared = baseline_of(args, answers), drawn if args.answers else None
        results, labels = compare(answers, baseline, judges, inputs, Path(args.out), args.rules, of_compared, given)
        contamination = overlap_with_files(next(iter(answers.values())).rows, args.train)
        for result in results.values():
            result.settings |= settings
            result.notes += [note] if note else []
            result.contamination = contamination
        agreement = judge_agreement.tables(labels, ratings=("grounding", "relevance"))
        return several_judges.one_result("Four criteria", results, judges, agreement, Path(args.out))

    def _read_again(self, args: argparse.Namespace) -> Result:
        """From stored replies or scores, without models and judges."""
        path = args.replies or args.scores
        answers, scores, replies = read_scores(path, args.limit, bool(args.replies))
        baseline = baseline_of(args, answers)
        prompts, counts = prompts_to_judge(answers, baseline, unfinished.PAIRED)
        scores = {name: {p: by_prompt[p] for p in prompts} for name, by_prompt in scores.items()}
        write_items(Path(args.out) / stored.ITEMS, answers, prompts, scores, replies)
        judged_by = f"stored {'replies' if args.replies else 'scores'} ({Path(path).name})"
        entries = transcript.of_criteria(answers, prompts, {judged_by: (scores, replies)}, {})
        transcript.write(Path(args.out), f"Four criteria, judged by {judged_by}", entries)
        shown = [*tables(answers, scores, baseline, judged_by), *answer_language_tables(answers, prompts)]
        result = Result("judge", f"Four criteria, judged by {judged_by}", shown)
        result.settings = {"judge": judged_by, stored.given(args)[2:]: path}
        result.notes = notes(answers, scores, counts, path)
        result.unscored = unscored(scores, path)
        result.contamination = overlap_with_files(next(iter(answers.values())).rows, args.train)
        return result


def baseline_of(args: argparse.Namespace, answers: Mapping[str, VariantAnswers]) -> str:
    """The variant to which the others are compared. UserError for one that is not there."""
    baseline = args.baseline or next(iter(answers))
    if baseline not in answers:
        raise UserError(f"--baseline {baseline}: no such variant; expected one of {'; '.join(answers)}")
    if args.baseline and len(answers) == 1:
        raise UserError(f"--baseline {baseline} has no effect: it is the only variant; leave it out")
    return baseline


def read_scores(
    path: str, limit: int, are_replies: bool
) -> tuple[dict[str, VariantAnswers], dict[str, dict[str, Scores]], dict[tuple[str, str], str]]:
    """(answers by variant, scores by variant and prompt, replies by (variant, prompt)) of a stored file."""
    answers: dict[str, VariantAnswers] = {}
    scores: dict[str, dict[str, Scores]] = {}
    replies = {}
    for one in stored.read_stored(path, limit):
        fields = {"answer": str(one.row.fields.get("answer") or ""), "cluster": one.cluster}
        of_variant = answers.setdefault(one.variant, VariantAnswers(is_base=False))
        of_variant.add(one.prompt, fields | {"unfinished_thinking": False})
        if are_replies:
            replies[one.variant, one.prompt] = one.reply
        score = criteria.parse(one.reply) if are_replies else stored_scores(one.row)
        scores.setdefault(one.variant, {})[one.prompt] = score
    return answers, scores, replies


def stored_scores(row: Row) -> Scores:
    """The scores of a row, written as people's labels are. UserError where none of the four is there."""
    labels = {name: read_label(row.fields.get(name), name, row.where) for name in criteria.CRITERIA}
    if not set(row.fields).intersection(criteria.CRITERIA):
        raise UserError(f"{row.where}: no scores in it; expected {', '.join(criteria.CRITERIA)}")
    yes_no = {name: None if labels[name] is None else bool(labels[name]) for name in ("refusal", "references")}
    return Scores(**labels | yes_no, strategy=str(row.fields.get("strategy") or ""))


def answer_prompts(
    args: argparse.Namespace, rows: Sequence[Row] | None = None
) -> tuple[dict[str, VariantAnswers], dict]:
    """Lets every variant answer every prompt; (answers by variant, settings for the result). rows: with the prompts;
    without them those of --prompts."""
    model, variants = models_under_test.from_arguments(args)
    unfinished.require_base([variant.adapter for variant in variants], args.rules)
    rows = read_prompts(args.prompts)[: args.limit or None] if rows is None else rows
    questions, clusters = [question_of(row) for row in rows], {row.number: stored.cluster_of(row) for row in rows}
    by_number = model.answers(variants, questions, Path(args.out) / "answers.jsonl")
    only_rank_0()
    answers = {variant.name: VariantAnswers(variant.adapter == BASE) for variant in variants}
    for variant in variants:
        for number, answer in by_number[variant].items():
            answers[variant.name].add(answer["prompt"], answer | {"cluster": clusters[number]})
    return answers, model.summary() | {"prompts": str(args.prompts)}


def sampled(rows: Sequence[Row], drawn: Sample) -> tuple[list[Row], str]:
    """(the rows of a sample of their prompts, a note). Benign prompts are not judged, and not drawn."""
    prompts = {row.number: question_of(row).prompt for row in rows}
    clusters = {row.number: stored.cluster_of(row) for row in rows}
    of_prompt = {prompts[number]: cluster for number, cluster in clusters.items() if cluster != BENIGN}
    if not of_prompt:
        raise UserError(
            f"--sample-per-cluster: every row is {BENIGN}, and is not judged; expected rows of a risk cluster"
        )
    drawn_prompts, note = drawn.draw(of_prompt)
    chosen = set(drawn_prompts)
    rows_of_risk = [row for row in rows if clusters[row.number] != BENIGN]
    return [row for row in rows_of_risk if prompts[row.number] in chosen], note


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
    judges: Sequence[Judge | None],
    inputs: Sequence[JudgeInput | None],
    out: Path,
    rules: str = unfinished.PAIRED,
    drawn: Sample | None = None,
    given: Services | None = None,
) -> tuple[dict[str, Result], dict[str, judge_agreement.Labels]]:
    """All variants side by side on the prompts that they share: (each judge's result, its labels), by its name. None
    stands for the word lists, which have no input. drawn: of these prompts only those of a sample; given:
    helplines that count for the word lists, instead of the bundled ones."""
    prompts, counts = prompts_to_judge(answers, baseline, rules)
    note_on_sample = ""
    if drawn:
        prompts, note_on_sample = drawn.draw({p: answers[baseline].rows[p]["cluster"] for p in prompts})
        counts["compared"] = len(prompts)
    texts = {v: [of.rows[p]["answer"] for p in prompts] for v, of in answers.items()}
    if None in judges:
        answer_language.require_english(prompts, texts)
    results, labels, by_judge = {}, {}, {}
    for judge, shown in zip(judges, inputs, strict=True):
        name = judge.name if judge else word_list_judge.BY_WORD_LISTS
        ask = ask_all if len(judges) == 1 else ask_apart
        scores, replies, failed, note = score(answers, prompts, judge, shown, out, ask, given)
        folder = several_judges.folder_of(judge, judges, out)
        write_items(folder / stored.ITEMS, answers, prompts, scores, replies)
        result = result_of(answers, prompts, scores, baseline, judge, note, rules)
        result.settings |= {**judge.settings, **shown.settings} if judge else {"judge": word_list_judge.NAME}
        result.notes = [*notes(answers, scores, counts, out / REPLIES), *filter(None, [note_on_sample])]
        result.failed = failed
        result.unscored = unscored(scores, out / REPLIES)
        if judge is None:
            result.notes += answer_language.unread_note(prompts, texts)
            counted_services.record(result, given)
        results[name], labels[name], by_judge[name] = result, labels_of(scores), (scores, replies)
    of_models = {judge.name: shown for judge, shown in zip(judges, inputs, strict=True) if judge and shown}
    entries = transcript.of_criteria(answers, prompts, by_judge, of_models)
    transcript.write(out, f"Four criteria, judged by {', '.join(results)}", entries)
    return results, labels


def result_of(
    answers: Mapping[str, VariantAnswers],
    prompts: Sequence[str],
    scores: Mapping[str, Mapping[str, Scores]],
    baseline: str,
    judge: Judge | None,
    note: str,
    rules: str,
) -> Result:
    """One judge's; None stands for the word lists. note: for the first table."""
    judged_by = judge.name if judge else word_list_judge.BY_WORD_LISTS
    first, *more = tables(answers, scores, baseline, judged_by)
    flags = {name: [row["unfinished_thinking"] for row in of.rows.values()] for name, of in answers.items()}
    shown = [unfinished.with_shares(first.with_note(note), flags), *more]
    shown = shown if judge else with_accuracy(shown)
    shown += answer_language_tables(answers, prompts)
    result = Result("judge", f"Four criteria, judged by {judged_by}", shown)
    unfinished.note_rules(result, rules)
    return result


def answer_language_tables(answers: Mapping[str, VariantAnswers], prompts: Sequence[str]) -> list[Table]:
    """The table of answers in the prompt's language, whoever judged."""
    return answer_language.tables({v: [(p, of.rows[p]["answer"]) for p in prompts] for v, of in answers.items()})


def labels_of(scores: Mapping[str, Mapping[str, Scores]]) -> judge_agreement.Labels:
    """A judge's scores by criterion, for its agreement with others."""
    given = {(v, prompt): one for v, by_prompt in scores.items() for prompt, one in by_prompt.items()}
    return {
        name: {key: int(getattr(one, name)) for key, one in given.items() if getattr(one, name) is not None}
        for name in criteria.CRITERIA
    }


def notes(
    answers: Mapping[str, VariantAnswers],
    scores: Mapping[str, Mapping[str, Scores]],
    counts: Mapping[str, int],
    replies: str | Path,
) -> list[str]:
    """What the tables do not say. counts: of prompts, by what became of them; replies: the file of the judge's."""
    lines = [", ".join(f"{reason}: {count:,}" for reason, count in counts.items()), *stored.notes_on_repeated(answers)]
    if empty := sum(map(_is_empty, _all(scores))):
        lines.append(f"replies of the judge without any score: {empty:,}, in {replies}")
    return lines


def unscored(scores: Mapping[str, Mapping[str, Scores]], replies: str | Path) -> str:
    """As `nothing_measured`."""
    scored = [not _is_empty(one) for one in _all(scores)]
    return nothing_measured(scored, replies, "another judge, or another --rubric")


def _all(scores: Mapping[str, Mapping[str, Scores]]) -> list[Scores]:
    return [one for by_prompt in scores.values() for one in by_prompt.values()]


def _is_empty(scores: Scores) -> bool:
    return scores == Scores(strategy=scores.strategy)


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
    answers: Mapping[str, VariantAnswers],
    prompts: Sequence[str],
    judge: Judge | None,
    shown: JudgeInput | None,
    out: Path,
    ask: Callable = ask_all,
    given: Services | None = None,
) -> tuple[dict[str, dict[str, Scores]], dict[tuple[str, str], str], dict[str, str], str]:
    """(scores by variant and prompt, the judge's replies by (variant, prompt), failed items, a note on what the judge
    was shown)."""
    if judge is None:
        return score_by_word_lists(answers, prompts, given), {}, {}, ""
    whole = {(name, p): of_variant.rows[p]["answer"] for name, of_variant in answers.items() for p in prompts}
    cut = {key: shown.cut(answer) for key, answer in whole.items()}
    asked = {key: shown.instructions.messages(key[1], answer) for key, answer in cut.items()}
    replies, failed = ask(judge, asked, out / REPLIES)
    scores: dict[str, dict[str, Scores]] = {name: {} for name in answers}
    for (name, prompt), reply in replies.items():
        scores[name][prompt] = criteria.parse(reply)
    note = shown.note(sum(cut[key] != answer for key, answer in whole.items()), len(whole))
    return scores, replies, {f"{name}: {prompt[:60]}": reason for (name, prompt), reason in failed.items()}, note


def score_by_word_lists(
    answers: Mapping[str, VariantAnswers], prompts: Sequence[str], given: Services | None = None
) -> dict[str, dict[str, Scores]]:
    def score_one(variant: str, prompt: str, row: dict) -> Scores:
        try:
            return word_list_judge.judge(prompt, row["answer"], row["cluster"], given).scores
        except UserError as error:  # a cluster that the word lists do not know
            raise UserError(f"answers of {variant}, to {prompt!r:.50}: {error}") from None

    return {name: {p: score_one(name, p, of_variant.rows[p]) for p in prompts} for name, of_variant in answers.items()}


def write_items(path: Path, answers, prompts, scores, replies) -> None:
    """One line for each judged answer, with its scores and the judge's reply: what `agreement` reads."""
    items = []
    places = {prompt: place for place, prompt in enumerate(prompts, 1)}
    for name, prompt in ((name, prompt) for name in answers for prompt in prompts if prompt in scores[name]):
        item = {"variant": name, "prompt": prompt, **answers[name].rows[prompt], **asdict(scores[name][prompt])}
        item["place"] = places[prompt]
        reply = {"reply": replies[name, prompt]} if (name, prompt) in replies else {}
        items.append(item | reply)
    write_json_lines(path, items)
