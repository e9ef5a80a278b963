"""A function's tensor operations, recorded once and then repeated without the Python around them: `captured` as a CUDA
graph on a GPU, `recorded` as a list of calls on a CPU.

For a small model on a CPU the modules, checks, views and allocations of a decode step take as long as its arithmetic.
`recorded` runs the step once and notes every operation of aten that computes or writes something. Repeated, each puts
its result where it lay the first time, so that views of it are valid already.

As in a CUDA graph, shapes are fixed and no value may decide what is called. Tensors from outside are the same memory in
each call: what the function reads and writes there is its input and its output. Parameters never change, so what
depends on them alone (1 + w), or on no tensor at all, is computed once; random numbers must come from elsewhere.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Call = tuple[Callable, tuple, dict]  # function, args, kwargs

aten = torch.ops.aten
# Where Python finds aten's operations with an `out`; torch.ops.aten has all of them, but takes a microsecond more.
HOMES = (torch, torch._C._nn, torch._C._linalg)
# Bytes of a weight that is read ahead: a larger one has left the cache again before its product begins.
READ_AHEAD_LEAST, READ_AHEAD_MOST = 1 << 15, 1 << 22


def recorded(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`function`, run as it is the first time and from then on as a list of calls, which put the result in the same
    memory each time.

    The first time raises RuntimeError where it looks at a value, draws random numbers or writes to a parameter.
    """
    repeat: Callable[[], Tensor] | None = None

    def run() -> Tensor:
        nonlocal repeat
        if repeat is not None:
            return repeat()
        result, repeat = record(function)
        return result

    return run


@torch.inference_mode(False)  # in which linear and reshape would come as one call each, without an `out`
@torch.no_grad()
def record(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], Tensor]]:
    """What the function returns, and the same as a list of calls."""
    with NoNumbers(), Recorder() as recorder:
        first = function()
    calls, result = packed(read_ahead(recorder.calls, recorder.constant), first, recorder.made)

    @torch.inference_mode()
    def repeat() -> Tensor:
        for call in calls:
            call()
        return result

    return first, repeat


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


class Recorder(TorchDispatchMode):
    """Collects `calls`. Tensors are told apart by their memory: `constant` is what parameters alone decide."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self.constant: set[int] = set()
        self.made: set[int] = set()  # what recorded calls made
        self.alive: list[object] = []  # so that no memory is given twice

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, a second, to keep it from compiling what is never compiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if not (inputs or outputs):
            return result
        refuse(func, inputs)
        self.alive.append((inputs, outputs))
        self.constant |= memory([x for x in inputs if isinstance(x, nn.Parameter)])
        if changed := memory(written(func, args, kwargs)):
            if changed & self.constant:
                raise RuntimeError(f"a step to be recorded changes a constant: {func}")
            if not memory(outputs) <= memory(inputs):
                raise RuntimeError(f"a step to be recorded both writes and makes something new: {func}")
            self.calls.append(again(func, args, kwargs))
        elif memory(outputs) <= memory(inputs):  # a view
            pass
        elif memory(inputs) <= self.constant:  # also without any: torch.arange(3)
            self.constant |= memory(outputs)
        else:
            self.made |= memory(outputs) - memory(inputs)
            self.calls.append(in_place(func, args, kwargs, result))
        return result


class NoNumbers(TorchFunctionMode):
    """Refuses the usual ways out of a tensor that pass no operation of aten."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("tolist", "numpy", "__array__"):
            raise RuntimeError(f"a step to be recorded looks at a value: Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def refuse(func, inputs: list[Tensor]) -> None:
    """RuntimeError for operations whose repetition could differ in more than the numbers in its tensors."""
    tags = func.tags
    if torch.Tag.nondeterministic_seeded in tags:
        raise RuntimeError(f"a step to be recorded draws random numbers: {func}")
    # x[y] has a shape of y's values only where y is a mask.
    by_value = func is not aten.index.Tensor or any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:])
    if torch.Tag.data_dependent_output in tags or (torch.Tag.dynamic_output_shape in tags and by_value):
        raise RuntimeError(f"a step to be recorded looks at a value: {func}")


