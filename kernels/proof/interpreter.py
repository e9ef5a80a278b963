"""Triton's interpreter as the hardware is: bf16 and tf32 rounded, undefined lanes poisoned, every address watched.

    with strict_interpreter():                  # TRITON_INTERPRET=1, set before Triton is imported
        y = swiglu_triton(...)                  # AssertionError after a launch that accessed memory wrongly
    with strict_interpreter(backwards=True):
        assert torch.equal(y, swiglu_triton(...))   # the order of the programs must not show

What it changes, for the time of the `with`:

- bf16. Triton's own interpreter stores a bf16 number as its 16 bits, cuts where hardware rounds to nearest even, and
  multiplies, adds and compares the bits as integers. Here they are numbers: dots take 16-bit operands, other
  arithmetic computes in fp32 and rounds. So the 16-bit tile sizes, those that train, run on a CPU.
- Dots sum in fp64 and round once. NumPy's fp32 sums depend on the processor and on the tile's shape: where logits are
  large, attention's backward would recompute slightly other ones than its forward, on one machine and not on another.
- tf32. Tensor cores read 19 bits of an fp32 operand; so does a dot with input_precision "tf32".
- Undefined lanes. A masked load of a tile without `other` leaves its masked lanes undefined on a GPU: here NaN, or the
  largest integer, instead of zero.
- Addresses. Each access must lie inside the storage of the argument that its pointer comes from; what lies outside is
  reported, and not accessed.
- Races. Programs of one launch run at the same time on a GPU. So no two of them may write one address, and none may
  read what another one writes, before or after.
- Order. With backwards=True the last program of the grid runs first.

Not modelled: approximate exp2, rsqrt and division, the order of sums inside a dot, races between threads of one
program. Written against Triton 3.7.1, whose interpreter it patches.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from kernels.ops._triton import tl

# A pointer carries the number of its argument in the 16 bits that an address of a process leaves free. So a pointer
# that has run from one argument into the next one is seen.
ADDRESS_BITS = 48
ADDRESS = np.uint64((1 << ADDRESS_BITS) - 1)
SEVERAL = -1  # in place of a program's number: more than one


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The numbers whose bf16 bits (uint16) these are."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """The bf16 bits (uint16) of fp32 numbers, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(np.shape(x))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    # Adding could turn a NaN into infinity or zero.
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def fp32_to_tf32(x: np.ndarray) -> np.ndarray:
    """What a tensor core reads of fp32 numbers: sign, 8 bits of exponent, 10 of mantissa; the rest is cut off."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).reshape(np.shape(x))


def _is_bf16(x: TensorHandle) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _numbers(x: TensorHandle) -> np.ndarray:
    return bf16_to_fp32(x.data) if _is_bf16(x) else x.data


def _bf16(x: np.ndarray) -> TensorHandle:
    return TensorHandle(fp32_to_bf16(x), tl.bfloat16)


def _poison(element: tl.dtype, shape: tuple[int, ...]) -> TensorHandle:
    dtype = interpreter._get_np_dtype(element)
    if element == tl.bfloat16:
        value = 0x7FC0
    elif element.is_floating():
        value = np.nan
    else:
        value = True if dtype.kind == "b" else np.iinfo(dtype).max
    return TensorHandle(np.full(shape, value, dtype), element)


@dataclass
class _Storage:
    """The memory of one or several arguments, and which program (1, 2, ...; 0: none) wrote and read each element."""

    start: int
    n_bytes: int
    element_size: int  # of the smallest elements that lie in it

    def __post_init__(self):
        self.written_by = self.read_by = None

    def watch(self) -> None:
        if self.written_by is None:
            # np.zeros takes memory page by page, when it is touched.
            self.written_by, self.read_by = (np.zeros(self.n_bytes // self.element_size, np.int32) for _ in range(2))


@dataclass
class _Launch:
    """One launch of a kernel: its pointer arguments, the program that runs now, what went wrong."""

    kernel: str = ""
    names: dict[int, str] = field(default_factory=dict)  # address -> parameter
    arguments: list[tuple[str, _Storage]] = field(default_factory=list)
    storages: dict[int, _Storage] = field(default_factory=dict)
    patched: set[str] = field(default_factory=set)  # modules whose view of triton.language is NumPy's
    program: int = 0
    faults: dict[tuple[str, str], str] = field(default_factory=dict)  # the first of each kind and argument

    def add(self, x: torch.Tensor) -> np.uint64:
        """A new argument; returns its number as the upper bits of a pointer."""
        memory = x.untyped_storage()
        storage = self.storages.setdefault(
            memory.data_ptr(), _Storage(memory.data_ptr(), memory.nbytes(), x.element_size())
        )
        storage.element_size = min(storage.element_size, x.element_size())
        self.arguments.append((self.names.get(x.data_ptr(), "an argument"), storage))
        return np.uint64(len(self.arguments) - 1 << ADDRESS_BITS)

    def fault(self, kind: str, name: str, message: str) -> None:
        self.faults.setdefault((kind, name), f"{self.kernel}: program {self.program} {message}")

    def access(self, pointers: TensorHandle, mask: TensorHandle, writes: bool) -> tuple[TensorHandle, TensorHandle]:
        """Checks an access; returns its plain addresses and the lanes that are safe to access."""
        lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        live = pointers.data[lanes]
        if live.size:
            # One access, one argument: where lanes differ, the others are reported as outside.
            number = min(int(live[0] >> ADDRESS_BITS), len(self.arguments) - 1)
            name, storage = self.arguments[number]
            # Unsigned differences wrap around: before the start they are negative as int64.
            offset = (live - np.uint64(number << ADDRESS_BITS) - np.uint64(storage.start)).view(np.int64)
            size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
            inside = (offset >= 0) & (offset <= storage.n_bytes - size)
            verb = "writes" if writes else "reads"
            if not inside.all():
                outside = offset[~inside]
                where = f"byte {outside[0]} of {storage.n_bytes}"
                self.fault(verb, name, f"{verb} {len(outside)} elements outside {name}, the first at {where}")
                lanes[lanes] = inside
                offset = offset[inside]
            self._race(name, storage, offset // storage.element_size, writes)
        return TensorHandle(pointers.data & ADDRESS, pointers.dtype), TensorHandle(lanes, tl.int1)

    def _race(self, name: str, storage: _Storage, elements: np.ndarray, writes: bool) -> None:
        storage.watch()
        writer, reader = storage.written_by[elements], storage.read_by[elements]
        by_another = (writer != 0) & (writer != self.program)
        if by_another.any():
            verb, writer = "writes" if writes else "reads", writer[by_another][0]
            self.fault(f"race, {verb}", name, f"{verb} an element of {name} that program {writer} writes")
        if not writes:
            storage.read_by[elements] = np.where((reader == 0) | (reader == self.program), self.program, SEVERAL)
            return
        if ((reader != 0) & (reader != self.program)).any():
            self.fault("race, writes", name, f"writes an element of {name} that another program reads")
        storage.written_by[elements] = self.program


class _Builder(interpreter.InterpreterBuilder):
    """What executes a kernel's operations, with the differences that the file's docstring lists."""

    def __init__(self, backwards: bool):
        super().__init__()
        self.backwards, self.launch = backwards, _Launch()

    def set_grid_idx(self, *index: int):
        if self.backwards:
            index = (n - 1 - i for n, i in zip(self.grid_dim, index, strict=True))
        super().set_grid_idx(*index)
        self.launch.program += 1

    # Numbers

    def get_bf16(self, value: float):
        return _bf16(np.array([value], np.float32))

    def cast_impl(self, src, dst_type):
        target = dst_type.scalar
        if _is_bf16(src) == (target == tl.bfloat16):
            return super().cast_impl(src, dst_type)
        if target == tl.bfloat16:
            return _bf16(src.data.astype(np.float32))
        return TensorHandle(_numbers(src).astype(interpreter._get_np_dtype(target)), target)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs):
            return super().binary_op(lhs, rhs, op)
        result = op(_numbers(lhs), _numbers(rhs))
        return TensorHandle(result, tl.bfloat16) if result.dtype == bool else _bf16(result)

    def unary_op(self, arg, op):
        return _bf16(op(_numbers(arg))) if _is_bf16(arg) else super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        return _bf16(_numbers(x) * _numbers(y) + _numbers(z)) if _is_bf16(z) else super().create_fma(x, y, z)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        tf32 = input_precision == interpreter._ir.INPUT_PRECISION.TF32

        def operand(x: TensorHandle) -> TensorHandle:
            if _is_bf16(x):
                return TensorHandle(_numbers(x), tl.float32)
            return TensorHandle(fp32_to_tf32(x.data), tl.float32) if tf32 and x.dtype.scalar == tl.float32 else x

        x, y = (operand(z).data.astype(np.float64) for z in (a, b))
        return TensorHandle((x @ y + d.data).astype(d.data.dtype), d.dtype.scalar)

    # Memory: tensor descriptors and plain pointers both end in these two

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        # Of a single element, Triton passes on `other=0` as None.
        if other is None and ptrs.data.size > 1:
            other = _poison(ptrs.get_element_ty(), ptrs.data.shape)
        addresses, lanes = self.launch.access(ptrs, mask, writes=False)
        return super().create_masked_load(addresses, lanes, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        addresses, lanes = self.launch.access(ptrs, mask, writes=True)
        return super().create_masked_store(addresses, value, lanes, cache_modifier, eviction_policy)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        raise NotImplementedError("an atomic operation makes the order of programs show; no kernel here uses one")

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        raise NotImplementedError("an atomic operation makes the order of programs show; no kernel here uses one")


def _no_bf16(self, inputs) -> None:
    """In the place of a check that reductions and scans make of their inputs: they would add the bits as integers."""
    if any(x.dtype == tl.bfloat16 for x in inputs):
        raise NotImplementedError("a reduction of bf16 numbers: convert them to fp32 first")


_stock_argument = interpreter._implicit_cvt


def _argument(arg):
    """A launch's argument as the kernel sees it; a pointer carries its number."""
    x = _stock_argument(arg)
    if hasattr(arg, "data_ptr"):
        x.handle.data = x.handle.data | interpreter.interpreter_builder.launch.add(arg)
    return x


