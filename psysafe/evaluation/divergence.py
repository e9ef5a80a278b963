"""How far an adapter moves a model on texts that its base wrote: KL(base || tuned), in nats a token.

    KL(q || p) = 1/N sum_t sum_v q(v | t) (log q(v | t) - log p(v | t))

q: the base, p: the same forward with the adapter (the letters of psysafe/training/loss.py); t: the N tokens of an
answer, its reasoning included; v: the whole vocabulary. 0 where the adapter changes nothing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels import Documents
from psysafe.checkpoint.adapter import load_adapter
from psysafe.cli import progress
from psysafe.data.documents import Document, MicroBatch, pack
from psysafe.data.prompts import with_system
from psysafe.data.tokenizer import THINK, THINK_END, Message, Tokenizer
from psysafe.evaluation.models_under_test import ModelUnderTest, Question, Variant, variant_identity
from psysafe.files import expand
from psysafe.journal import Journal, key_of
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import detach, disabled

BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
LOGIT_ROWS = 128  # rows of fp32 logits at a time, of both models: 260 MB for a vocabulary of 248,320


class Conversation(NamedTuple):
    """A question with the base's answer to it, and what may be called in it."""

    messages: list[Message]
    tools: object = None

    @property
    def identity(self) -> list:
        return [self.messages, *([self.tools] if self.tools else [])]


def conversation(question: Question, answer: dict, system: str | None) -> Conversation:
    """answer: the row of the base's answer, with reasoning and answer."""
    content = f"{THINK}\n{answer['reasoning']}\n{THINK_END}\n\n{answer['answer']}"
    messages = [*with_system(question.turns(), system), {"role": "assistant", "content": content}]
    return Conversation(messages, question.tools)


def by_variant(
    model: ModelUnderTest, asked: dict[Variant, dict[str, Conversation]], out: str | Path
) -> dict[Variant, dict[str, float]]:
    """The divergence of each variant on each conversation, by the caller's keys.

    asked: tuned variant -> key -> the base's answered conversation (`conversation`). What `out` (JSONL) holds is not
    computed again.
    """
    identity = model.identity
    keys = {
        v: {k: key_of("kl", identity, *variant_identity(v), *c.identity) for k, c in asked[v].items()} for v in asked
    }
    with Journal(out) as journal:
        missing = {v: [keys[v][k] not in journal.rows for k in asked[v]] for v in asked}
        if any(map(any, missing.values())):
            loaded, tokenizer = model.load(list(asked))
            for variant in (v for v in asked if any(missing[v])):
                load_adapter(loaded, expand(variant.adapter))
                key_of_place = list(keys[variant].values())
                values = divergences(loaded, tokenizer, list(asked[variant].values()), missing[variant], variant.name)
                for place, value in values:
                    journal.append(key_of_place[place], {"variant": variant.name, "kl": value})
                detach(loaded)
        journal.sync()
        return {v: {k: journal.rows[keys[v][k]]["kl"] for k in asked[v]} for v in asked}


def divergences(
    model: Qwen3_5,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    missing: Sequence[bool],
    description: str = "",
) -> Iterator[tuple[int, float]]:
    """(place, mean KL(base || tuned) over the assistant's tokens) of each conversation that is missing.

    model: with its adapter attached. How the conversations are packed depends on all of them, and a micro-batch is
    computed as a whole: a run that was interrupted rounds as one that was not.
    """
    encoded = (tokenizer.encode_trained(*conversation) for conversation in conversations)
    documents = [Document(np.array(ids, np.int32), np.array(trained), "") for ids, trained in encoded]
    first = 0
    with progress(sum(missing), f"{description}: KL to the base", "answers") as bar:
        for batch in pack(documents, BATCH_TOKENS[model.embed_tokens.device.type]):
            places = range(first, first + len(batch.cu_seqlens) - 1)
            first = places.stop
            if any(missing[i] for i in places):
                by_document = _by_token(model, batch).split([documents[i].n_targets for i in places])
                yield from ((i, by_document[i - places.start].mean().item()) for i in places if missing[i])
                bar.update(sum(missing[i] for i in places))


@torch.inference_mode()
def _by_token(model: Qwen3_5, batch: MicroBatch) -> Tensor:
    """KL at each row that predicts a token of an answer: (N,) fp64 on the CPU."""
    device = model.embed_tokens.device
    tokens, rows, bounds = batch.tokens.to(device), batch.rows.to(device), Documents(batch.cu_seqlens, device)
    tuned = model(tokens, bounds, rows=rows)
    with disabled(model):
        base = model(tokens, bounds, rows=rows)
    values = []
    for pair in zip(base.split(LOGIT_ROWS), tuned.split(LOGIT_ROWS), strict=True):
        log_q, log_p = (_log_softmax(model.logits(hidden)) for hidden in pair)
        values.append((log_q.exp() * (log_q - log_p)).sum(-1))
    return torch.cat(values).double().cpu()


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
