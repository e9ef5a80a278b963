"""Records everything that a program does on the paper GPU: launches, torch's own operations, and live memory.

    with record(model) as trace:
        train_step(run)                  # on the meta device
    trace.ops                            # in order: what ran, its bytes and FLOP, its layer, the line it came from
    trace.peak, trace.peak_op            # the most memory that was live, and the operation that asked for it

Nothing is computed. A program that wants to know a value cannot go on, and that is the point: on a GPU the host would
have to wait there. So would a tensor that lies in host memory stop it. Both are errors that name the line.

torch.distributed._tools.mem_tracker.MemTracker follows storages in the same way. It sees neither Triton's launches nor
the line of an operation, and does not round on meta; so its idea is used here, and not the class.
"""

import contextlib
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kernels.paper import H100_MULTIPROCESSORS, Argument, Launch, on_paper
from psysafe.model import recompute

ROOT = Path(__file__).resolve().parents[3]
BLOCK = 512  # bytes: torch's caching allocator rounds every allocation up to a multiple
_RECORDERS = (str(ROOT / "kernels" / "paper.py"), str(Path(__file__).parent))
_OPTIMIZER = ("psysafe/training/optim.py", "kernels/ops/adamw_8bit.py")

# Operations that give memory without content: no kernel runs.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FROM_VALUES = "detach_"  # what is left on meta of torch.tensor(values, device=...): a copy for which the host waits
_GATHERS = {"index_select", "index", "gather", "embedding"}
_SCATTERS = {"index_copy_", "index_put_", "_index_put_impl_", "scatter_", "index_add_"}
# (launch, argument) -> how often its bytes pass: what is updated in place is read and written, and the losses read
# their logits twice (of the second reading L2 serves a part). S and dS are read by TMA and, from L2, by pointer.
_PASSES = {
    **{("gated_delta_rule_backward dk", name): 0 for name in ("p_ST", "p_dST")},
    ("linear_cross_entropy cross_entropy", "p_z"): 3,
    ("linear_kl kl_divergence", "p_z"): 3,
    ("linear_kl kl_divergence", "p_base"): 2,
    ("causal_conv1d_silu_step step", "p_tail"): 2,
    ("gated_delta_rule_step step", "p_state"): 2,
    **{("adamw_8bit update", f"p_{x}"): 2 for x in ("param", "code_m", "code_v", "absmax_m", "absmax_v", "m", "v")},
}
_COPIES = {"_to_copy", "copy_"}
_OVERWRITE = {"aten::fill_", "aten::zero_", "aten::copy_"}


class PaperError(RuntimeError):
    """The program did what a step on a GPU must not do. The message names the operation and the line."""


@dataclass(frozen=True)
class Op:
    """One kernel or copy. shape: of what it writes. bytes: read plus written, each tensor once. live: bytes in use.

    layer: the block that it belongs to, None outside all blocks. where: the line that called it; of a gradient that
    autograd derived itself, the line of the forward pass. launch: of Triton's kernels. from_host: copies from there.
    """

    name: str
    phase: str  # forward, backward, recompute, optimizer
    layer: int | None
    where: str
    shape: tuple[int, ...]
    bytes: int
    flops: int
    live: int
    launch: Launch | None = field(default=None, repr=False)
    from_host: bool = False


@dataclass
class Trace:
    """What was recorded. fixed: bytes in use before; live: now, in the end; peak: the most, asked for at peak_where."""

    ops: list[Op] = field(default_factory=list)
    fixed: int = 0
    live: int = 0
    peak: int = 0
    peak_op: int = 0  # the number of the operation whose result made it the peak
    peak_where: str = ""

    @property
    def peak_name(self) -> str:
        """The operation that asked for the peak: "sum, forward"."""
        op = self.ops[min(self.peak_op, len(self.ops) - 1)]
        return f"{op.name}, {op.phase}"


def nbytes(x: Tensor) -> int:
    """Bytes of the elements that exist."""
    return Argument.of(x).nbytes


