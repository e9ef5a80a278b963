"""The paper GPU: the meta device takes a GPU's place, so that whole steps run without memory, arithmetic or a GPU.

    with on_paper(launches.append):
        loss = batch_loss(model, batch, torch.device("meta"))

Inside, operations on meta tensors take their Triton path, and what they launch is recorded instead of run. Outside, a
meta tensor is what it always was. This is the only place that makes the difference: `is_gpu` and `multiprocessors`
answer for a real and for a paper GPU.

What a launch is compiled for (types, which pointers and integers are multiples of 16, constants) is asked of Triton's
own binder, so it is what a GPU would get: torch's allocations are aligned, and a meta view knows its offset.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.ops._triton import HAS_TRITON

H100_MULTIPROCESSORS = 132  # an H200 has as many

_paper_multiprocessors = 0  # of the paper GPU; 0 outside `on_paper`


@dataclass(frozen=True)
class Argument:
    """A tensor argument of a launch. `storage` names its memory, for as long as that exists."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    storage: int

    @classmethod
    def of(cls, x: Tensor) -> "Argument":
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device.type, x.untyped_storage()._cdata)

    @property
    def numel(self) -> int:
        """Elements that exist: an expanded dimension has one."""
        elements = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            elements *= size if stride or size == 0 else 1
        return elements

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Variant:
    """What Triton compiles once: a kernel for certain types, alignments and constants.

    kernel: "module:function". types: argument -> Triton's type, with ":16" where it is known to be a multiple of 16.
    constants: argument -> value; integers of value 1 and None are constants for Triton, too. options: warps, stages.
    """

    kernel: str
    types: dict[str, str]
    constants: dict[str, object]
    options: dict[str, object]

    def key(self) -> str:
        """Equal for equal variants, and sortable."""
        parts = (sorted(x.items()) for x in (self.types, self.constants, self.options))
        return repr((self.kernel, *parts))


@dataclass(frozen=True)
class Launch:
    """One launch: what is compiled, the grid, and the arguments. No tensor is kept, so memory can be followed."""

    variant: Variant
    grid: tuple[int, ...]
    tensors: dict[str, Argument] = field(repr=False)
    numbers: dict[str, int | float] = field(repr=False)

    @property
    def name(self) -> str:
        """"residual_rms_norm backward" of kernels.ops.residual_rms_norm:_backward_kernel."""
        module, _, function = self.variant.kernel.partition(":")
        return f"{module.rpartition('.')[2]} {function.strip('_').removesuffix('_kernel')}"


def is_gpu(device: torch.device) -> bool:
    """Whether this is a GPU, real or on paper."""
    return device.type == "cuda" or (device.type == "meta" and _paper_multiprocessors > 0)


@functools.cache
def _real_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of a GPU, real or on paper."""
    return _paper_multiprocessors if device.type == "meta" else _real_multiprocessors(device)


@contextlib.contextmanager
def on_paper(record: Callable[[Launch], None], multiprocessors: int = H100_MULTIPROCESSORS) -> Iterator[None]:
    """Meta stands for a GPU, and record(launch) takes the place of every launch of a Triton kernel.

    ValueError where Triton is not installed, and inside for a launch with a tensor that is not on the paper GPU.
    """
    global _paper_multiprocessors
    if not HAS_TRITON:
        raise ValueError("a step on paper needs Triton, whose launches it records: Linux and `pip install triton`")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel, *args, grid, warmup=False, **kwargs) -> None:
        record(_launch(kernel, grid, args, kwargs))

    # A process has either compiled or interpreted kernels (TRITON_INTERPRET); both kinds are launched through `run`.
    replaced = [(kind, kind.run) for kind in (JITFunction, InterpretedFunction)]
    before = _paper_multiprocessors
    try:
        _paper_multiprocessors = multiprocessors
        for kind, _ in replaced:
            kind.run = run
        yield
    finally:
        _paper_multiprocessors = before
        for kind, original in replaced:
            kind.run = original


def _launch(kernel, grid, args: tuple, kwargs: dict) -> Launch:
    bound, specialization, options = _binder(kernel)(*args, **kwargs)
    types, constants, tensors, numbers = {}, {}, {}, {}
    for (name, value), (kind, attribute) in zip(bound.items(), specialization, strict=True):
        if kind == "constexpr":
            constants[name] = value
            continue
        types[name] = kind + (":16" if attribute == "D" else "")
        value = getattr(value, "base", value) if kind.startswith("tensordesc") else value
        if isinstance(value, Tensor):
            tensors[name] = Argument.of(value)
            if value.device.type != "meta":
                raise ValueError(f"{kernel.fn.__qualname__}: {name} is on {value.device}, not on the GPU on paper")
        else:
            numbers[name] = value
    grid = tuple(grid(bound) if callable(grid) else grid)
    variant = Variant(f"{kernel.fn.__module__}:{kernel.fn.__qualname__}", types, constants, dict(options))
    return Launch(variant, grid, tensors, numbers)


@functools.cache
def _binder(kernel) -> Callable:
    """Triton's own function from a launch's arguments to what it specialises on, for an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):  # the interpreter's kernel keeps the options that it was declared with
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