def written(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a call writes to, as aten itself tells: `relu(x, inplace=True)`, out=, x[i] = y."""
    arguments = zip(func._schema.arguments, args, strict=False)
    named = [(a, kwargs.get(a.name)) for a in func._schema.arguments if a.name in kwargs]
    return tensors([x for a, x in (*arguments, *named) if a.alias_info is not None and a.alias_info.is_write])


def again(func, args: tuple, kwargs: dict) -> Call:
    """A call that writes to its arguments, as it was."""
    name = func._schema.name.removeprefix("aten::")
    # x.copy_(y) is a microsecond faster; x.index_put_ takes no None among its indices.
    if name.endswith("_") and hasattr(Tensor, name) and name != "index_put_":
        func = getattr(Tensor, name)
    return func, args, kwargs


def in_place(func, args: tuple, kwargs: dict, result: Tensor | Sequence[Tensor]) -> Call:
    """A call whose result goes where it lies now."""
    if func in (aten.clone.default, aten._to_copy.default):
        return Tensor.copy_, (result, args[0]), {}
    name = func._schema.name.removeprefix("aten::")
    for call in (getattr(home, name) for home in HOMES if hasattr(home, name)):
        try:
            call(*args, **kwargs, out=result)
            return call, args, {**kwargs, "out": result}
        except TypeError:  # it has no `out`
            pass
    return copied, (func, args, kwargs, tensors(result)), {}


def copied(function: Callable, args: tuple, kwargs: dict, results: list[Tensor]) -> None:
    """Calls and copies what comes out into `results`."""
    for old, new in zip(results, tensors(function(*args, **kwargs)), strict=True):
        old.copy_(new)


def read_ahead(calls: list[Call], constant: set[int]) -> list[Call]:
    """Before each product with a weight, a pass over that weight in the order in which it lies.

    A few rows are multiplied as fast as their weight arrives. MKL asks for it block by block, which no prefetcher
    foresees; the sum streams it. On a machine whose last cache serves others, too, a step takes 0.9 of the time.
    """
    found = []
    for call in calls:
        function, args, _ = call
        if function is torch.mm and memory([args[1]]) <= constant:
            weight = args[1].detach()
            dense = weight.is_contiguous() or weight.T.is_contiguous()
            if dense and READ_AHEAD_LEAST <= weight.nbytes <= READ_AHEAD_MOST:
                in_order = weight.as_strided((weight.numel(),), (1,))
                found.append((torch.sum, (in_order, 0), {"out": weight.new_empty(())}))
        found.append(call)
    return found


def packed(calls: list[Call], result: Tensor, made: set[int]) -> tuple[list[Callable[[], object]], Tensor]:
    """The calls and the result, moved to memory that is given to the next as soon as the last has read it: what stays
    small stays in the cache."""
    used = [memory(tensors(call)) & made for call in calls]
    last = {storage: i for i, storages in enumerate(used) for storage in storages}
    last.update(dict.fromkeys(memory([result]), len(calls)))
    free: dict[int, list[Tensor]] = {}
    place: dict[int, Tensor] = {}

    def moved(x: Tensor) -> Tensor:
        (storage,), size = memory([x]), x.untyped_storage().nbytes()
        if storage not in made:
            return x
        if storage not in place:
            same = free.get(size)
            place[storage] = same.pop() if same else torch.empty(size, dtype=torch.uint8)
        return x.new_empty(0).set_(place[storage].untyped_storage(), x.storage_offset(), x.shape, x.stride())

    ready = []
    for i, (call, storages) in enumerate(zip(calls, used, strict=True)):
        function, args, kwargs = replaced(call, moved)
        ready.append(partial(function, *args, **kwargs))
        for storage in storages:
            if last[storage] == i:
                free.setdefault(place[storage].numel(), []).append(place[storage])
    return ready, moved(result)


def tensors(tree: object) -> list[Tensor]:
    """Those in a call, its arguments or its result."""
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [x for branch in branches for x in tensors(branch)]


def replaced(tree: object, new: Callable[[Tensor], Tensor]) -> object:
    """The same with other tensors."""
    if isinstance(tree, Tensor):
        return new(tree)
    if isinstance(tree, dict):
        return {key: replaced(branch, new) for key, branch in tree.items()}
    return type(tree)(replaced(branch, new) for branch in tree) if isinstance(tree, (tuple, list)) else tree


def memory(xs: Sequence[Tensor]) -> set[int]:
    """By the storage objects: those of the meta device have no address."""
    return {x.untyped_storage()._cdata for x in xs}
