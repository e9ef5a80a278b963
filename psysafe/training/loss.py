"""The loss, all of it: what is summed in a micro-batch, and by what the sum is divided.

    loss = 1/N (sum over the training rows' tokens t of C_t  +  sum over the contrast rows' tokens t of C_t)
    C_t  = -log p(token t | the tokens before t in its document)

With --kl-weight L the contrast rows are not held to the base's words, but to all that the base would have said:

    loss = 1/N (sum over the training rows' tokens t of C_t  +  L sum over the contrast rows' tokens t of K_t)
    K_t  = KL(q || p) = sum over the vocabulary v of q(v) (log q(v) - log p(v)),   q: the base at the same place

Only trained tokens count. N is their number in the whole step, over both kinds of rows, all micro-batches and ranks
(`count_targets`). So every trained token weighs the same, however the documents are cut into micro-batches and dealt to
ranks. A mean of the micro-batches' means would give a token in a short micro-batch more weight than one in a long one,
and a mean of its own for the contrast rows would do the same to their few tokens.

Labels are not shifted here: a micro-batch already names the rows of the hidden states that predict a trained token,
and that token (psysafe/data/documents.py).
"""

from collections.abc import Sequence

import torch

import kernels
from psysafe.data.documents import Document, MicroBatch
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import disabled


def count_targets(documents: Sequence[Document]) -> int:
    """N: the trained tokens of these documents, without any document's first token, which nothing predicts."""
    return sum(document.n_targets for document in documents)


def batch_loss(model: Qwen3_5, batch: MicroBatch, device: torch.device, kl_weight: float = 0.0) -> torch.Tensor:
    """A micro-batch's part of the sum in the brackets above: () in fp32, in fp64 for an fp64 model."""
    if kl_weight and batch.contrast is not None:
        # Before the model's own pass, whose saved tensors then take the memory.
        base = base_hidden_rows(model, batch, device)
        hidden, labels = hidden_rows(model, batch, device)
        hidden, contrast = hidden.split([len(hidden) - len(base), len(base)])
        loss = kernels.linear_cross_entropy(hidden, model.head, labels[: len(hidden)])
        loss = loss + kl_weight * kernels.linear_kl(contrast, base, model.head)
    else:
        hidden, labels = hidden_rows(model, batch, device)
        loss = kernels.linear_cross_entropy(hidden, model.head, labels)
    # The weight is 1, or 0 for a padding micro-batch. A rank with fewer micro-batches than the others runs padding
    # ones, because all ranks gather sharded weights together. They run like any other, and add zeros.
    return batch.weight * loss


def contrast_losses(model: Qwen3_5, batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """(sum of C_t, sum of K_t) of a micro-batch of contrast documents alone: (2,) in fp32 or wider, for validation."""
    base = base_hidden_rows(model, batch, device)
    hidden, labels = hidden_rows(model, batch, device)
    cross_entropy = kernels.linear_cross_entropy(hidden, model.head, labels)
    kl = kernels.linear_kl(hidden[: len(base)], base, model.head)
    return batch.weight * torch.stack([cross_entropy, kl])


def hidden_rows(model: Qwen3_5, batch: MicroBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden rows (N, D) that predict a trained token, and these tokens (N,)."""
    documents = kernels.Documents(batch.cu_seqlens, device)
    # The embedding may lie in host memory (--embedding cpu); tokens have to lie where it does.
    tokens = batch.tokens if model.embed_tokens.device.type == "cpu" else documents.to_device(batch.tokens)
    # Only rows that predict a trained token go through the last MLP and the head: (N, D) instead of (T, D).
    hidden = model(tokens, documents, rows=documents.to_device(batch.rows))
    return hidden, documents.to_device(batch.labels)


@torch.no_grad()
def base_hidden_rows(model: Qwen3_5, batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """(n_contrast, D): what the base has in the places of the micro-batch's last n_contrast rows."""
    with disabled(model):
        hidden, _ = hidden_rows(model, batch.contrast, device)
    # Of padding, which is read for the gathering's sake alone, no row is wanted.
    return hidden[: batch.n_contrast]
