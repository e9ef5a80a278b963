"""The loss, all of it: what is summed in a micro-batch, and by what the sum is divided.

    loss = 1/N  sum over the step's trained tokens t of  -log p(token t | the tokens before t in its document)

N is the number of trained tokens of the whole step, over all its micro-batches and ranks (`count_targets`). So every
trained token weighs the same, however the documents are cut into micro-batches and dealt to ranks. A mean of the
micro-batches' means would give a token in a short micro-batch more weight than one in a long one.

Labels are not shifted here: a micro-batch already names the rows of the hidden states that predict a trained token,
and that token (psysafe/data/documents.py).
"""

from collections.abc import Sequence

import torch

import kernels
from psysafe.data.documents import Document, MicroBatch
from psysafe.model.decoder import Qwen3_5


def count_targets(documents: Sequence[Document]) -> int:
    """N: the trained tokens of these documents, without any document's first token, which nothing predicts."""
    return sum(document.n_targets for document in documents)


def batch_loss(model: Qwen3_5, batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """The cross-entropy of a micro-batch, summed over its trained tokens: () in fp32, in fp64 for an fp64 model."""
    documents = kernels.Documents(batch.cu_seqlens, device)
    # The embedding may lie in host memory (--embedding cpu); tokens have to lie where it does.
    tokens = batch.tokens if model.embed_tokens.device.type == "cpu" else documents.to_device(batch.tokens)
    # Only rows that predict a trained token go through the last MLP and the head: (N, D) instead of (T, D).
    hidden = model(tokens, documents, rows=documents.to_device(batch.rows))
    loss = kernels.linear_cross_entropy(hidden, model.head, documents.to_device(batch.labels))
    # The weight is 1, or 0 for a padding micro-batch. A rank with fewer micro-batches than the others runs padding
    # ones, because all ranks gather sharded weights together. They run like any other, and add zeros.
    return batch.weight * loss
