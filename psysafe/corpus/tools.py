"""stats, split, leakage, validate: plain functions of rows; the command line is in __main__.py."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from psysafe.corpus.text import TEMPLATE_CHARACTERS, answer_of, normalise, opening, prompt_of, prompts_of, template
from psysafe.data.documents import Row, encode_rows, read_unchecked_rows
from psysafe.data.tokenizer import Tokenizer, rendered_pieces
from psysafe.files import write_atomic
from psysafe.program import UserError

CLUSTER, CATEGORY = "risk cluster", "risk category"
SPLIT_SEED = 42
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


# ---- stats


def shared(texts: Iterable[str]) -> int:
    """How many of the texts occur more than once."""
    return sum(count for count in Counter(texts).values() if count > 1)


def stats(rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int) -> dict:
    """Counts per cluster and category, duplicates, and token lengths of whole rendered rows."""
    answers = [answer_of(row) for row in rows]
    lengths = [len(document) for document in encode_rows(rows, tokenizer, 10**9).documents]
    return {
        "rows": len(rows),
        "clusters": dict(Counter(row.fields.get(CLUSTER, "-") for row in rows).most_common()),
        "categories": dict(Counter(_category(row) for row in rows).most_common()),
        "without reasoning": sum(not row.reasoning.strip() for row in rows if "messages" not in row.fields),
        "duplicate prompts": shared(normalise(prompt_of(row.fields)) for row in rows),
        "duplicate answers": shared(normalise(answer) for answer in answers),
        "answers that share a template": shared(template(answer) for answer in answers),
        "tokens": {str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in PERCENTILES},
        "tokens in all": sum(lengths),
        "rows over the limit": sum(length > max_tokens for length in lengths),
        "max_tokens": max_tokens,
        "lengths": lengths,
    }


def _category(row: Row) -> str:
    return f"{row.fields.get(CLUSTER, '-')} / {row.fields.get(CATEGORY, '-')}"


def stats_text(found: dict) -> str:
    """The statistics as lines for a terminal."""
    n = found["rows"]
    lines = [f"{n:,} rows, {found['tokens in all']:,} tokens"]
    for group in ("clusters", "categories"):
        lines.append(f"\n{group}")
        lines += [f"  {count:>7,}  {count / n:>6.1%}  {name}" for name, count in found[group].items()]
    lines.append("\nrows")
    for key in ("without reasoning", "duplicate prompts", "duplicate answers", "answers that share a template"):
        lines.append(f"  {found[key]:>7,}  {found[key] / n:>6.1%}  {key}")
    over = found["rows over the limit"]
    lines.append(f"  {over:>7,}  {over / n:>6.1%}  over {found['max_tokens']:,} tokens")
    lines.append("\ntokens a row, percentiles")
    lines.append("  " + "  ".join(f"{p}%: {value:,}" for p, value in found["tokens"].items()))
    return "\n".join(lines)


def plot_lengths(lengths: Sequence[int], max_tokens: int, path: Path) -> None:
    """A histogram of the rows' token lengths as PNG."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot: matplotlib is not installed; pip install matplotlib, or leave the flag out") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.hist(lengths, bins=min(60, max(10, len(set(lengths)))), color="#3b82f6")
    if max(lengths) > 0.5 * max_tokens:
        axes.axvline(max_tokens, color="#b91c1c", label=f"limit: {max_tokens:,}")
        axes.legend()
    axes.set(xlabel="tokens a row", ylabel="rows", title=f"{len(lengths):,} rows")
    figure.tight_layout()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    pyplot.close(figure)


# ---- split


