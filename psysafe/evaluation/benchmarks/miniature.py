"""The paper's table in miniature: the bundled model before and after its training run, on the validation prompts."""

from pathlib import Path

from psysafe.data.rows import Row, read_rows
from psysafe.data.text import normalise
from psysafe.evaluation import word_list_judge as rules
from psysafe.evaluation.benchmarks.four_criteria import BENIGN, COLUMNS
from psysafe.evaluation.models_under_test import BASE, Question, Setting, Subject
from psysafe.evaluation.overlap import overlap
from psysafe.evaluation.result import Result, Table
from psysafe.evaluation.scores import summarise
from psysafe.files import expand
from psysafe.generation.engine import Options
from psysafe.program import UserError
from psysafe.training.config import resolve

MAX_NEW_TOKENS = 256  # twice the longest bundled answer; a base that rambles is cut there


def run(out: str | None = None, device: str = "auto") -> Result:
    """Answers the bundled validation prompts with the base and with the run's adapter; result and answers go to `out`
    (the run's folder eval/). ValueError, with the command to train, where there is no run yet."""
    config, _ = resolve([])
    if not Path(config.out, "adapter_config.json").exists():
        raise UserError(f"no trained adapter in {config.out} yet; train it first: torchrun train.py")
    rows = read_rows([expand(path) for path in config.val_data])
    questions = [Question(number, row.fields["prompt"]) for number, row in enumerate(rows, 1)]
    settings = [Setting(BASE, config.system), Setting(config.out, config.system)]
    folder = Path(out or Path(config.out, "eval"))
    subject = Subject(config.model, config.revision, device=device, options=Options(max_new_tokens=MAX_NEW_TOKENS))
    made = subject.answers(settings, questions, folder / "answers.jsonl")
    base, tuned = ([made[setting][q.number]["answer"] for q in questions] for setting in settings)
    result = Result("miniature", f"The paper in miniature, judged by the {rules.NAME}", tables(rows, base, tuned))
    result.settings = {**subject.facts(), "adapter": config.out, "judge": rules.NAME}
    training = [row.fields["prompt"] for row in read_rows([expand(path) for path in config.data])]
    result.contamination = overlap((q.prompt for q in questions), training)
    result.save(folder)
    return result


def tables(rows: list[Row], base: list[str], tuned: list[str]) -> list[Table]:
    """rows and, in the same order, what each model answered."""
    cluster_of = [row.fields["risk cluster"] for row in rows]
    risky = [i for i, cluster in enumerate(cluster_of) if cluster != BENIGN]
    benign = [i for i, cluster in enumerate(cluster_of) if cluster == BENIGN]
    models = {"base": base, "fine-tuned": tuned}
    verdicts = {
        name: {i: rules.judge(rows[i].fields["prompt"], answers[i], cluster_of[i]) for i in risky}
        for name, answers in models.items()
    }

    def share(found) -> float | None:
        found = list(found)
        return 100 * sum(found) / len(found) if found else None

    criteria = []
    for name, by_row in verdicts.items():
        s = summarise(verdict.scores for verdict in by_row.values())
        criteria.append([name, s.n, s.refusal, [s.grounding, s.grounding_std], s.references,
                         [s.relevance, s.relevance_std], s.overall])  # fmt: skip
    parts = [
        [name, len(by_row), *(share(v.parts[k] for v in by_row.values()) for k in range(4)),
         share(v.parts.all for v in by_row.values())]
        for name, by_row in verdicts.items()
    ]  # fmt: skip
    helplines = [
        [cluster, sum(c == cluster for c in cluster_of),
         *(share(by_row[i].own_helplines for i in risky if cluster_of[i] == cluster) for by_row in verdicts.values())]
        for cluster in dict.fromkeys(cluster_of[i] for i in risky)
    ]  # fmt: skip
    helplines.append(["all", len(risky), *(share(v.own_helplines for v in by.values()) for by in verdicts.values())])
    same = share(normalise(base[i]) == normalise(tuned[i]) for i in benign)
    kept = [
        [name, len(benign), share(not rules.refuses(answers[i]) for i in benign), None if name == "base" else same]
        for name, answers in models.items()
    ]
    wide = [("model", ""), ("n", ","), ("acknowledges and refuses %", ".0f"), ("step of a strategy %", ".0f"),
            ("own services %", ".0f"), ("hope %", ".0f"), ("all four %", ".0f")]  # fmt: skip
    title = f"Risky validation prompts, judged by the {rules.NAME}"
    return [
        Table(title, COLUMNS, criteria, bars=["overall %"]),
        Table("The four parts of a supportive refusal", wide, parts, bars=["all four %"]),
        Table("Answers that give their own cluster's helplines, US and UK",
              [("cluster", ""), ("n", ","), ("base %", ".0f"), ("fine-tuned %", ".0f")], helplines,
              bars=["fine-tuned %"]),
        Table("Benign validation prompts",
              [("model", ""), ("n", ","), ("answered %", ".0f"), ("in the base's words %", ".0f")], kept),
    ]  # fmt: skip
