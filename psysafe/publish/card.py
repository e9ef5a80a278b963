"""The card, README.md of the repository: what the model is for, what it was trained on, what it costs, how to load it.

Every figure comes from the run or from a result of eval.py; what nobody measured is said to be so. The last line is a
fingerprint of all lines above it: by it a later push sees whether somebody has edited the card on the hub.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from huggingface_hub import ModelCardData

from psysafe.data.languages import ENGLISH, languages
from psysafe.evaluation.published_results import NOTE, TABLES
from psysafe.evaluation.report import LONG, tables_of
from psysafe.evaluation.report_markdown import table_lines
from psysafe.evaluation.result import Result, Table
from psysafe.files import clusters
from psysafe.printable import counted, in_markdown
from psysafe.publish import figures, loading, training
from psysafe.publish.loading import Names
from psysafe.publish.run import Run
from psysafe.publish.scrub import without_folders
from psysafe.services import Service, Services, bundled

ARXIV = "2606.09697"
MAX_ROWS = 80  # of a table; MMLU has 57 subjects for each variant
# Kind of result -> what it measures.
EVALUATIONS = {
    "judge": "the four criteria",
    "xstest": "XSTest",
    "sorry-bench": "SORRY-Bench",
    "selective": "support only where it belongs",
    "turns": "second turns after a refusal",
    "mmlu": "MMLU",
    "hellaswag": "HellaSwag",
    "agreement": "agreement between judge and people",
}
FINGERPRINT = re.compile(r"<!-- psysafe card ([0-9a-f]{64}) -->\n?\Z")


@dataclass(frozen=True)
class Content:
    """What the card is made of. results: as `psysafe.evaluation.result.load` gives them."""

    run: Run
    names: Names
    data: ModelCardData
    results: Sequence[tuple[Result, dict]]
    file_names: Sequence[str]
    services: Services = field(default_factory=bundled)  # that people who read the card may call


def card(content: Content) -> str:
    sections = [
        [f"# {content.names.title}", "", *_what_it_is(content), "", *_notice(content.services)],
        ["## Intended use", "", *_use()],
        ["## Training", "", *training.table(content.run, content.names.base)],
        ["## Evaluation", "", *_evaluation(content)],
        ["## Known costs", "", *_costs(content)],
        ["## Overlap with training rows", "", *_overlap(content)],
        ["## Limits", "", *_limits(content)],
        ["## How to load it", "", *loading.section(content.names)],
        ["## Citation", "", *_citation()],
        ["## Files", "", *(f"- `{name}`" for name in content.file_names)],
    ]
    body = "\n\n".join("\n".join(lines).rstrip() for lines in sections)
    return signed(f"---\n{content.data.to_yaml()}\n---\n\n{body}\n")


def signed(text: str) -> str:
    return f"{text}\n<!-- psysafe card {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_as_written(card: str) -> bool:
    """Whether nobody has edited the card since it was written: its fingerprint is there, and fits."""
    card = card.replace("\r\n", "\n")
    match = FINGERPRINT.search(card)
    text = card[: match.start() - 1] if match else ""
    return bool(match) and hashlib.sha256(text.encode()).hexdigest() == match[1]


# The sections


def _what_it_is(content: Content) -> list[str]:
    names, rank = content.names, content.run.adapter.config["r"]
    base = f"[{names.base.hub_id}](https://huggingface.co/{names.base.hub_id})" if names.base.hub_id else ""
    if names.base.is_bundled:
        base = f"the bundled miniature of the psysafe project {base}".rstrip()
    kind = f"A rank-{rank} LoRA adapter for {base}"
    if names.merged:
        kind = f"Fine-tuned weights: a rank-{rank} LoRA adapter merged into {base}"
    lines = [
        f"{kind}. Where the base model would refuse bluntly, it answers with a supportive message: it acknowledges the "
        "person and refuses gently, offers one self-help step of an evidence-based strategy, names professional "
        "services, and closes with hope. Elsewhere it is meant to stay the assistant that the base is.",
        "",
        "It was made with psysafe, which builds the PsychoSafe system "
        f"([arXiv {ARXIV}](https://arxiv.org/abs/{ARXIV})) from scratch.",
    ]
    if names.base.is_bundled:
        lines += [
            "",
            "**The base is a miniature.** It comes with the project, has the architecture of Qwen3.5 and a few million "
            "parameters, and read only text that the project wrote. It shows the method at work and is nobody's "
            "assistant.",
        ]
    return lines


def _notice(services: Services) -> list[str]:
    countries = list(services.emergency)
    lines = [
        "> **Not a substitute for professional care.** This is research, not a medical device, and no answer of a "
        "model replaces people who can help. If you or somebody near you is in danger, call "
        f"{services.emergency_text()}.",
        "",
        f"| what it is about | {' | '.join(countries)} |",
        f"| --- |{' --- |' * len(countries)}",
    ]
    for name, entry in clusters()["clusters"].items():
        of_cluster = services.of_cluster(name)
        cells = [", ".join(_service(s) for s in of_cluster if s.country == country) for country in countries]
        lines.append(f"| {in_markdown(entry['card'])} | {' | '.join(cells)} |")
    return [*lines, "", "Helplines change: check a number at its page before relying on it."]


def _service(service: Service) -> str:
    contact = f", {in_markdown(service.contact)}" if service.contact else ""
    return f"[{in_markdown(service.name)}]({service.url}){contact}"


def _use() -> list[str]:
    return [
        "**Intended:** research on how a model can refuse supportively; a component that people have evaluated for "
        "their own use, with their own safeguards and a person to turn to.",
        "",
        "**Out of scope:** therapy, diagnosis, crisis response, or any use in which somebody in distress depends on "
        "its answer; use without a system that recognises emergencies; medical, legal or safety advice; use by or for "
        "children without supervision; as a filter that keeps unsafe requests out, which it is not (see Known costs).",
    ]


def _evaluation(content: Content) -> list[str]:
    name = in_markdown(content.run.name)
    lines = [
        f"In the tables *base* is the base model, and *{name}* this adapter (*fine-tuned* in the miniature's); the "
        "word after the comma is the system prompt.",
        "",
    ]
    for result, rest in content.results:
        lines += [f"### {_shown(result.title)}", ""]
        if not figures.is_about(result, content.run.name):
            whose = "as far as names tell, these are figures of another model."
            lines += [f"**No variant here is called {name}:** {whose}", ""]
        lines += [*_how_judged(result), *_tables(result)]
        lines += [f"{_shown(note)}  " for note in result.notes]
        if result.failed:
            lines.append(f"{counted(len(result.failed), 'item')} failed and are in no figure.")
        lines += [f"Finished {rest['finished'][:10]}.", ""]
    measured = _measured(content)
    missing = [name for kind, name in EVALUATIONS.items() if kind not in measured]
    if not content.results:
        return [f"Not evaluated: there are no figures of this model on {', '.join(missing)}, or on anything else."]
    return [*lines, f"Not evaluated: {', '.join(missing)}."] if missing else lines


def _measured(content: Content) -> set[str]:
    """The kinds of evaluation that were made."""
    kinds = {result.kind for result, _ in content.results}
    if "miniature" in kinds:
        kinds.add("judge")  # it measures the four criteria
    # Without --judged people are compared with each other alone.
    if not any(result.kind == "agreement" and result.settings.get("judge") for result, _ in content.results):
        kinds.discard("agreement")
    return kinds


def _how_judged(result: Result) -> list[str]:
    judge, rules = str(result.settings.get("judge") or ""), figures.judges_by_rules(result)
    lines = [f"Judge: {_shown(judge)}.", ""] if judge and [judge] != rules else []
    if rules:
        whose = "" if [judge] == rules else f" in the tables of {_shown(rules[0])}"
        lines += [
            f"**Judged by word lists{whose},** not by people or a language model: a text can hold every word of them "
            "and still be a bad answer. These figures show that the mechanism works, and say nothing of an answer's "
            "quality.",
            "",
        ]
    return lines


def _tables(result: Result) -> list[str]:
    """The main table, the publication's beside it, and the intervals; what is more, folded away."""
    tables = tables_of(result)
    first, others = tables[:1], tables[1:]
    intervals = [table for table in others if figures.is_intervals(table)][:1]  # over all prompts: it comes first
    shown = [*first, *(table for table in others if table.note == NOTE), *intervals]
    shown = [table for table in shown if len(table.rows) <= LONG]
    folded = [table for table in tables if not any(table is one for one in shown)]
    lines = [line for table in shown for line in _table(table)]
    if folded:
        more = [line for table in folded for line in _table(table)]
        lines += ["<details>", f"<summary>{counted(len(folded), 'more table')}</summary>", "", *more, "</details>", ""]
    return lines


