"""Reasoning traces for rows that have none: a large model is asked for the reasoning that leads to each given answer.

The paper imputes its traces in this way (with GPT-OSS-120B). A long job over an OpenAI-compatible endpoint: concurrent,
retried with back-off, and written row by row, so that a kill loses nothing and a second start continues. Rows that
failed stay without reasoning and are listed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from psysafe.data.documents import Row
from psysafe.data.tokenizer import THINK, THINK_END
from psysafe.endpoint import Endpoint, ItemFailed, run_items
from psysafe.journal import key_of

INSTRUCTION = (
    "You are shown a request and the answer that a careful assistant gave. Write down the reasoning that led the "
    "assistant from this request to this answer: what the person may be going through, what would be unsafe to help"
    " with and why, which supportive strategy fits, and which resources belong in the answer. Write it as the "
    "assistant's own thoughts before answering, in one or two short paragraphs, in the language of the answer. Do "
    "not repeat the answer, do not add advice that it does not contain, and do not give any harmful detail. Return "
    "only the reasoning."
)


def messages(row: Row) -> list[dict]:
    """What the endpoint is asked for one row."""
    strategy = row.fields.get("framework_name")
    hint = f"\n\nThe answer follows this intervention: {strategy}" if strategy else ""
    question = f"Request:\n{row.fields['prompt']}\n\nAnswer:\n{row.fields['answer']}{hint}"
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]


def impute(
    rows: Sequence[Row], endpoint: Endpoint, journal: str | Path, workers: int = 8, say=None
) -> tuple[list[Row], dict[str, str]]:
    """(all rows in order, reasoning filled in where it was missing and could be had; each failed row and its reason).

    journal: the file that keeps the traces already paid for. Rows with reasoning, and `messages` rows, are left alone.
    """
    wanting = [row for row in rows if "messages" not in row.fields and not row.reasoning.strip()]
    keys = {row.where: key_of("impute", endpoint.model, messages(row)) for row in wanting}
    items = {keys[row.where]: row for row in wanting}  # equal rows are asked once

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
