"""Recomputation: stages of a block whose tensors are dropped after forward and computed once more in backward.

    recompute(block, {"conv", "gate_up"})      # from the next forward pass on
    recompute(block, ())                       # saves everything again

It is applied from outside. A stage is a method of one of the block's modules (`_stage_methods`). A wrapper takes the
method's place on the instance, so the decoder knows nothing of it. The memory plan chooses the stages.

Of a recomputed stage nothing stays in memory for backward: neither the tensors that autograd saves inside it, nor its
outputs where later operations save them. A small handle stands for each of them. The first handle that backward reads
runs the stage once more, with the same inputs and kernels and so to the same bits. The last one frees the results. An
input that is itself the output of a recomputed stage is a handle, too, so chains of stages resolve by themselves.

Why not torch.utils.checkpoint? It drops everything between two points of the forward pass and computes all of it again.
Here the widest tensors of a stretch are dropped and the most expensive ones saved: attention's output, for example, but
not its q, k and v.

Why not selective activation checkpointing (create_selective_checkpoint_contexts in torch.utils.checkpoint)? It makes
such a choice, but by operator, as the dispatcher sees them. Our fused operations are autograd functions that launch
kernels: each would first have to be registered as a torch.library operator.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kernels import LoRATerm
from psysafe.model.decoder import Block

STAGES = ("conv", "rope", "delta_rule", "in_proj", "gate_up")


def recompute(block: Block, stages: Collection[str]) -> None:
    """From the next forward pass on, backward recomputes these stages of the block and saves all others.

    stages: names out of STAGES. Those of the other kind of mixer change nothing.
    """
    assert set(stages) <= set(STAGES), stages
    if isinstance(block.forward, _RecomputedForward):
        block.forward.remove()
    if stages:
        _RecomputedForward(block, frozenset(stages))


def recomputed_stages(block: Block) -> frozenset[str]:
    """What `recompute` was last called with."""
    return getattr(block.forward, "stages", frozenset())


def _stage_methods(block: Block) -> dict[str, tuple[nn.Module, str]]:
    """Stage -> the module and the name of its method that computes it."""
    if block.is_attention:
        mixer = {"in_proj": (block.self_attn.in_proj, "forward"), "rope": (block.self_attn, "rope")}
    else:
        methods = {"in_proj": "project", "conv": "conv", "delta_rule": "delta_rule"}
        mixer = {stage: (block.linear_attn, name) for stage, name in methods.items()}
    return mixer | {"gate_up": (block.mlp.in_proj, "forward")}


class _RecomputedForward:
    """Takes the place of a block's `forward`: runs it with hooks that drop what the chosen stages leave behind."""

    def __init__(self, block: Block, stages: frozenset[str]):
        self.stages = stages
        self.replaced: list[tuple[nn.Module, str]] = []
        self.calls: dict[int, tuple[_StageCall, int]] = {}  # storage of an output -> the call and the output's number
        # An output that was freed within the block could leave its address to a tensor that must be saved.
        self.outputs: list[Tensor] = []
        self.block_forward = block.forward
        self.replace(block, "forward", self)
        self.replace(block, "add_and_norm", functools.partial(self.run_norm, block.add_and_norm))
        for stage, (module, name) in _stage_methods(block).items():
            if stage in stages:
                self.replace(module, name, functools.partial(self.run_stage, getattr(module, name)))

    def replace(self, module: nn.Module, name: str, wrapper: Callable) -> None:
        assert name not in vars(module), f"{name} is replaced already"
        setattr(module, name, wrapper)
        self.replaced.append((module, name))

    def remove(self) -> None:
        """Without an attribute of its own an instance has the method of its class again."""
        for module, name in self.replaced:
            delattr(module, name)

    def __call__(self, *args, **kwargs):
        try:
            with saved_tensors_hooks(self.pack, _unpack):
                return self.block_forward(*args, **kwargs)
        finally:
            self.calls.clear()
            self.outputs.clear()

    def run_stage(self, stage: Callable, *args):
        """stage(*args), its tensors dropped. All that depends on a gradient has to be an argument; weights need not."""
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(args))):
            return stage(*args)
        call = self.drop(stage, args)
        with saved_tensors_hooks(call.pack_inside, _unpack):
            outputs = stage(*args)
        self.register(call, outputs)
        return outputs

    def run_norm(self, add_and_norm: Callable, h: Tensor, pending, weight: Tensor, lora_A: Tensor | None):
        """The norm is run as always. Its x, which no operation saves, is recomputed from h' where a dropped stage needs
        its input."""
        h, x, u = add_and_norm(h, pending, weight, lora_A)
        if x.requires_grad:
            self.register(self.drop(lambda h: add_and_norm(h, None, weight, None)[1], (h,)), x)
        return h, x, u

    def pack(self, x: Tensor) -> "Tensor | _Handle":
        """What autograd saves in place of x: a handle where x lies in the output of a dropped call, else x itself."""
        call, i = self.calls.get(_storage(x), (None, 0))
        if call is None:
            return self.save(x)
        # A view of an output lies at the same place of the recomputed one.
        size, stride, offset = x.shape, x.stride(), x.storage_offset()
        return call.handle(lambda results: results.outputs[i].as_strided(size, stride, offset))

    @staticmethod
    def save(x: Tensor) -> Tensor:
        """Every tensor that is not dropped passes here (what the tests count)."""
        return x

    def drop(self, stage: Callable, args: tuple) -> "_StageCall":
        return _StageCall(stage, _map(Tensor, lambda x: _Input(self.pack(x.detach()), x.requires_grad), args))

    def register(self, call: "_StageCall", outputs: Tensor | tuple) -> None:
        for i, x in enumerate(_tuple(outputs)):
            if x is not None and x.numel():
                self.calls.setdefault(_storage(x), (call, i))
                self.outputs.append(x)


