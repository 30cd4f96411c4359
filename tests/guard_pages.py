"""Every CPU kernel with each array at the end of a page that nothing may be read behind.

    python -m tests.guard_pages [OP ...]

Every case of the ops, and grid codes for linear and embedding, with every input array (those of compressed weights
too) placed so that its last byte is the last of a page and the next page is inaccessible: a kernel that reads or
writes one byte too far ends the process with SIGSEGV, and Python's fault handler prints where. Results are written to
`out=` in memory of the same kind; the bytes in front of it, and of each input, are checked afterwards. Prints the
number of calls and arrays.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from rbe_gpu.cpu_fallback import bit_planes, isa

from rbe_gpu import Workspace, ops, registry
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.codecs.grid import GridPlanes

from . import real
from .cases import CASES
from .compressed import FORMS, compressed, few_integers, with_integers

_LIBC = ctypes.CDLL(None, use_errno=True)
_CANARY, _MARGIN = 0xA5, 64


class Pages:
    """Arrays that end where an inaccessible page begins."""

    def __init__(self) -> None:
        self._kept: list[tuple[mmap.mmap, int, int]] = []
        self.arrays = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """An array of zeros, aligned as its dtype asks."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        size = -(-(nbytes + _MARGIN) // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if _LIBC.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        start = size - nbytes
        whole = np.frombuffer(memory, np.uint8, size)
        whole[:start] = _CANARY
        self._kept.append((memory, start, size))
        self.arrays += 1
        return whole[start:].view(dtype).reshape(shape)

    def copy(self, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A C-contiguous copy; arrays of other strides and without elements stay where they are."""
        if not a.flags.c_contiguous or not a.size:
            return a
        guarded = self.empty(a.shape, a.dtype)
        guarded[...] = a
        return guarded

    def check(self) -> None:
        """Raise an AssertionError if something was written in front of an array."""
        for memory, start, size in self._kept:
            before = np.frombuffer(memory, np.uint8, size)[:start]
            assert (before == _CANARY).all(), (
                f"bytes {np.flatnonzero(before != _CANARY) - start} were written"
            )


def guarded(value: Any, copy: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Any:
    """An argument with every array of it copied."""
    if isinstance(value, RBEBlocks):
        basis = None if value.basis is None else copy(value.basis)
        return replace(value, basis=basis, codes=value.codes.map_arrays(copy))
    return copy(value) if isinstance(value, np.ndarray) else value


def with_int8_activations(call: dict[str, Any], out: Any, pages: Pages) -> int:
    """The same call with int8 activations, for weights that take them; returns the number of calls."""
    try:
        ops.linear(**call, out=out, activation_bits=8)
    except NotImplementedError:
        return 0
    pages.check()
    return 1


def grid_calls(name: str) -> Iterator[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """Grid codes of every form, which no case has: form, arguments and the shape of the result."""
    for form in FORMS:
        if form.startswith("grid") and name in ("linear", "embedding"):
            m = compressed(form)
            if name == "embedding":
                ids = np.array([m.rows - 1, 0, 7])
                for weight in {id(w): w for w in (m, m.for_lookup())}.values():
                    yield form, {"ids": ids, "weight": weight}, (3, m.cols)
                continue
            for tokens in (1, 5, 70):
                x = np.resize(real.activations(tokens), (tokens, m.cols))
                yield f"{form}, {tokens} tokens", {"x": x, "weight": m}, (tokens, m.rows)
    if name == "linear" and bit_planes.moves_bits(isa.active(), isa.host()):
        for shape, density, most in (((70, 96), 0.9, 2), ((65, 384), 0.2, 9), ((130, 1536), 0.3, 3)):
            m = with_integers(few_integers(shape, density, -most, most)).for_int8()
            assert type(m.codes) is GridPlanes
            for tokens in (1, 5, 70):
                x = np.resize(real.activations(tokens), (tokens, m.cols))
                yield f"planes, {shape}, {tokens} tokens", {"x": x, "weight": m}, (tokens, m.rows)


def main(names: list[str]) -> None:
    faulthandler.enable()
    calls = arrays = 0
    for name in names or list(registry.OPS):
        op, cases = registry.OPS[name], CASES[name]
        for case in cases.cases:
            for dtype in case.dtypes:
                print(f"{name} {case.name} {dtype}", file=sys.stderr, flush=True)
                pages = Pages()
                args = case.make(real, registry.DTYPES[dtype])
                shape, out_dtype = cases.output_like(args, registry.DTYPES[dtype])
                want = getattr(ops, name)(**args)
                call = {key: guarded(value, pages.copy) for key, value in args.items() if key != "dtype"}
                out = pages.empty(tuple(shape), out_dtype)
                if op.workspace:
                    call["workspace"] = Workspace()
                getattr(ops, name)(**call, out=out)
                pages.check()
                first = want[0] if isinstance(want, tuple) else want
                assert first.tobytes() == out.tobytes(), "other bits at the end of a page"
                calls, arrays = calls + 1, arrays + pages.arrays
                if name == "linear" and "activation_bits" not in call:
                    calls += with_int8_activations(call, out, pages)
        for form, args, result in grid_calls(name):
            print(f"{name} {form}", file=sys.stderr, flush=True)
            pages = Pages()
            call = {key: guarded(value, pages.copy) for key, value in args.items()}
            out = pages.empty(result, np.float32)
            getattr(ops, name)(**call, out=out)
            pages.check()
            assert getattr(ops, name)(**args).tobytes() == out.tobytes(), "other bits at the end of a page"
            calls, arrays = calls + 1, arrays + pages.arrays
            if name == "linear":
                calls += with_int8_activations(call, out, pages)
    print(f"{calls} calls, {arrays} arrays")


if __name__ == "__main__":
    main(sys.argv[1:])