def _table(table: Table) -> list[str]:
    lines = [f"#### {_shown(table.title)}", ""]
    if len(table.rows) > MAX_ROWS:
        return [*lines, f"{len(table.rows):,} rows, left out here.", ""]
    note = [_shown(table.note), ""] if table.note else []
    return [*lines, *map(without_folders, table_lines(table)), "", *note]


def _costs(content: Content) -> list[str]:
    lines = [
        "Fine-tuning for supportive refusals has a price. The publication measured it on Qwen3.5-27B: the fine-tuned "
        "model **complies with more unsafe prompts** of XSTest than the base, knows less, and its answers are less to "
        "the point.",
        "",
        "| | published, base → fine-tuned | this model, base → fine-tuned |",
        "| --- | --- | --- |",
    ]
    results = [result for result, _ in content.results]
    for cost in figures.COSTS:
        own = figures.measured(cost, results, content.run.name)
        lines.append(f"| {cost.meaning} | {figures.published(cost)} | {_shown('; '.join(own) or 'not measured')} |")
    return [*lines, "", "Expect costs of this kind wherever the right column has no figure."]


def _overlap(content: Content) -> list[str]:
    """How many of each evaluation's prompts stand among the training rows, as its result says."""
    asked = [result for result, _ in content.results if result.kind != "agreement"]  # which has no prompts of its own
    lines = [f"- {_shown(result.title)}: {_counted_overlap(result.contamination)}" for result in asked]
    return lines or ["Not measured: no evaluation of this model was compared with its training rows."]


