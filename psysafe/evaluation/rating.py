"""eval.py rate: one HTML page on which people rate the answers of two variants without knowing whose they are.

    python eval.py rate --answers answers.jsonl --per-cluster 5 --out runs/rate
    python eval.py agreement --ratings anna.json ben.json --key runs/rate/key.json --out runs/people

Writes rate.html, which raters open from a file, and key.json, which names the variants and stays with whoever runs the
study. Prompts are drawn from those that both variants answered. An unfinished answer is no answer, and its prompt is
left out; so are prompts of the cluster benign, which the criteria do not concern.
"""

import argparse
import hashlib
import html
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from psysafe import helplines, services, web_page
from psysafe.cli import out_folder, say, whole_number
from psysafe.data.languages import html_lang
from psysafe.data.rows import BENIGN
from psysafe.evaluation.criteria import CRITERIA, RUBRIC
from psysafe.evaluation.labels import LABELS, YES_NO
from psysafe.evaluation.models_under_test import VariantAnswers
from psysafe.evaluation.stored import add_answers_argument, read_all
from psysafe.files import ASSETS, read_json, read_text, write_atomic
from psysafe.printable import counted
from psysafe.program import UserError
from psysafe.services import Services

TITLE = "Rating answers"
NOTICE = "You will read what people in distress write, or people who ask for something harmful, and answers to it."
KEYS = "By keyboard: y, n and 1 to 5 choose in a question, a, b and n the answer that you prefer."
ITEMS = 25  # as in the publication's study: five prompts of each of five clusters
Pair = tuple[str, str]  # two variants


def arguments(parser: argparse.ArgumentParser) -> None:
    add_answers_argument(parser)
    parser.add_argument("--settings", metavar="A,B", help="the two variants, where there are more")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--items", type=whole_number, metavar="N", help=f"prompts drawn from all ({ITEMS}, or all)")
    amount.add_argument("--per-cluster", type=whole_number, metavar="N", help="prompts drawn from each risk cluster")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts and sides that are drawn (0)")
    services.add_arguments(parser, "helplines on the page")
    parser.add_argument("--out", type=out_folder, required=True, metavar="DIR",
                        help="where rate.html and key.json are written")  # fmt: skip


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    return services.without_effect(args)


def run(args: argparse.Namespace) -> None:
    if not args.answers:
        raise UserError("expected --answers [NAME=]FILE, the answers to rate (generate.py --prompts FILE --out FILE)")
    given = services.from_arguments(args, every_cluster=False)
    answers = read_all(args.answers)
    pair = chosen_pair(answers, args.settings)
    rows, left_out = comparable(answers[pair[0]], answers[pair[1]])
    generator = random.Random(args.seed)
    prompts = draw(rows, args.items, args.per_cluster, generator, left_out)
    content, key = content_and_key(answers, pair, prompts, args.seed, generator)
    out = Path(args.out)
    _refuse_other_key(out / "key.json", key["page"])
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "key.json", json.dumps(key | {"left out": left_out}, indent=1) + "\n")
    write_atomic(out / "rate.html", page(content, given))
    reasons = "".join(f"; {reason}: {count:,}" for reason, count in left_out.items() if count)
    say(f"{counted(len(prompts), 'prompt')} with the answers of {' and '.join(pair)}{reasons}")
    say(f"raters get {out / 'rate.html'}; {out / 'key.json'} names the variants, and is not for them")


# What is rated


def chosen_pair(answers: Mapping[str, VariantAnswers], settings: str | None) -> Pair:
    """The two variants: those that there are, or those of --settings. A name may hold commas itself, as "base, v0"."""
    names = "; ".join(answers)
    if settings is None:
        if len(answers) != 2:
            remedy = "choose two with --settings A,B" if len(answers) > 2 else "add --answers [NAME=]FILE of another"
            raise UserError(f"--answers: {counted(len(answers), 'variant')} ({names}); expected 2, {remedy}")
        first, second = answers
        return first, second
    parts = settings.split(",")
    pairs = [(",".join(parts[:i]).strip(), ",".join(parts[i:]).strip()) for i in range(1, len(parts))]
    pairs = [(first, second) for first, second in pairs if {first, second} <= answers.keys() and first != second]
    if len(pairs) != 1:
        raise UserError(f"--settings {settings}: not two of the variants ({names}); expected A,B of these")
    return pairs[0]


def comparable(first: VariantAnswers, second: VariantAnswers) -> tuple[dict[str, str], dict[str, int]]:
    """(prompt -> cluster of those that both have answered, how many others there were and why)."""
    both = [prompt for prompt in first.rows if prompt in second.rows]
    unfinished = first.unfinished_thinking | second.unfinished_thinking
    finished = [prompt for prompt in both if prompt not in unfinished]
    rows = {prompt: first.rows[prompt]["cluster"] for prompt in finished if first.rows[prompt]["cluster"] != BENIGN}
    counts = {
        "left out, answered by one of them only": len(first.rows.keys() ^ second.rows.keys()),
        "left out, unfinished by either": len(both) - len(finished),
        "left out, benign": len(finished) - len(rows),
        "answers to a prompt that stood there before": first.repeated + second.repeated,
    }
    return rows, counts


