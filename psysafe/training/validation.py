"""What is measured on rows that nothing trains on, after each epoch and before the first step, and which adapter was
the best by it.

    losses = validate(run)      # {"val_loss": 0.0051, "contrast_loss": 0.42, "contrast_kl": 0.06}
    record_best(run, losses)    # run.best: with --keep-best both the one whose 0.0651 is the lowest so far
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from psysafe.data.documents import Dataset, MicroBatch, pack_share
from psysafe.training.loss import batch_loss, contrast_losses, count_targets
from psysafe.training.setup import KEEP_BEST, Best, Run


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """val_loss, the mean cross-entropy of the validation rows' trained tokens, and of the contrast rows that are set
    apart contrast_loss, the same, and contrast_kl, the mean KL(base || model) in nats. Without rows they are left out.
    """
    device, losses = run.runtime.device, {}
    if run.val_set is not None:
        (losses["val_loss"],) = _means(run, run.val_set, lambda batch: batch_loss(run.model, batch, device)[None])
    if run.contrast_val_set is not None:
        means = _means(run, run.contrast_val_set, lambda batch: contrast_losses(run.model, batch, device))
        losses["contrast_loss"], losses["contrast_kl"] = means
    return losses


def _means(run: Run, data: Dataset, sums_of: Callable[[MicroBatch], torch.Tensor]) -> list[float]:
    """Sums over a micro-batch (n,), added up over all of them and all ranks, a trained token."""
    runtime, totals = run.runtime, torch.zeros((), dtype=torch.float64)
    for batch in pack_share(data.documents, run.config.micro_batch_tokens, runtime.rank, runtime.world_size):
        run.watch.progress(max(1, run.step))  # the watchdog counts steps from 1, also before the first
        totals = totals + sums_of(batch).cpu()
    if runtime.world_size > 1:
        dist.all_reduce(totals)
    return (totals / count_targets(data.documents)).tolist()


def record_best(run: Run, losses: Mapping[str, float]) -> None:
    """Keep in `run` the lowest val_loss, and with --keep-best the adapter of the best validation.

    The one before the first step is no candidate: an adapter that adds nothing has no divergence from the base.
    """
    if math.isfinite(losses.get("val_loss", math.nan)):
        run.best_val = min(losses["val_loss"], math.inf if run.best_val is None else run.best_val)
    if run.config.keep_best == "last" or run.step == 0:
        return
    value = score(losses, run.config.keep_best)
    if math.isfinite(value) and (run.best is None or value < run.best.score):
        run.best = Best(run.step, value, run.adapters.param.detach().to("cpu", copy=True))


def score(losses: Mapping[str, float], keep_best: str) -> float:
    """What --keep-best compares, the lower the better: val is val_loss, contrast is contrast_kl, both is their sum."""
    return sum(losses[name] for name in KEEP_BEST[keep_best])