@dataclass(frozen=True)
class _Input:
    """A tensor argument of a dropped call."""

    x: "Tensor | _Handle"
    requires_grad: bool


class _Results(NamedTuple):
    """Of a recomputed call: its outputs, and what autograd saved inside it, in order."""

    outputs: list[Tensor | None]
    saved: list[Tensor]


class _Handle(NamedTuple):
    """Stands for a dropped tensor: the call that computes it, and which of the results it is."""

    call: "_StageCall"
    pick: Callable[[_Results], Tensor]


@dataclass(eq=False)
class _StageCall:
    """A dropped call of a stage: how to run it again, and its results for as long as backward still needs some."""

    stage: Callable
    args: tuple
    n_inside: int = 0  # tensors that autograd saved inside the call
    n_handles: int = 0
    n_read: int = 0  # handles read since the results were computed
    results: _Results | None = field(default=None, repr=False)

    def handle(self, pick: Callable[[_Results], Tensor]) -> _Handle:
        self.n_handles += 1
        return _Handle(self, pick)

    def pack_inside(self, x: Tensor) -> _Handle:
        i, self.n_inside = self.n_inside, self.n_inside + 1
        return self.handle(lambda results: results.saved[i])

    def read(self, pick: Callable[[_Results], Tensor]) -> Tensor:
        if self.results is None:
            self.results = self.run()
        x = pick(self.results)
        self.n_read += 1
        if self.n_read == self.n_handles:  # a graph that is walked a second time computes them anew
            self.results, self.n_read = None, 0
        return x

    def run(self) -> _Results:
        saved: list[Tensor] = []
        args = _map(_Input, lambda i: _unpack(i.x).detach().requires_grad_(i.requires_grad), self.args)
        # With gradients enabled, because only then do the operations inside save what their backward needs.
        with torch.enable_grad(), saved_tensors_hooks(lambda x: saved.append(x.detach()), _unpack):
            outputs = _tuple(self.stage(*args))
        return _Results([None if x is None else x.detach() for x in outputs], saved)


def _unpack(x: "Tensor | _Handle") -> Tensor:
    return x.call.read(x.pick) if isinstance(x, _Handle) else x


def _map(kind: type, fn: Callable, args: tuple) -> tuple:
    """args with fn applied to those of a kind, also inside an adapter term."""

    def apply(x):
        if isinstance(x, LoRATerm):
            return x._replace(u=fn(x.u), B=fn(x.B))
        return fn(x) if isinstance(x, kind) else x

    return tuple(map(apply, args))


def _tensors(args: tuple) -> list[Tensor]:
    tensors: list[Tensor] = []
    _map(Tensor, tensors.append, args)
    return tensors


def _tuple(outputs: Tensor | tuple) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # address of the storage object, which tensors without memory (meta) have, too
