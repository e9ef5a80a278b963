"""Saved tensors that backward makes again instead of keeping. Which ones is the memory plan's choice (memory.py).

    with Remake({"conv", "gate_up"}) as remake:          # one block's forward pass
        y = remake("gate_up", self.in_proj, x)           # in_proj(x)

Where the name was chosen, nothing that the call leaves for backward outlives the block: neither what autograd saves
inside it nor its outputs where later operations save them. Each is replaced by a ticket. The first ticket that backward
presents makes the call again, with the same inputs and kernels and so the same bits; the last one frees the results.
An input that was dropped itself is a ticket, too, so chains of calls resolve by themselves.

`torch.utils.checkpoint` drops a whole stretch of the forward pass. This drops a stretch's widest tensors and keeps the
dearest: attention's q, k and v, say, but not its output.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

STAGES = ("conv", "rope", "delta_rule", "in_proj", "gate_up")


class Remake:
    """One block's forward pass. `dropped` names the calls to make again; without names nothing happens here."""

    def __init__(self, dropped: Collection[str] = ()):
        assert set(dropped) <= set(STAGES), dropped
        self.dropped = dropped
        self.hooks = saved_tensors_hooks(self.pack, _redeem)
        self.sources: dict[int, tuple[_Source, int]] = {}  # by the address of an output's storage
        # An output that was freed within the block could leave its address to a tensor that must be kept.
        self.alive: list[Tensor] = []

    def __enter__(self) -> "Remake":
        if self.dropped:
            self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self.dropped:
            self.hooks.__exit__(*error)
        self.sources.clear()
        self.alive.clear()

    def __call__(self, name: str, fn: Callable, *args: Tensor | None):
        """fn(*args), a tensor or a tuple. Whatever else fn reads (parameters, u) has to outlive the forward pass."""
        assert name in STAGES, name
        needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args)
        if name not in self.dropped or not needs_grad:
            return fn(*args)
        source = self._source(fn, args)
        with saved_tensors_hooks(source.inner_ticket, _redeem):
            outputs = fn(*args)
        self._register(source, outputs)
        return outputs

    def derive(self, x: Tensor, fn: Callable, *args: Tensor) -> None:
        """Tells that x, which no operation saves, equals fn(*args): what dropped calls on x need to be made again."""
        if self.dropped and x.requires_grad:
            self._register(self._source(fn, args), x)

    def pack(self, x: Tensor) -> "Tensor | _Ticket":
        """What stands for x until backward: a ticket where x lies in the output of a dropped call, else x itself."""
        source, i = self.sources.get(_address(x), (None, 0))
        if source is None:
            return self.keep(x)
        # A view of an output lies at the same place of the new one.
        size, stride, offset = x.shape, x.stride(), x.storage_offset()
        return source.ticket(lambda made: made.outputs[i].as_strided(size, stride, offset))

    @staticmethod
    def keep(x: Tensor) -> Tensor:
        """Every tensor that is not dropped passes here (what the tests count)."""
        return x

    def _source(self, fn: Callable, args: tuple) -> "_Source":
        needs_grad = [x is not None and x.requires_grad for x in args]
        return _Source(fn, [None if x is None else self.pack(x.detach()) for x in args], needs_grad)

    def _register(self, source: "_Source", outputs: Tensor | tuple) -> None:
        for i, x in enumerate(_tuple(outputs)):
            if x is not None and x.numel():
                self.sources.setdefault(_address(x), (source, i))
                self.alive.append(x)


class _Made(NamedTuple):
    """The results of a call made again: its outputs, and what autograd saved inside it, in order."""

    outputs: list[Tensor | None]
    saved: list[Tensor]


class _Ticket(NamedTuple):
    source: "_Source"
    find: Callable[[_Made], Tensor]


@dataclass(eq=False)
class _Source:
    """A dropped call: how to make it again, and its results for as long as backward still asks for some."""

    fn: Callable
    args: "list[Tensor | _Ticket | None]"
    needs_grad: list[bool]
    inside: int = 0
    issued: int = 0
    redeemed: int = 0
    made: _Made | None = field(default=None, repr=False)

    def ticket(self, find: Callable[[_Made], Tensor]) -> _Ticket:
        self.issued += 1
        return _Ticket(self, find)

    def inner_ticket(self, x: Tensor) -> _Ticket:
        i, self.inside = self.inside, self.inside + 1
        return self.ticket(lambda made: made.saved[i])

    def redeem(self, find: Callable[[_Made], Tensor]) -> Tensor:
        if self.made is None:
            self.made = self._make()
        x = find(self.made)
        self.redeemed += 1
        if self.redeemed == self.issued:
            self.made, self.redeemed = None, 0
        return x

    def _make(self) -> _Made:
        saved: list[Tensor] = []
        args = [
            None if x is None else _redeem(x).detach().requires_grad_(needs)
            for x, needs in zip(self.args, self.needs_grad, strict=True)
        ]
        # With gradients enabled, because only then do the operations inside save what their backward needs.
        with torch.enable_grad(), saved_tensors_hooks(lambda x: saved.append(x.detach()), _redeem):
            outputs = _tuple(self.fn(*args))
        return _Made([None if x is None else x.detach() for x in outputs], saved)


def _redeem(x: "Tensor | _Ticket") -> Tensor:
    return x.source.redeem(x.find) if isinstance(x, _Ticket) else x


def _tuple(outputs: Tensor | tuple) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # of the storage object, which tensors without memory (meta) have, too