def draw(
    rows: Mapping[str, str],
    n_items: int | None,
    per_cluster: int | None,
    generator: random.Random,
    left_out: Mapping[str, int],
) -> list[str]:
    """The prompts of the page, in an order drawn at random. UserError where there are fewer than were asked for."""
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in left_out.items() if count)
    have = f"{counted(len(rows), 'prompt')} that both variants answered" + (f" ({reasons})" if reasons else "")
    if not rows:
        raise UserError(f"--answers: no prompts that both variants answered ({reasons}); expected the same prompts")
    if per_cluster is None:
        if n_items and n_items > len(rows):
            raise UserError(f"--items {n_items}: only {have}; ask for fewer, or add answers")
        return generator.sample(list(rows), n_items or min(ITEMS, len(rows)))
    clusters: dict[str, list[str]] = {}
    for prompt, cluster in rows.items():
        clusters.setdefault(cluster, []).append(prompt)
    if "" in clusters:
        raise UserError(f"--per-cluster: {counted(len(clusters['']), 'prompt')} without a risk cluster; give --items N")
    for cluster, prompts in clusters.items():
        if len(prompts) < per_cluster:
            raise UserError(f"--per-cluster {per_cluster}: {len(prompts):,} of {cluster} among {have}; ask for fewer")
    prompts = [prompt for of_cluster in clusters.values() for prompt in generator.sample(of_cluster, per_cluster)]
    generator.shuffle(prompts)
    return prompts


def content_and_key(
    answers: Mapping[str, VariantAnswers], pair: Pair, prompts: Sequence[str], seed: int, generator: random.Random
) -> tuple[dict, dict]:
    """(what the page holds, the key). Which variant stands first in an item is drawn; no name of one is in the page.

    `page` is a digest of all that is shown, and of the seed: a study with other sides is never taken for this one.
    """
    items, key_items = [], {}
    for number, prompt in enumerate(prompts, 1):
        left, right = generator.sample(pair, 2)
        texts = [answers[name].rows[prompt]["answer"] for name in (left, right)]
        item = {"id": str(number), "prompt": prompt, "answers": texts}
        langs = [html_lang(text) for text in (prompt, *texts)]
        # Only where a text has one: a study in English keeps its digest, and what its raters exported stays valid.
        items.append(item | {"langs": langs} if any(langs) else item)
        key_items[str(number)] = {"prompt": prompt, "left": left, "right": right}
    content = {"kind": "rate", "criteria": criteria_of(read_text(RUBRIC)), "items": items}
    digest = hashlib.sha256(json.dumps([seed, content]).encode()).hexdigest()[:16]
    return {"page": digest, **content}, {"page": digest, "seed": seed, "settings": list(pair), "items": key_items}


def _refuse_other_key(path: Path, digest: str) -> None:
    """UserError where a key of another page would be lost: what its raters export could not be read any more."""
    if path.exists() and (other := read_json(path).get("page")) != digest:
        raise UserError(f"{path}: the key of another page ({other!r:.40}); give another --out")


# The page


def rubric_paragraphs(text: str) -> list[list[str]]:
    """The lines of each paragraph: an introduction, then one for each criterion. What only a model has to be told, the
    form of its reply, is not among them."""
    paragraphs = [paragraph.splitlines() for paragraph in text.strip().split("\n\n")]
    return paragraphs[: 1 + len(CRITERIA)]


def criteria_of(rubric: str) -> list[dict]:
    """Of each criterion name, title, and options: what may be chosen, by which key, and what the rubric says of it."""
    criteria = []
    for name, (heading, *lines) in zip(CRITERIA, rubric_paragraphs(rubric)[1:], strict=True):
        meanings = dict(match.groups() for line in lines if (match := re.fullmatch(r"([1-5]): (.+)", line)))
        words = ["yes", "no"] if LABELS[name] is YES_NO else LABELS[name]
        options = [
            {"value": int(word) if word.isdecimal() else word.capitalize(), "label": word.capitalize(), "key": word[0],
             "meaning": meanings.get(word, "")}
            for word in words
        ]  # fmt: skip
        criteria.append({"name": name, "title": heading.partition(" - ")[2], "options": options})
    return criteria


def rubric_html(rubric: str) -> str:
    introduction, *criteria = rubric_paragraphs(rubric)
    parts = [f"<p>{html.escape(' '.join(introduction))}</p>"]
    for heading, *lines in criteria:
        parts.append(f"<h3>{html.escape(heading)}</h3>")
        parts += [f"<p>{html.escape(line)}</p>" for line in lines]
    return "\n".join(parts)


def page(content: dict, given: Services | None = None) -> str:
    """The page as one HTML file. given: helplines instead of the bundled ones."""
    instructions = read_text(ASSETS / "rate.html").replace("<!-- rubric -->", rubric_html(read_text(RUBRIC)))
    parts = {"title": TITLE, "notice": NOTICE, "instructions": instructions, "keys": KEYS}
    parts["helplines"] = helplines.as_html(given)
    return web_page.build("form.html", parts, ["form.css"], ["element.js", "form.js", "rate.js"], content)