def split(
    rows: Sequence[Row], val: int = 100, test: int = 100, seed: int = SPLIT_SEED, quoted_in: Sequence[str] = ()
) -> dict[str, list[Row]]:
    """{"train", "val", "test"}: per cluster, in the order of the clusters' names, the rows are shuffled by one
    random.Random(seed); the first `val` go to val, the next `test` to test, the rest to train.

    Rows whose prompt a system prompt quotes stay in train: as a test item they would be known.
    """
    prompts = [normalise(text) for text in quoted_in]
    groups: dict[str, list[Row]] = {}
    parts: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    for row in rows:
        cluster = row.fields.get(CLUSTER)
        if not isinstance(cluster, str):
            raise UserError(f"{row.where}: no {CLUSTER!r} in it; a stratified split needs one in every row")
        quoted = any(normalise(prompt_of(row.fields)) in text for text in prompts)
        (parts["train"] if quoted else groups.setdefault(cluster, [])).append(row)
    chance = random.Random(seed)
    for cluster in sorted(groups):
        members = groups[cluster]
        if len(members) < val + test:
            found = f"cluster {cluster!r:.60} has {len(members)} rows"
            raise UserError(f"{members[0].file}: {found}, too few for {val} val and {test} test rows")
        chance.shuffle(members)
        parts["val"] += members[:val]
        parts["test"] += members[val : val + test]
        parts["train"] += members[val + test :]
    return parts


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """JSONL with all fields, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row.fields, ensure_ascii=False) + "\n" for row in rows))


# ---- leakage


@dataclass(frozen=True)
class Leak:
    """One row whose prompt or answer stands somewhere that it should not."""

    row: Row
    what: str  # "prompt" or "answer"
    where: str
    exact: bool

    def __str__(self) -> str:
        return f"{self.row.where}: its {self.what} stands in {self.where} ({'exactly' if self.exact else 'normalised'})"


def leakage(
    held_out: Sequence[Row],
    training: Sequence[Row] = (),
    system_prompts: dict[str, str] | None = None,
    benchmarks: Sequence[str | Path] = (),
) -> list[Leak]:
    """Prompts of held-out rows, and the first 200 characters of their answers, found inside a system prompt or in a
    training row; and benchmark prompts that are rows, held out or not."""
    leaks = []
    prompt_rows, answer_rows = {}, {}
    for row in training:
        prompt_rows.setdefault(normalise(prompt_of(row.fields)), row)
        answer_rows.setdefault(template(answer_of(row)), row)
    for row in held_out:
        prompt, answer = prompt_of(row.fields), answer_of(row)
        start = answer[:TEMPLATE_CHARACTERS]
        for what, text, words in (("prompt", prompt, normalise(prompt)), ("answer", start, opening(answer))):
            for name, system in (system_prompts or {}).items():
                if words and f" {words} " in f" {normalise(system)} ":
                    leaks.append(Leak(row, what, name, text in system))
        twin = prompt_rows.get(normalise(prompt)) if prompt else None
        if twin:
            leaks.append(Leak(row, "prompt", twin.where, prompt == prompt_of(twin.fields)))
        twin = answer_rows.get(template(answer)) if answer else None
        if twin:
            leaks.append(Leak(row, "answer", twin.where, start == answer_of(twin)[:TEMPLATE_CHARACTERS]))
    for path in benchmarks:
        texts = prompts_of(path)
        known = {normalise(text) for text in texts}
        exact = set(texts)
        for row in (*training, *held_out):
            if normalise(prompt_of(row.fields)) in known:
                leaks.append(Leak(row, "prompt", str(path), prompt_of(row.fields) in exact))
    return leaks


# ---- validate


def validate(path: str | Path, clusters: dict[str, list[str]]) -> list[str]:
    """Everything that is wrong with a file's rows, a line each. clusters: known name -> its strategies."""
    problems, seen = [], {}
    for row in read_unchecked_rows(path):
        fields, where = row.fields, row.where
        if not isinstance(fields, dict):
            problems.append(f"{where}: {type(fields).__name__}, expected an object")
            continue
        if "messages" in fields:
            problems += [f"{where}: {problem}" for problem in _message_problems(fields["messages"])]
            continue
        for key in ("prompt", "answer", CLUSTER, CATEGORY, "framework_name"):
            if not isinstance(fields.get(key), str) or not fields[key].strip():
                problems.append(f"{where}: {key} is {json.dumps(fields.get(key))[:40]}, expected a text")
        cluster, strategy = fields.get(CLUSTER), fields.get("framework_name")
        if isinstance(cluster, str) and cluster not in clusters:
            problems.append(f"{where}: unknown {CLUSTER} {cluster!r}; known: {', '.join(clusters)}")
        elif isinstance(cluster, str) and clusters[cluster] and strategy not in clusters[cluster]:
            problems.append(f"{where}: {strategy!r} is no strategy of {cluster!r}: {', '.join(clusters[cluster])}")
        for key in ("reasoning", "reasoning_language"):
            if key in fields and not isinstance(fields[key], str):
                problems.append(f"{where}: {key} is {json.dumps(fields[key])[:40]}, expected a text")
        if isinstance(fields.get("prompt"), str):
            first = seen.setdefault(normalise(fields["prompt"]), where)
            if first != where:
                problems.append(f"{where}: the same prompt as {first}")
    return problems


def _message_problems(messages: object) -> list[str]:
    if not isinstance(messages, list) or not messages:
        return [f"messages is {json.dumps(messages)[:40]}, expected a list of messages"]
    try:
        rendered_pieces(messages)
    except ValueError as error:
        return [str(error)]
    return []
