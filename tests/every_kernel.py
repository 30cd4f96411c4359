"""A pass over every kernel: cases of `tests/cases` and some more that together launch every entry of all sources.

    python -m tests.every_kernel [OP ...]     runs it on CuPy arrays; for compute-sanitizer

Each array has memory of its own from cudaMalloc, and not from CuPy's pool, so that a byte beyond an array is found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from rbe_gpu import dispatch, ops, registry
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.gpu import _launch, _source

from .cases import CASES, Args, Case
from .conftest import place
from .host.sanitized import Shapes

Call = tuple[str, Case, str]  # op, case, dtype


def shifted(args: Args) -> Args:
    """The same with every array one element behind a multiple of 16 bytes."""
    return {name: _off(a) if isinstance(a, np.ndarray) and a.size else a for name, a in args.items()}


def _off(a: np.ndarray) -> np.ndarray:
    memory = np.empty(a.nbytes + 32, np.uint8)
    start = -memory.ctypes.data % 16 + a.itemsize
    moved = memory[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    moved[...] = a
    return moved


def _long(op: str, cols: int) -> Case:
    """Two rows of an op that works along rows, longer than any of the table."""

    def make(data: Any, dtype: Any) -> Args:
        args = CASES[op].valid_args(data, dtype)
        return {n: np.resize(a, (*a.shape[:-1][-1:], cols)[-a.ndim :])[:2] if a.ndim > 1 else np.resize(a, cols)
                for n, a in args.items()}  # fmt: skip

    return Case(f"{cols} columns", make)


def _wide_heads(op: str, head_dim: int) -> Case:
    """A head_dim that the table leaves out, over several tiles of queries and keys."""

    def make(data: Any, dtype: Any) -> Args:
        args = CASES[op].valid_args(data, dtype)
        return {n: np.resize(args[n], (1, 150, 2, head_dim)) for n in "qkv"}

    return Case(f"head_dim {head_dim}", make)


def _few_tokens(case: Case) -> Case:
    """A case of `linear` with 16 of its 65 tokens: between one and many, which the table leaves out."""

    def make(data: Any, dtype: Any) -> Args:
        args = case.make(data, dtype)
        return {n: a[:16].copy() if n in ("x", "residual") else a for n, a in args.items()}

    return Case(f"{case.name}, 16 of them", make, case.dtypes)


def cases(name: str) -> Iterator[Case]:
    """Those of the table, and sizes that it leaves out; then all of them off alignment."""
    selected = list(CASES[name].cases)
    if name in ("layer_norm", "rms_norm", "softmax", "l2_normalize"):
        selected += [_long(name, cols) for cols in (16384, 16392, 40_000, 70_000)]
    if name == "attention":
        selected.append(_wide_heads(name, 96))
    if name == "linear":
        selected += [_few_tokens(case) for case in selected if case.name.endswith("rows 65")]
    yield from selected
    for case in selected:
        yield Case(
            f"{case.name}, shifted",
            lambda data, dtype, make=case.make: shifted(make(data, dtype)),
            case.dtypes,
        )


def called(name: str, args: Args) -> None:
    with np.errstate(all="ignore"):
        getattr(ops, name)(**args)


def launched(name: str, case: Case, dtype: str, data: Any) -> set[str]:
    """The kernels that a case asks for; nothing is run."""
    found: set[str] = set()
    launchers = dispatch.Backend("host", "rbe_gpu.gpu")
    with (
        mock.patch.object(dispatch, "CPU", launchers),
        _launch.executor(lambda launches: found.update(launch.entry for launch in launches)),
    ):
        called(name, case.make(data, registry.DTYPES[dtype]))
    return found


def calls(name: str) -> Iterator[Call]:
    """From the largest case down, those that launch a kernel on arguments of a form that none before them had.

    The largest, so that kernels go round their loops, and over tiles that are not whole.
    """
    data = Shapes()
    found = []
    for case in cases(name):
        for dtype in case.dtypes:
            args = case.make(data, registry.DTYPES[dtype])
            forms = {(kernel, _form(args)) for kernel in launched(name, case, dtype, data)}
            found.append((_size(args), forms, (name, case, dtype)))
    seen: set[Any] = set()
    for _, forms, call in sorted(found, key=lambda one: -one[0]):
        if forms - seen:
            seen |= forms
            yield call


def _form(args: Args) -> Any:
    """Which arguments are given, and how a compressed weight among them is stored."""
    found = []
    for name, value in sorted(args.items()):
        if isinstance(value, RBEBlocks):
            index = getattr(value.codes, "index_kind", None)
            basis = value.basis is not None
            found.append((name, value.kind, value.block, value.transform, value.codes.kind, index, basis))
        else:
            found.append((name,))
    return tuple(found)


def _size(args: Args) -> int:
    """Elements of all arrays, those of compressed weights decoded."""
    return sum(int(np.prod(a.shape)) for a in args.values() if hasattr(a, "shape"))


def main() -> None:
    import cupy

    cupy.cuda.set_allocator(None)
    data = Shapes()
    entries: set[str] = set()
    names = sys.argv[1:] or list(registry.OPS)
    for op in names:
        count = 0
        for name, case, dtype in calls(op) if _source.has(op) else ():
            args = case.make(data, registry.DTYPES[dtype])
            entries |= launched(name, case, dtype, data)
            called(name, place(cupy, args))
            cupy.cuda.Device().synchronize()
            count += 1
        print(f"every_kernel: {op}: {count} calls", flush=True)
    print(f"every_kernel: {len(entries)} kernels", flush=True)


if __name__ == "__main__":
    main()
