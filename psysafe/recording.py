"""A function's tensor operations, recorded once and then called without the Python around them: `captured` as a CUDA
graph on a GPU, `recorded` as flat calls on a CPU.

For a small model on a CPU the modules, checks and views of a decode step take as long as its arithmetic. `recorded`
runs the step once, notes every call into torch, and lets torch.fx write them down as one flat function. What a CUDA
graph is to launches on a GPU, this is to Python.

As in a CUDA graph, shapes are fixed and no value may decide what is called; only the bounds of a slice may be a tensor.
Tensors from outside are the same memory in each call: what the function reads and writes there is its input and its
output. Parameters never change, so what depends on them alone (1 + w), or on no tensor at all, is computed once; random
numbers must come from elsewhere.
"""

import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# A value that leaves the tensors could decide something that the recording would not see.
LEAVING = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")


@torch.inference_mode()
def recorded(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`function` as flat calls. It is run for real, once. RuntimeError where it looks at a value."""
    recorder = Recorder()
    with recorder:
        result = function()
    recorder.graph.output(recorder.named(result))
    module = fx.GraphModule(nn.Module(), recorder.graph)
    return partial(module.forward, *recorder.outside)


@torch.inference_mode()
def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as one CUDA graph, which a launch of a few microseconds replays. Its result lies in the same memory each
    time. The step must be harmless when no slot is live: it is run for real before it is recorded, for whatever sets
    itself up at first use."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = step()

    def replay() -> Tensor:
        graph.replay()
        return report

    return replay


class Recorder(TorchFunctionMode):
    """Writes down the calls made inside it; `outside` are the tensors that they read or write, in the order of the
    graph's placeholders."""

    def __init__(self):
        self.graph = fx.Graph()
        self.outside: list[Tensor] = []
        self.last_outside: fx.Node | None = None  # placeholders stand first
        self.nodes: dict[int, fx.Node] = {}  # by id of the tensor
        self.computed: set[int] = set()  # ids of the recorded calls' results
        self.constant: set[int] = set()  # ids of what parameters alone decide
        self.memory: set[int] = set()  # the storages that recorded calls made
        self.alive: list[object] = []  # so that no id is given twice

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in LEAVING:
            raise RuntimeError(f"a step to be recorded looks at a value: Tensor.{func.__name__}")
        with Writes() as writes:
            result = func(*args, **kwargs)
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if not outputs and result is not None:  # a shape, a dtype
            return result
        self.alive += [*inputs, *outputs]
        if changed := [x for x in inputs if storages([x]) & writes.memory]:  # x += y, x[i] = y, out=x
            assert not any(map(self.fixed, changed)), f"{func.__name__} would change a constant"
            assert all(any(x is y for y in inputs) for x in outputs), f"{func.__name__} writes and makes something new"
            self.note(func, args, kwargs)
        elif all(any(x is y for y in inputs) for x in outputs):  # x.to(x.dtype)
            pass
        elif all(self.fixed(x) for x in inputs):  # also without any: torch.arange(3)
            if writes.random:
                raise RuntimeError(f"a step to be recorded draws random numbers: {func.__name__}")
            self.constant |= set(map(id, outputs))
        elif len(inputs) == 1 and id(inputs[0]) not in self.computed and views(outputs, inputs):
            pass  # the same memory in each call; a second tensor may be the bound of a slice
        else:
            self.memory |= storages(outputs) - storages(inputs)
            self.name(result, self.note(func, args, kwargs))
        return result

    def fixed(self, x: Tensor) -> bool:
        return isinstance(x, nn.Parameter) or id(x) in self.constant

    def note(self, func: Callable, args: tuple, kwargs: dict) -> fx.Node:
        args, kwargs = map_aggregate(args, self.named), map_aggregate(kwargs, self.named)
        if func.__name__ == "__get__":
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        if getattr(Tensor, func.__name__, None) is func:  # x.mul(y): found on x, faster than torch.Tensor.mul
            return self.graph.call_method(func.__name__, args, kwargs)
        return self.graph.call_function(func, args, kwargs)

    def name(self, result: Tensor | tuple | list, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self.nodes[id(result)] = node
            self.computed.add(id(result))
        else:
            for i, x in enumerate(result):
                self.name(x, self.graph.call_function(operator.getitem, (node, i)))

    def named(self, x: object) -> object:
        """The node of a tensor; anything else as it is."""
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self.nodes:
            if x.untyped_storage()._cdata in self.memory:
                raise RuntimeError("a step to be recorded uses a tensor that came from no recorded call")
            with self.graph.inserting_after(self.last_outside):
                self.last_outside = self.nodes[id(x)] = self.graph.placeholder(f"outside_{len(self.outside)}")
            self.outside.append(x)
        return self.nodes[id(x)]


def tensors(tree: object) -> list[Tensor]:
    found = []
    map_aggregate(tree, lambda x: found.append(x) if isinstance(x, Tensor) else None)
    return found


class Writes(TorchDispatchMode):
    """The storages that the calls inside it write to, and whether they may draw random numbers, as aten itself tells:
    names like `~x` (__invert__) and `relu(x, inplace=True)` mislead."""

    def __init__(self):
        super().__init__()
        self.memory: set[int] = set()
        self.random = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.memory |= storages(tensors(args[i] if i < len(args) else kwargs.get(argument.name)))
        return func(*args, **kwargs)


def views(outputs: list[Tensor], inputs: list[Tensor]) -> bool:
    """Whether the outputs lie in the inputs' memory."""
    return storages(outputs) <= storages(inputs)


def storages(xs: list[Tensor]) -> set[int]:
    """By the storage objects: those of the meta device have no address."""
    return {x.untyped_storage()._cdata for x in xs}
