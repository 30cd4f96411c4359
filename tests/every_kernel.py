"""A pass over every kernel: cases of `tests/cases` and some more that together launch every entry of all sources.

    python -m tests.every_kernel [OP ...]     runs it on CuPy arrays, under compute-sanitizer

Arrays are allocated by cudaMalloc instead of CuPy's pool, so that compute-sanitizer detects accesses past their end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from rbe_gpu import dispatch, ops, registry
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.gpu import _execute, _source

from .cases import CASES, Args, Case
from .conftest import place
from .host.sanitized import Shapes

Call = tuple[str, Case, str]  # op, case, dtype


def misaligned(args: Args) -> Args:
    """Copies of the arrays, each one element past a multiple of 16 bytes."""
    return {name: _misaligned(a) if isinstance(a, np.ndarray) and a.size else a for name, a in args.items()}


def _misaligned(a: np.ndarray) -> np.ndarray:
    memory = np.empty(a.nbytes + 32, np.uint8)
    start = -memory.ctypes.data % 16 + a.itemsize
    copy = memory[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def _long(op: str, cols: int) -> Case:
    """Two rows of an op that works along rows, longer than in any case of the op."""

    def make(data: Any, dtype: Any) -> Args:
        args = CASES[op].valid_args(data, dtype)
        return {n: np.resize(a, (*a.shape[:-1][-1:], cols)[-a.ndim :])[:2] if a.ndim > 1 else np.resize(a, cols)
                for n, a in args.items()}  # fmt: skip

    return Case(f"{cols} columns", make)


def _wide_heads(op: str, head_dim: int) -> Case:
    """A head_dim that the cases leave out, over several tiles of queries and keys."""

    def make(data: Any, dtype: Any) -> Args:
        args = CASES[op].valid_args(data, dtype)
        return {n: np.resize(args[n], (1, 150, 2, head_dim)) for n in "qkv"}

    return Case(f"head_dim {head_dim}", make)


def _few_tokens(case: Case) -> Case:
    """The first 16 of the 65 tokens of a `linear` case: batch sizes between 1 and many, which the cases leave out."""

    def make(data: Any, dtype: Any) -> Args:
        args = case.make(data, dtype)
        return {n: a[:16].copy() if n in ("x", "residual") else a for n, a in args.items()}

    return Case(f"{case.name}, first 16 rows", make, case.dtypes)


def _many_tokens(case: Case) -> Case:
    """The tokens of a `linear` case repeated to so many that tall tiles of results fill a GPU."""

    def make(data: Any, dtype: Any) -> Args:
        args = case.make(data, dtype)
        return {
            n: np.resize(a, (1 << 14, a.shape[1])) if n in ("x", "residual") else a for n, a in args.items()
        }

    return Case(f"{case.name} times 252", make, ("float16",))


def cases(name: str) -> Iterator[Case]:
    """The cases of an op and sizes that they leave out, and all of them misaligned."""
    selected = list(CASES[name].cases)
    if name in ("layer_norm", "rms_norm", "softmax", "l2_normalize"):
        selected += [_long(name, cols) for cols in (16384, 16392, 40_000, 70_000)]
    if name == "attention":
        selected.append(_wide_heads(name, 96))
    if name == "linear":
        many = [case for case in selected if case.name.endswith("rows 65")]
        selected += [_few_tokens(case) for case in many]
        selected += [_many_tokens(case) for case in many if case.name.startswith("matrix 200x1536 none")]
    yield from selected
    for case in selected:
        yield Case(
            f"{case.name}, misaligned",
            lambda data, dtype, make=case.make: misaligned(make(data, dtype)),
            case.dtypes,
        )


def call(name: str, args: Args) -> None:
    with np.errstate(all="ignore"):
        getattr(ops, name)(**args)


def launched(name: str, case: Case, dtype: str, data: Any) -> set[str]:
    """Names of the kernels that a case launches, without running them."""
    entries: set[str] = set()
    launchers = dispatch.Backend("host", "rbe_gpu.gpu")
    args = case.make(data, registry.DTYPES[dtype])  # compressed with the CPU's kernels
    with (
        mock.patch.object(dispatch, "CPU", launchers),
        _execute.executor(lambda launches: entries.update(launch.entry for launch in launches)),
    ):
        call(name, args)
    return entries


def calls(name: str) -> Iterator[Call]:
    """A subset of the cases that launches every kernel with every form of arguments, largest cases first.

    Large cases make kernels iterate their loops and process partial tiles.
    """
    data = Shapes()
    candidates = []
    for case in cases(name):
        for dtype in case.dtypes:
            args = case.make(data, registry.DTYPES[dtype])
            forms = {(kernel, _form(args)) for kernel in launched(name, case, dtype, data)}
            candidates.append((_size(args), forms, (name, case, dtype)))
    seen: set[Any] = set()
    for _, forms, selected in sorted(candidates, key=lambda candidate: -candidate[0]):
        if forms - seen:
            seen |= forms
            yield selected


def _form(args: Args) -> Any:
    """Which arguments are passed, and the storage of compressed weights among them."""
    form: list[Any] = []
    for name, value in sorted(args.items()):
        if isinstance(value, RBEBlocks):
            index = getattr(value.codes, "index_kind", None)
            basis = value.basis is not None
            form.append((name, value.kind, value.block, value.transform, value.codes.kind, index, basis))
        else:
            form.append((name,))
    return tuple(form)


def _size(args: Args) -> int:
    """Number of elements of all arrays, counting compressed weights as decoded."""
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
            call(name, place(cupy, args))
            cupy.cuda.Device().synchronize()
            count += 1
        print(f"every_kernel: {op}: {count} calls", flush=True)
    print(f"every_kernel: {len(entries)} kernels", flush=True)


if __name__ == "__main__":
    main()
