"""One optimiser step: the only place where gradients are computed. train.py calls it, and so does the step on paper
(psysafe/training/paper/), so that what is counted there is what runs.
"""

import torch

from psysafe.data.documents import Document, pack_share, step_contrast_documents, step_documents
from psysafe.model.decoder import Qwen3_5
from psysafe.runtime import DeviceTime
from psysafe.training.loss import batch_loss, count_targets
from psysafe.training.optim import cosine_schedule
from psysafe.training.out_of_memory import again_with_less_memory
from psysafe.training.run_log import StepResult
from psysafe.training.setup import Run


def train_step(run: Run) -> StepResult:
    """One optimiser step over this rank's share of the step's documents."""
    config, runtime, adapters = run.config, run.runtime, run.adapters
    began = DeviceTime(runtime.device)
    documents = documents_of_step(run)
    # All ranks' tokens, not this rank's or this micro-batch's: cutting differently then changes memory alone (loss.py).
    n_targets = count_targets(documents)

    loss = backward(run, documents, n_targets)
    # Sums, not means: each part is already divided by all ranks' tokens.
    runtime.sum(adapters.grad, loss)

    lr = cosine_schedule(run.step, run.total_steps, config.warmup_steps, config.lr)
    run.optimizer.step(lr)  # clips; leaves everything as it is where the norm is not finite
    fields = {
        "step": run.step + 1,
        "lr": lr,
        "tokens": sum(map(len, documents)),
        "trained_tokens": n_targets,
        "epoch": run.step // run.steps_per_epoch + 1,
        "documents": [document.source for document in documents],
    }
    return StepResult(began, fields, loss=loss, grad_norm=run.optimizer.grad_norm, skipped=run.optimizer.skipped)


def documents_of_step(run: Run) -> list[Document]:
    """The training documents of the coming step, then its contrast documents."""
    config, n_documents = run.config, len(run.train_set)
    indices = step_documents(n_documents, run.step, config.batch_size, config.seed)
    documents = [run.train_set.documents[i] for i in indices]
    if run.contrast_set is not None:
        order = n_documents, run.step, config.batch_size, config.seed
        indices = step_contrast_documents(len(run.contrast_set), config.contrast_ratio, *order)
        documents += [run.contrast_set.documents[i] for i in indices]
    return documents


@again_with_less_memory
def backward(run: Run, documents: list[Document], n_targets: int) -> torch.Tensor:
    """Fill adapters.grad with the gradient of this rank's part of the loss. Returns that part: (), on the device."""
    runtime = run.runtime
    run.optimizer.zero_grad()
    loss = torch.zeros((), dtype=run.adapters.param.dtype, device=runtime.device)
    for batch in pack_share(documents, run.config.micro_batch_tokens, runtime.rank, runtime.world_size):
        run.watch.progress(run.step + 1)
        run.fit_into_memory(batch)
        part = batch_loss(run.model, batch, runtime.device, run.config.kl_weight) / n_targets
        add_gradients(run.model, part)
        loss += part.detach()  # .item() here would wait for the device
    run.watch.progress(run.step + 1)
    return loss


def add_gradients(model: Qwen3_5, loss: torch.Tensor) -> None:
    """Add the gradients of a loss () to the adapters' flat gradient: as loss.backward(), bit for bit, in one operation.

    Autograd by itself would add every tensor in an operation of its own, which are 320 tiny launches in the 27B.
    """
    trained = [p for p in model.parameters() if p.requires_grad]  # the adapters' A and B; the base is frozen
    torch._foreach_add_([p.grad for p in trained], torch.autograd.grad(loss, trained))  # .grad: views of the flat one
