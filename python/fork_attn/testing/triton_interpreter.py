"""Triton's interpreter (3.6) made exact, bounds-checked, and free in its order of programs.

Import with TRITON_INTERPRET=1 set, before any kernel runs; `install` patches the interpreter.

* As it comes, the interpreter multiplies bf16 as integers, truncates where it should round, and
  rounds to fp8 wrongly. Casts here are torch's (fp8 saturates, as the hardware's instruction does),
  products of 16- and 8-bit tiles are fp32, and other arithmetic on bf16 or fp8 raises.
* Products are BLAS's, which may round a row as its neighbours make it; not within
  `row_independent_products`.
* Any active lane outside the tensors of a launch raises IndexError.
* Assertions of kernels hold, as in a kernel that is compiled for debugging.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_AS_INTEGERS = (tl.bfloat16, tl.float8e4nv, tl.float8e5)  # how the interpreter keeps them
_RAW = {1: torch.uint8, 2: torch.int16}

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
_memory: list[tuple[np.uint64, np.uint64]] = []  # of the launch's tensors
_order: list[Callable[[int], Sequence[int]] | None] = [None]
_row_independent = [False]


def _tensor(data: np.ndarray, dtype: Any) -> torch.Tensor:
    data = np.ascontiguousarray(data)
    if dtype in (tl.float16, tl.float32, tl.float64):
        return torch.from_numpy(data)
    return torch.from_numpy(data.view(np.int16 if data.itemsize == 2 else np.uint8)).view(
        _TORCH[dtype]
    )


def _cast(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
    x = _tensor(data.reshape(-1), source)
    if target in _LARGEST:
        x = x.float()
        x = torch.where(x.isnan(), x, x.clamp(-_LARGEST[target], _LARGEST[target]))
    y = x.to(_TORCH[target])
    if target in _AS_INTEGERS:
        raw = y.view(_RAW[y.element_size()]).numpy()
        return raw.view(interpreter._get_np_dtype(target)).reshape(data.shape)
    return y.numpy().reshape(data.shape)


def _exact_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any, *rest: Any) -> Any:
        s, t = source.dtype.scalar, target.scalar
        if s in _TORCH and t in _TORCH and (s in _AS_INTEGERS or t in _AS_INTEGERS):
            return _Handle(_cast(source.data, s, t), t)
        return original(self, source, target, *rest)

    return cast


def _product_by_rows(a: Any, b: Any, d: Any) -> np.ndarray:
    left, right = (_tensor(x.data, x.dtype.scalar).float().numpy() for x in (a, b))
    total = d.data.astype(np.float32)
    for k in range(left.shape[1]):  # elementwise: rows cannot know of each other
        total += left[:, k, None] * right[k]
    return total.astype(d.data.dtype)


def _exact_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if _row_independent[0]:
            return _Handle(_product_by_rows(a, b, d), d.dtype.scalar)
        low = (*_AS_INTEGERS, tl.float16)
        if a.dtype.scalar not in low and b.dtype.scalar not in low:
            return original(self, a, b, d, *rest)
        if a.dtype.scalar != b.dtype.scalar:
            raise TypeError(f"dot: {a.dtype} and {b.dtype}")
        left, right = (_tensor(x.data, x.dtype.scalar).float().numpy() for x in (a, b))
        return _Handle(np.matmul(left, right).astype(d.data.dtype) + d.data, d.dtype.scalar)

    return dot


def _no_low_precision(original: Callable[..., Any]) -> Callable[..., Any]:
    def operate(self: Any, *arguments: Any) -> Any:
        for x in arguments:
            if isinstance(x, _Handle) and x.dtype.scalar in _AS_INTEGERS:
                raise TypeError(f"arithmetic on {x.dtype} would be on integers: cast to fp32 first")
        return original(self, *arguments)

    return operate


def _check(pointers: Any, mask: Any, kind: str) -> None:
    size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    active = np.asarray(mask.data if isinstance(mask, _Handle) else mask).astype(bool)
    at = np.asarray(pointers.data)
    at = at.astype(np.uint64)[np.broadcast_to(active, at.shape)]
    inside = np.zeros(at.shape, bool)
    for low, high in _memory:
        inside |= (at >= low) & (at + size <= high)
    if not inside.all():
        raise IndexError(f"{kind}: {int((~inside).sum())} of {at.size} lanes out of bounds")


def _checked(original: Callable[..., Any], kind: str, mask_at: int) -> Callable[..., Any]:
    def access(self: Any, *arguments: Any, **options: Any) -> Any:
        pointers = arguments[1] if kind == "atomic" else arguments[0]
        _check(pointers, arguments[mask_at], kind)
        return original(self, *arguments, **options)

    return access


def _remember_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        _memory.clear()
        for x in [*arguments, *options.values()]:
            tensor = getattr(x, "base", x)  # of a TensorDescriptor
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                begin = storage.data_ptr()
                _memory.append((np.uint64(begin), np.uint64(begin + storage.nbytes())))
        return original(self, *arguments, **options)

    return call


def _reordered(original: Callable[..., Any]) -> Callable[..., Any]:
    programs: list[int] = []

    def set_index(self: Any, x: int, y: int, z: int) -> None:
        choose = _order[0]
        if choose is None:
            return original(self, x, y, z)
        if x == 0:
            programs[:] = choose(self.grid_dim[0])
        return original(self, programs[x], y, z)

    return set_index


@contextmanager
def program_order(choose: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """Within it, the programs of a launch of n run in the order `choose(n)`, a permutation."""
    _order[0] = choose
    try:
        yield
    finally:
        _order[0] = None


@contextmanager
def row_independent_products() -> Iterator[None]:
    """Within it a row of a product has the same bits wherever it stands and whatever others are, as
    tensor cores' rows have: each element is one sum over k, from the accumulator on."""
    _row_independent[0] = True
    try:
        yield
    finally:
        _row_independent[0] = False


_installed: list[bool] = []


def install() -> None:
    """Patches the interpreter, once.

    Raises:
        RuntimeError: TRITON_INTERPRET is not 1: kernels imported now would not be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET: expected 1 before Triton is imported")
    if _installed:
        return
    _installed.append(True)
    cast = _exact_cast(_Builder.cast_impl)
    for name in (
        "cast_impl", "create_fp_to_fp", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si",
        "create_fp_to_ui", "create_fp_ext", "create_fp_trunc",
    ):  # fmt: skip
        setattr(_Builder, name, cast)
    _Builder.create_dot = _exact_dot(_Builder.create_dot)
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_maximumf",
                 "create_minimumf", "create_maxnumf", "create_minnumf"):  # fmt: skip
        if hasattr(_Builder, name):
            setattr(_Builder, name, _no_low_precision(getattr(_Builder, name)))
    _Builder.create_masked_load = _checked(_Builder.create_masked_load, "load", 1)
    _Builder.create_masked_store = _checked(_Builder.create_masked_store, "store", 2)
    _Builder.create_atomic_rmw = _checked(_Builder.create_atomic_rmw, "atomic", 3)
    _Builder.set_grid_idx = _reordered(_Builder.set_grid_idx)
    builder = interpreter.interpreter_builder
    # Sums of arms that are not selected may wrap.
    builder.options = replace(builder.options, debug=True, sanitize_overflow=False)
    interpreter.GridExecutor.__call__ = _remember_memory(interpreter.GridExecutor.__call__)