def _counted_overlap(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "not measured."
    return (
        f"of {counted(counts['prompts'], 'prompt')}, {counts['exact']:,} stand in the training rows word by word, "
        f"{counts['normalised']:,} apart from case and punctuation."
    )


def _limits(content: Content) -> list[str]:
    lines = [
        "- A refusal that helps is still a refusal by a machine. It can miss that somebody is in danger, and can "
        "answer with support where none is wanted.",
        "- The helplines of its answers come from its training rows, which were not compared with those above "
        f"({', '.join(content.services.emergency)}). They may be of another country or out of date, and a model can "
        "garble a number.",
        f"- The recipe, the helplines and the evaluations are for English.{_rows_in(content.data.language)}",
        "- No score is a proof of safety. Overlap with training rows compares words; a paraphrase is not seen.",
    ]
    if "agreement" not in _measured(content):
        lines.append(
            "- How far a judge agrees with people was not measured for this model. The publication found "
            f"{_published_agreement()}: a low kappa is a weak basis for comparing models."
        )
    if content.names.base.is_bundled:
        lines.append("- The miniature knows few answers, and many are beside the point. Nobody should ask it for help.")
    return lines


def _rows_in(codes: str | list[str] | None) -> str:
    """In which languages the training rows are, where that is not English alone. codes: of the card's metadata."""
    codes = [codes] if isinstance(codes, str) else codes or []
    if not codes:
        return " Languages of the training rows: not read, or none that is known here."
    names = [languages()[code].name for code in codes]
    return "" if codes == [ENGLISH] else f" The training rows are in {' and '.join(names)}."


def _published_agreement() -> str:
    kappas = [f"{name} {kappa:.2f}" for name, kappa in TABLES["agreement"].rows]
    return f"Cohen's kappa of {', '.join(kappas)}"


def _citation() -> list[str]:
    return [
        "The system is that of the PsychoSafe paper; cite it by its number:",
        "",
        "```bibtex",
        "@misc{psychosafe,",
        "  note          = {PsychoSafe},",
        f"  eprint        = {{{ARXIV}}},",
        "  archivePrefix = {arXiv},",
        f"  url           = {{https://arxiv.org/abs/{ARXIV}}}",
        "}",
        "```",
    ]


def _shown(text: str) -> str:
    """A text of an evaluation for the card: no Markdown of its own, no folders of this machine."""
    return in_markdown(without_folders(text))
