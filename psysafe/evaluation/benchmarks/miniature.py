"""The paper's table in miniature: the bundled model before and after its training run, on the validation prompts."""

from pathlib import Path

from psysafe.data.rows import BENIGN, CLUSTER, Row, read_rows
from psysafe.data.text import normalise
from psysafe.evaluation import comparison, counted_services, unfinished, word_list_judge
from psysafe.evaluation.comparison import Figure, share
from psysafe.evaluation.criteria import COLUMNS, summarise
from psysafe.evaluation.models_under_test import BASE, ModelUnderTest, Question, Variant, only_rank_0
from psysafe.evaluation.overlap import overlap_with_files
from psysafe.evaluation.result import Result, Table, percent
from psysafe.evaluation.rules_accuracy import with_accuracy
from psysafe.evaluation.word_list_judge import Parts, Verdict
from psysafe.generation.request import Options
from psysafe.program import UserError
from psysafe.services import Services, bundled
from psysafe.training.config import resolve

MAX_NEW_TOKENS = 256  # twice the longest bundled answer; a base that rambles is cut there


def run(out: str | None = None, device: str = "auto", given: Services | None = None) -> Result:
    """Answers the bundled validation prompts with the base and with the run's adapter. given: helplines that count,
    instead of the bundled ones.

    Result and answers go to `out` (the run's folder eval/). Raises UserError, with the command to train, where there is
    no run yet.
    """
    config, _ = resolve([])
    if not Path(config.out, "adapter_config.json").exists():
        raise UserError(f"no trained adapter in {config.out} yet; train it first: torchrun train.py")
    rows = read_rows(config.val_data)
    questions = [Question(number, row.fields["prompt"]) for number, row in enumerate(rows, 1)]
    variants = [Variant(BASE, config.system), Variant(config.out, config.system)]
    folder = Path(out or Path(config.out, "eval"))
    options = Options(max_new_tokens=MAX_NEW_TOKENS)
    model = ModelUnderTest(config.model, config.revision, device=device, options=options)
    answers = model.answers(variants, questions, folder / "answers.jsonl")
    only_rank_0()
    base, tuned = ([_finished(answers[variant][q.number]) for q in questions] for variant in variants)
    title = f"The paper in miniature, judged by {word_list_judge.BY_WORD_LISTS}"
    result = Result("miniature", title, with_accuracy(tables(rows, base, tuned, given)))
    result.settings = {**model.summary(), "adapter": config.out, "judge": word_list_judge.NAME}
    counted_services.record(result, given)
    result.contamination = overlap_with_files((q.prompt for q in questions), config.data)
    result.save(folder)
    return result


def _finished(answer: dict) -> str | None:
    return None if answer["unfinished_thinking"] else answer["answer"]


def tables(
    rows: list[Row], base: list[str | None], tuned: list[str | None], given: Services | None = None
) -> list[Table]:
    """rows and, in the same order, what each model answered; None where its reasoning never ended.

    Such a prompt is counted for neither model. given: helplines that count, instead of the bundled ones.
    """
    clusters = [row.fields[CLUSTER] for row in rows]
    answers = {"base": base, "fine-tuned": tuned}
    finished = [i for i in range(len(rows)) if base[i] is not None and tuned[i] is not None]
    risky = [i for i in finished if clusters[i] != BENIGN]
    benign = [i for i in finished if clusters[i] == BENIGN]
    verdicts = {
        model: {i: word_list_judge.judge(rows[i].fields["prompt"], texts[i], clusters[i], given) for i in risky}
        for model, texts in answers.items()
    }
    is_unfinished = {model: [text is None for text in texts] for model, texts in answers.items()}
    return [
        unfinished.with_shares(table_of_criteria(verdicts), is_unfinished),
        table_of_parts(verdicts),
        table_of_helplines(verdicts, clusters, given or bundled()),
        table_of_benign(answers, benign),
        *comparison.tables(figures(verdicts, answers, benign), f"judged by {word_list_judge.BY_WORD_LISTS}"),
    ]


Verdicts = dict[str, dict[int, Verdict]]  # model -> row -> verdict on its answer


def figures(verdicts: Verdicts, answers: dict[str, list[str]], benign: list[int]) -> list[Figure]:
    """The figures of these tables by row, for intervals and paired tests."""
    scores = {model: {i: verdict.scores for i, verdict in by_row.items()} for model, by_row in verdicts.items()}
    parts = {model: {i: verdict.parts for i, verdict in by_row.items()} for model, by_row in verdicts.items()}
    answered = {model: {i: not word_list_judge.refuses(texts[i]) for i in benign} for model, texts in answers.items()}
    return [
        *comparison.of_criteria(scores),
        share("all four parts %", {model: {i: p.all for i, p in by_row.items()} for model, by_row in parts.items()}),
        share("own services %", {model: {i: p.services for i, p in by_row.items()} for model, by_row in parts.items()}),
        share("benign, answered %", answered),
    ]


def table_of_criteria(verdicts: Verdicts) -> Table:
    lines = [[model, *summarise(v.scores for v in by_row.values()).cells()] for model, by_row in verdicts.items()]
    title = f"Risky validation prompts, judged by {word_list_judge.BY_WORD_LISTS}"
    return Table(title, COLUMNS, lines, bars=["overall %"])


def table_of_parts(verdicts: Verdicts) -> Table:
    columns = [("model", ""), ("n", ","), ("acknowledges and refuses %", ".0f"), ("step of a strategy %", ".0f"),
               ("own services %", ".0f"), ("hope %", ".0f"), ("all four %", ".0f")]  # fmt: skip
    lines = []
    for model, by_row in verdicts.items():
        parts = [verdict.parts for verdict in by_row.values()]
        each = [percent(getattr(part, name) for part in parts) for name in Parts._fields]
        lines.append([model, len(parts), *each, percent(part.all for part in parts)])
    return Table("The four parts of a supportive refusal", columns, lines, bars=["all four %"])


def table_of_helplines(verdicts: Verdicts, clusters: list[str], services: Services) -> Table:
    risky = next(iter(verdicts.values()))
    groups = {cluster: [i for i in risky if clusters[i] == cluster] for cluster in dict.fromkeys(clusters)}
    groups = {cluster: members for cluster, members in groups.items() if members} | {"all": list(risky)}
    lines = [
        [name, len(members), *(percent(by_row[i].parts.services for i in members) for by_row in verdicts.values())]
        for name, members in groups.items()
    ]
    columns = [("cluster", ""), ("n", ","), ("base %", ".0f"), ("fine-tuned %", ".0f")]
    title = f"Answers that give their own cluster's helplines, {' and '.join(services.emergency)}"
    return Table(title, columns, lines, bars=["fine-tuned %"])


def table_of_benign(answers: dict[str, list[str]], benign: list[int]) -> Table:
    base, tuned = answers.values()
    unchanged = percent(normalise(base[i]) == normalise(tuned[i]) for i in benign)
    lines = [
        [model, len(benign), percent(not word_list_judge.refuses(texts[i]) for i in benign),
         None if model == "base" else unchanged]
        for model, texts in answers.items()
    ]  # fmt: skip
    columns = [("model", ""), ("n", ","), ("answered %", ".0f"), ("in the base's words %", ".0f")]
    return Table("Benign validation prompts", columns, lines)
