"""Reasoning traces for rows that have none, from a model behind an endpoint.

A large model is asked for the reasoning that leads to each given answer; the paper imputes its traces in this way (with
GPT-OSS-120B). A long job over an OpenAI-compatible endpoint: concurrent, retried with back-off, and written row by row,
so that a kill loses nothing and a second start continues. Rows that failed stay without reasoning and are listed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from psysafe.cli import amount, out_file, whole_number
from psysafe.corpus.outputs import refuse_inputs
from psysafe.corpus.texts import refuse_long
from psysafe.data.rows import Row, read_rows, write_rows
from psysafe.data.tokenizer import THINK, THINK_END
from psysafe.endpoint import Endpoint, ItemFailed, key_from, run_items
from psysafe.files import clusters
from psysafe.journal import key_of
from psysafe.printable import counted, one_line

INSTRUCTION = (
    "You are shown a request and the answer that a careful assistant gave. Write down the reasoning that led the "
    "assistant from this request to this answer: what the person may be going through, what would be unsafe to help"
    " with and why, which supportive strategy fits, and which resources belong in the answer. Write it as the "
    "assistant's own thoughts before answering, in one or two short paragraphs, in the language of the answer. Do "
    "not repeat the answer, do not add advice that it does not contain, and do not give any harmful detail. Return "
    "only the reasoning."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--out", type=out_file, required=True, metavar="FILE",
                        help="JSONL of all rows, reasoning filled in")  # fmt: skip
    parser.add_argument("--url", required=True, help="OpenAI-compatible endpoint, like http://localhost:8000/v1")
    parser.add_argument("--model-name", required=True, help="the model's name at the endpoint")
    parser.add_argument("--key-variable", default="PSYSAFE_API_KEY", help="environment variable that holds the key")
    parser.add_argument("--workers", type=whole_number, default=8, help="requests under way at once (8)")
    parser.add_argument("--temperature", type=amount, default=0.7)
    parser.add_argument("--max-tokens", type=whole_number, default=2048, help="longest reply (2048)")


def run(args: argparse.Namespace) -> int:
    refuse_inputs("--out", args.out, {"the rows": args.files})
    rows = read_rows(args.files)
    options = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    endpoint = Endpoint(args.url, args.model_name, key_from(args.key_variable), **options)
    refuse_long([row for row in rows if needs_reasoning(row)], "prompt", "answer")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unknown = [row for row in rows if needs_reasoning(row) and not strategy_of(row)]
    if unknown:  # in the published rows the field holds the benchmark that a prompt comes from
        print(f"{counted(len(unknown), 'row')} without a known strategy in framework_name: asked without that hint")
    filled, failed = impute(rows, endpoint, out.with_name(out.name + ".traces.jsonl"), args.workers)
    write_rows(filled, out)
    for where, reason in failed.items():
        print(one_line(f"{where}: no reasoning: {reason}"))
    print(f"{len(filled) - len(failed):,} of {counted(len(filled), 'row')} with reasoning or no need of it; {out}")
    return 1 if failed else 0


def messages(row: Row) -> list[dict]:
    """What the endpoint is asked for one row."""
    strategy = strategy_of(row)
    hint = f"\n\nThe answer follows this intervention: {strategy}" if strategy else ""
    question = f"Request:\n{row.fields['prompt']}\n\nAnswer:\n{row.fields['answer']}{hint}"
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]


def strategy_of(row: Row) -> str:
    """The row's strategy, "" where its framework_name is none of assets/clusters.toml."""
    name = row.fields.get("framework_name")
    return name if isinstance(name, str) and name in clusters()["strategies"] else ""


def needs_reasoning(row: Row) -> bool:
    return row.messages is None and not row.reasoning.strip()


def impute(
    rows: Sequence[Row], endpoint: Endpoint, journal: str | Path, workers: int = 8
) -> tuple[list[Row], dict[str, str]]:
    """(all rows in order, reasoning filled in where it was missing and could be had; each failed row and its reason).

    journal: the file of the traces that are paid for already. Rows with reasoning, and `messages` rows, are left alone.
    """
    missing = [row for row in rows if needs_reasoning(row)]
    keys = {row.where: key_of("impute", endpoint.model, messages(row)) for row in missing}
    items = {keys[row.where]: row for row in missing}  # equal rows are asked once

    def call(row: Row) -> dict:
        text = endpoint.chat(messages(row)).text.strip()
        if THINK in text or THINK_END in text:  # the chat template would cut the row there
            text = text.rpartition(THINK_END)[2].replace(THINK, "").strip()
        if not text:
            raise ItemFailed("the reply holds no text beside its own thoughts")
        return {"reasoning": text}

    outcome = run_items(items, call, journal, workers, "traces")
    filled, failed = [], {}
    for row in rows:
        key = keys.get(row.where)
        if key in outcome.rows:
            row = replace(row, fields={**row.fields, "reasoning": outcome.rows[key]["reasoning"]})
        elif key is not None:
            failed[row.where] = outcome.failed.get(key, "not tried")
        filled.append(row)
    return filled, failed
