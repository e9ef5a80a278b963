"""The optimiser of the adapter: AdamW over one flat buffer, with 8-bit or full states, and the learning-rate schedule.

All adapter tensors are views of one buffer, their gradients views of a second one. One call of `step` computes the
norm of the gradient, clips, and updates every tensor; kernels/ops/adamw_8bit.py holds the arithmetic and the layout of
the states.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import adamw_8bit
from kernels.lora_term import compute_dtype
from kernels.ops.adamw_8bit import AdamWState
from psysafe.model.lora import Segment
from psysafe.program import UserError


class AdamW:
    """AdamW with decoupled weight decay and clipping by the global norm; a step whose norm is not finite is skipped.

    flat_param, flat_grad (elements,): the two buffers, fp32 (or fp64, for which the moments are fp64 too).
    segments: the tensors in them. Elements outside all segments are never changed, and the norm leaves them out.
    betas: decay rates of the moments, in [0, 1). eps: added to the root of the corrected second moment.
    weight_decay: each step multiplies the parameters by 1 - lr * weight_decay.
    max_grad_norm: a gradient with a larger norm is scaled down to it; math.inf turns clipping off.
    state_bits: 8, or 32 for full moments throughout (then equal to torch.optim.AdamW).
    min_8bit_size: with state_bits 8, tensors with fewer elements keep full moments.

    After a step, `grad_norm` () is the norm before clipping and `skipped` () int32 the number of steps skipped in a
    row up to that step (0: it was applied). Both live on the device and are new tensors every step, so that the loop
    can read them one step late instead of waiting.

    Memory: 2 bytes an element and 8 for every 256 of them, or 8 bytes an element; a step allocates 4 bytes for every
    1,024 elements in Triton, and in the reference about 70 MB at most, for any number of elements.
    """

    def __init__(
        self,
        flat_param: Tensor,
        flat_grad: Tensor,
        segments: Sequence[Segment],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        state_bits: int,
        min_8bit_size: int,
    ):
        assert state_bits in (8, 32), state_bits
        check_layout(flat_param, flat_grad, segments)
        self.flat_param, self.flat_grad = flat_param, flat_grad
        self.settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        self.state = AdamWState.zeros(
            [(segment.start, segment.stop) for segment in segments],
            min_8bit_size if state_bits == 8 else math.inf,
            flat_param.device,
            # Moments in fp64 for an fp64 model, whose curve is compared with torch's AdamW to 1e-7.
            compute_dtype(flat_param),
        )
        # On the device from the start, so that the loop never asks whether a step has been done yet.
        self.grad_norm = torch.zeros((), dtype=compute_dtype(flat_param), device=flat_param.device)
        self.skipped = torch.zeros((), dtype=torch.int32, device=flat_param.device)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Applies flat_grad with this learning rate, or skips the step where the norm of flat_grad is not finite."""
        self.grad_norm, self.skipped = adamw_8bit(self.flat_param, self.flat_grad, self.state, lr, **self.settings)

    def zero_grad(self) -> None:
        self.flat_grad.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name: codes, scales, full moments, counters.

        These are the tensors themselves, not copies: the next step overwrites them.
        """
        return self.state.saved()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continues from saved `state_tensors`. UserError, and nothing changed, if they are not of this optimiser."""
        current = self.state_tensors()
        # All checks come before the first copy: a state that fits halfway would leave a mixture of two runs.
        if tensors.keys() != current.keys():
            saved, expected = (", ".join(sorted(names)) or "nothing" for names in (tensors, current))
            raise UserError(f"optimiser state holds {saved}; expected {expected}")
        for name, x in current.items():
            saved, expected = (f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (tensors[name], x))
            if saved != expected:
                raise UserError(
                    f"optimiser state: {name} is {saved}, this run needs {expected}; "
                    "resume with the model, adapter and state_bits that it was saved with"
                )
        for name, x in current.items():
            x.copy_(tensors[name])
        # A new tensor, as after every step: the counter itself is overwritten by the next one.
        self.skipped = self.state.counters[1].clone()


def check_layout(flat_param: Tensor, flat_grad: Tensor, segments: Sequence[Segment]) -> None:
    """Our own invariants: two alike, contiguous buffers, and segments that lie inside them one after another."""
    for x in (flat_param, flat_grad):
        assert x.dim() == 1 and x.is_contiguous() and x.dtype in (torch.float32, torch.float64)
    assert flat_param.shape == flat_grad.shape and flat_param.dtype == flat_grad.dtype
    assert flat_param.device == flat_grad.device and segments
    end = 0
    # Gaps are allowed: zero rows of projections that are no targets lie between the segments.
    for segment in sorted(segments, key=lambda segment: segment.start):
        assert end <= segment.start < segment.stop, f"{segment} is empty or overlaps what ends at {end}"
        end = segment.stop
    assert end <= len(flat_param), f"the last segment ends at {end}, the buffer at {len(flat_param)}"


def cosine_schedule(step: int, total_steps: int, warmup_steps: int, peak_lr: float) -> float:
    """The learning rate of step 0, 1, ...: a line from 0 to peak_lr over warmup_steps, then half a cosine down to 0.

    As transformers' get_cosine_schedule_with_warmup: the first step of a warm-up has rate 0, and a run shorter than its
    warm-up never reaches the peak. Skipped steps count here.
    """
    if step < warmup_steps:
        return peak_lr * (step / warmup_steps)
    # max(1, ...): a run whose steps are all warm-up would divide by zero here.
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak_lr * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
