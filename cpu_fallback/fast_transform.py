"""x -> S x or S^T x for blocks of features times tokens: every transform as straight-line code.

`transforms.factors` gives a transform as sparse matrices. Here their rows become instructions on vectors of
16 tokens, once per transform, block size and direction: a DCT of 64 values is 632 additions and
multiplications in a row, with no positions to look up. Each is a function of its own, compiled when it is
first needed and kept on disk; kernels call it by its address (`apply_transform`).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rbe_gpu import transforms

from ._disk_cache import named_for_the_cache
from ._jit import FASTMATH
from ._numba_internals import cgutils
from .simd import LANES

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_LONG = ir.IntType(64)
_POINTER = types.CPointer(types.float32)
_SIGNATURE = types.void(_POINTER, types.int64, _POINTER, types.int64, types.int64)
_FUNCTION = ir.FunctionType(ir.VoidType(), [_FLOAT.as_pointer(), _LONG, _FLOAT.as_pointer(), _LONG, _LONG])


def _row(builder: ir.IRBuilder, row: Any, values: dict[int, ir.Value]) -> ir.Value:
    """sum_k row[k] values[k]; coefficients of 1 and -1 cost no multiplication."""
    where = np.nonzero(row)[0]
    # a coefficient of 1 or -1 first: the sum can begin with it
    order = sorted(where, key=lambda k: (abs(abs(row[k]) - 1) > 1e-12, row[k] < 0))
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
    )
    total: ir.Value | None = None
    for k in order:
        c, v = float(row[k]), values[int(k)]
        one = abs(abs(c) - 1) <= 1e-12
        factor = ir.Constant(_VECTOR, [float(np.float32(c))] * LANES)
        if total is None:
            if one and c > 0:
                total = v
            else:
                total = builder.fneg(v, flags=("nsz",)) if one else builder.fmul(v, factor, flags=("nsz",))
        elif one:
            combine = builder.fadd if c > 0 else builder.fsub
            total = combine(total, v, flags=("nsz",))
        else:
            total = builder.call(fma, [v, factor, total])
    assert total is not None
    return total


def _emitter(transform: str, block: int, inward: bool) -> Any:
    """Intrinsic (source, source_row, target, target_row, vectors): the whole transform of 16 * vectors
    tokens."""
    factors = transforms.factors(transform, block)
    matrices = [f.T for f in factors] if inward else list(reversed(factors))
    order = list(range(block))
    if (
        transform == "dct" and inward
    ):  # even results before odd ones, and so on: then half of it at a time is live
        order.sort(key=lambda r: f"{r:08b}"[::-1])

    @intrinsic
    def emit(typingctx, source, source_row, target, target_row, vectors):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            source, source_row, target, target_row, vectors = args

            def vector_at(base, row, step, start):  # type: ignore[no-untyped-def]
                offset = builder.add(builder.mul(step, step.type(row)), start)
                return builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer())

            with cgutils.for_range(builder, vectors) as loop:
                start = builder.mul(loop.index, _LONG(LANES))
                known: dict[tuple[int, int], ir.Value] = {}

                def value(level: int, r: int) -> ir.Value:
                    """Value r after `level` factors, computed when it is first asked for."""
                    if level == 0:  # never kept in a register for later: the cache holds it
                        return builder.load(vector_at(source, r, source_row, start), align=4)
                    if (level, r) not in known:
                        row = matrices[level - 1][r]
                        below = {int(k): value(level - 1, int(k)) for k in np.nonzero(row)[0]}
                        known[level, r] = _row(builder, row, below)
                    return known[level, r]

                last = len(matrices)
                if not inward:  # one half after the other, before they meet in the last factor
                    for r in range(block):
                        value(last - 1, r)
                for r in order:
                    builder.store(value(last, r), vector_at(target, r, target_row, start), align=4)
            return context.get_dummy_value()

        return types.void(source, source_row, target, target_row, vectors), codegen

    return emit


def _template(source, source_row, target, target_row, vectors):  # type: ignore[no-untyped-def]
    _emit(source, source_row, target, target_row, vectors)  # noqa: F821 (given to each copy by `_compiled`)


@lru_cache(maxsize=1)
def _factors_digest() -> str:
    """Of the file that the transforms' factors come from, which the disk cache does not know."""
    return hashlib.sha256(Path(transforms.__file__).read_bytes()).hexdigest()[:12]


@lru_cache(maxsize=64)
def _compiled(transform: str, block: int, inward: bool) -> Any:
    """The C function of one transform; a copy of `_template`, so that each has its own name in Numba's
    cache."""
    name = f"{transform.replace('-', '_').replace('.', '_')}_{block}_{'in' if inward else 'out'}"
    copy = FunctionType(_template.__code__, {**globals(), "_emit": _emitter(transform, block, inward)}, name)
    copy.__qualname__ = name
    with named_for_the_cache(copy, f".{_factors_digest()}"):
        return numba.cfunc(_SIGNATURE, cache=True, fastmath=set(FASTMATH), error_model="numpy")(copy)


def transform_address(transform: str, block: int, inward: bool) -> int:
    """Address of the function that takes blocks of `block` features through S^T (inward) or S; 0 for
    "none"."""
    return 0 if transform == "none" else int(_compiled(transform, block, inward).address)


@intrinsic
def apply_transform(
    typingctx, address, source, source_at, source_row, target, target_at, target_row, vectors
):  # type: ignore[no-untyped-def]
    """apply_transform(address, source, source_at, source_row, target, target_at, target_row, vectors): a
    block of features, row by row of 16 * vectors tokens, from source to target, which do not overlap."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address, source, source_at, source_row, target, target_at, target_row, vectors = args
        data = [
            builder.gep(context.make_array(signature.args[i])(context, builder, a).data, [at])
            for i, a, at in ((1, source, source_at), (4, target, target_at))
        ]
        function = builder.inttoptr(address, _FUNCTION.as_pointer())
        builder.call(function, [data[0], source_row, data[1], target_row, vectors])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, source, i, i, target, i, i, i), codegen