class _Grid(interpreter.GridExecutor):
    def __call__(self, *args, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name: getattr(x, "base", x) for name, x in named.items()}  # the base of a tensor descriptor
        names = {x.data_ptr(): name for name, x in tensors.items() if hasattr(x, "data_ptr")}
        launch = interpreter.interpreter_builder.launch = _Launch(self.fn.__name__, names)
        with np.errstate(all="ignore"):  # overflow and NaN are the kernel's business, as on a GPU
            super().__call__(*args, **kwargs)
        assert not launch.faults, "; ".join(launch.faults.values())


def _call_helper(self, *args, **kwargs):
    """A call of one jit function by another one."""
    # Triton's own patches its language anew at every call, in a fifth of all time; once a launch and module is enough.
    patched, module = interpreter.interpreter_builder.launch.patched, self.fn.__module__
    if module not in patched:
        patched.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


@contextlib.contextmanager
def strict_interpreter(backwards: bool = False) -> Iterator[None]:
    """Kernels launched within run as described above. AssertionError, after the launch, for a wrong access: it names
    the kernel, the program, the argument and the element.
    """
    builder = _Builder(backwards)
    with (
        mock.patch.multiple(
            interpreter, interpreter_builder=builder, interpreter_semantic=TritonSemantic(builder),
            GridExecutor=_Grid, _implicit_cvt=_argument,
        ),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", _call_helper),
        mock.patch.object(interpreter.ReduceScanOpInterface, "check_tensor", _no_bf16),
    ):  # fmt: skip
        yield