@contextlib.contextmanager
def record(
    model: nn.Module | None = None, *fixed: Tensor, multiprocessors: int = H100_MULTIPROCESSORS
) -> Iterator[Trace]:
    """Records what happens inside. The model's blocks (`model.layers`) name the layers.

    fixed: what is in memory already beside the model's parameters, such as gradients and the optimiser's state.
    """
    trace = Trace()
    recorder = _Recorder(trace)
    for x in (*(model.parameters() if model else ()), *fixed):
        recorder.follow(x)
    trace.fixed = trace.peak = trace.live
    hooks = [hook for i, block in enumerate(getattr(model, "layers", ())) for hook in recorder.hooks_of(block, i)]
    try:
        # Anomaly mode keeps the forward line of every node that autograd derives itself.
        keep_lines = torch.autograd.set_detect_anomaly(True, check_nan=False)
        with keep_lines, on_paper(recorder.on_launch, multiprocessors), recorder:
            yield trace
    finally:
        recorder.stop()
        for hook in hooks:
            hook.remove()


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace, self.layer = trace, None
        self.alive: dict[int, tuple[int, weakref.finalize]] = {}  # storage -> bytes, and what notices that it is freed

    # Memory

    def follow(self, x: Tensor, where: str = "") -> None:
        """Counts the memory of x, once, until it is freed."""
        storage = x.untyped_storage()
        key = storage._cdata
        if x.device.type != "meta" or key in self.alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        trace, freed = self.trace, weakref.finalize(storage, self.forget, key)
        self.alive[key] = size, freed
        trace.live += size
        if trace.live > trace.peak:
            trace.peak, trace.peak_op, trace.peak_where = trace.live, len(trace.ops), where

    def forget(self, key: int) -> None:
        self.trace.live -= self.alive.pop(key)[0]

    def stop(self) -> None:
        """Follows nothing any more: what is alive, such as the model, must not keep the trace."""
        for _, freed in self.alive.values():
            freed.detach()

    # Layers

    def hooks_of(self, block: nn.Module, layer: int) -> list:
        """Forward begins and ends a layer; backward comes to it when the gradient of its output is known."""

        def enter(*_) -> None:
            self.layer = layer

        def leave(block, args, output) -> None:
            self.layer = None
            for x in tree_leaves(output):
                if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
                    x.register_hook(enter)

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

    # Operations

    def on_launch(self, launch: Launch) -> None:
        phase, where = _place()
        largest = max(launch.tensors.values(), key=lambda x: x.nbytes)
        self.add(launch.name, phase, where, largest.shape, launch_bytes(launch), 0, launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            # In inference mode operations arrive before they are taken apart into those that run.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = _tensors((args, kwargs))
        name = func._schema.name.removeprefix("aten::")
        # A number on the host may be an operand.
        from_host = [x for x in inputs if not x.is_meta and x.dim()] if any(x.is_meta for x in inputs) else []
        if from_host and name not in _COPIES:
            shape = tuple(from_host[0].shape)
            raise PaperError(f"{_place()[1]}: {name} of a tensor on the GPU and one of shape {shape} on the host")
        try:
            if name == "_to_copy" and inputs[0].is_meta and _is_asynchronous_copy(kwargs):
                result = torch.zeros(inputs[0].shape, dtype=kwargs.get("dtype") or inputs[0].dtype)
            else:
                result = func(*args, **kwargs)
        except RuntimeError as error:  # NotImplementedError is one
            if not any(x.is_meta for x in inputs):
                raise
            raise PaperError(f"{_place()[1]}: {func} has to know a value, for which a GPU's host would wait") from error
        outputs = _tensors(result)
        if not any(x.is_meta for x in (*inputs, *outputs)):
            return result  # the host's own bookkeeping
        phase, where = _place()
        is_copy_from_host = name == _FROM_VALUES or (name in _COPIES and not inputs[-1].is_meta)
        for x in outputs:
            self.follow(x, where)
        written, overwritten = _written(func, args, kwargs)
        if name in _FREE or (not written and {*map(_storage, outputs)} <= {*map(_storage, inputs)}):
            return result  # a view, or memory without content: no kernel runs
        shape = tuple((written or outputs)[0].shape) if written or outputs else ()
        traffic = _traffic(name, inputs, written, overwritten, outputs)
        formula = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        self.add(name, phase, where, shape, traffic, flops, None, is_copy_from_host)
        return result

    def add(self, name, phase, where, shape, traffic, flops, launch=None, from_host=False) -> None:
        layer, live = self.layer, self.trace.live
        self.trace.ops.append(Op(name, phase, layer, where, shape, traffic, flops, live, launch, from_host))


def launch_bytes(launch: Launch) -> int:
    """Every tensor argument once, and what a kernel reads or updates in place as often as it does."""
    seen, total = set(), 0
    for name, x in launch.tensors.items():
        if (x.storage, x.shape, x.stride) not in seen:
            seen.add((x.storage, x.shape, x.stride))
            total += x.nbytes * _PASSES.get((launch.name, name), 1)
    return total


def _traffic(name: str, inputs: list, written: list, overwritten: list, outputs: list) -> int:
    """Bytes that one of torch's operations reads and writes."""
    results = sum(map(nbytes, written or outputs))
    if name in _GATHERS:  # of the first input only the rows that are asked for
        return 2 * results + sum(map(nbytes, inputs[1:]))
    if name in _SCATTERS:
        return 2 * nbytes(inputs[-1]) + sum(map(nbytes, inputs[1:-1]))
    # A tensor that is an argument twice is read once; one that is updated in place is read and written.
    reads = {(_storage(x), x.storage_offset(), x.shape, x.stride()): nbytes(x) for x in inputs}
    for x in overwritten:
        reads.pop((_storage(x), x.storage_offset(), x.shape, x.stride()), None)
    return sum(reads.values()) + results


def _is_asynchronous_copy(kwargs: dict) -> bool:
    """Whether a copy goes to the host and does not wait: the program reads it later."""
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu" and kwargs.get("non_blocking", False)


def _tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _written(func, args: tuple, kwargs: dict) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments that an operation writes to, and those of them whose old content it does not read."""
    written, overwritten = [], []
    names = [argument.name for argument in func._schema.arguments]
    values = dict(zip(names, args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            tensors = _tensors(values.get(argument.name))
            written += tensors
            if argument.is_out or func._schema.name in _OVERWRITE:
                overwritten += tensors
    return written, overwritten


def _place() -> tuple[str, str]:
    """(phase, "file:line") of what runs now."""
    node, where, derived, recomputed = torch._C._current_autograd_node(), None, False, False
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code is recompute._StageCall.run.__code__:
            recomputed = True
        if where is None and _is_ours(file):
            where = f"{file.removeprefix(str(ROOT) + '/')}:{frame.f_lineno}"
        elif where is None and file.endswith("torch/autograd/graph.py"):
            derived = True  # nothing of ours between autograd's engine and the operation
        frame = frame.f_back
    if derived and node is not None:
        where = _forward_line(node) or where
    where = where or "?"
    if where.startswith(_OPTIMIZER):
        return "optimizer", where
    return "recompute" if recomputed else "forward" if node is None else "backward", where


def _is_ours(file: str) -> bool:
    """Whether a line of this file may be where an operation comes from: the project's own, but not what records."""
    return file.startswith(str(ROOT)) and "site-packages" not in file and not file.startswith(_RECORDERS)


def _forward_line(node) -> str | None:
    """The line of ours that made this node of autograd's graph, as anomaly mode noted it."""
    for line in reversed(node.metadata.get("traceback_", ())):
        file, _, rest = line.strip().removeprefix('File "').partition('", line ')
        if _is_ours(file):
            return f"{file.removeprefix(str(ROOT) + '/')}:{rest.partition(',')[0]}"
    return None
