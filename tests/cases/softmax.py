"""Cases of softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu import reference

from ._arrays import COLS, hidden, non_finite
from ._case import Args, Case, Data, ErrorCase, Mutant, OpCases
from ._errors import (
    OUT_ERRORS,
    RANK_ERROR,
    X_ERRORS,
)


def _softmax_args(
    rows: int, cols: int, mask: Callable[[int, int], NDArray[Any]] | None = None, **options: Any
) -> Any:
    def make(data: Data, dtype: Any) -> Args:
        args: Args = {"x": hidden(data, rows, cols, dtype), **options}
        if mask is not None:
            args["mask"] = mask(rows, cols)
        return args

    return make


def _alibi(rows: int, cols: int) -> Any:
    """-slope * distance: (rows, cols) float32."""
    return -np.abs(np.arange(rows)[:, None] - np.arange(cols)[None, :]).astype(np.float32) / 8


def _keep(rows: int, cols: int) -> Any:
    """(rows, cols) bool: True for about two thirds, and nowhere in row 1."""
    i, j = np.ogrid[:rows, :cols]
    return ((3 * i + 5 * j) % 7 > 1) & (i != 1)


def _all_minus_inf(data: Data, dtype: Any) -> Args:
    x = hidden(data, 3, 65, dtype)
    x[1] = -np.inf
    return {"x": x}


CASES = OpCases(
    "softmax",
    output_like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.softmax(**args)},
    cases=(
        *(Case(f"3 x {cols}", _softmax_args(3, cols)) for cols in COLS),
        Case("1 x 384", _softmax_args(1, 384)),
        Case("65 x 1536", _softmax_args(65, 1536)),
        Case("3 x 5000", _softmax_args(3, 5000)),
        Case("scale", _softmax_args(3, 65, scale=0.125)),
        Case("scale negative", _softmax_args(3, 65, scale=-2.0)),
        Case("mask added", _softmax_args(3, 65, _alibi)),
        Case("mask bool", _softmax_args(3, 65, _keep)),
        Case("mask added, scale, 65 x 1536", _softmax_args(65, 1536, _alibi, scale=0.5), ("float32",)),
        Case("mask bool, 65 x 1536", _softmax_args(65, 1536, _keep), ("float32",)),
        Case("mask bool, 3 x 5000", _softmax_args(3, 5000, _keep), ("float32",)),
        Case("mask of one row", _softmax_args(3, 65, lambda r, c: _alibi(1, c)[0]), ("float32",)),
        Case("mask of one column", _softmax_args(3, 65, lambda rows, cols: _keep(rows, 1)), ("float32",)),
        Case("mask bool strided", _softmax_args(3, 65, lambda r, c: _keep(r, 2 * c)[:, ::2]), ("float32",)),
        Case("x 1-D", lambda data, dtype: {"x": hidden(data, 1, 65, dtype)[0]}),
        Case("x 3-D", lambda data, dtype: {"x": hidden(data, 6, 33, dtype).reshape(2, 3, 33)}),
        Case(
            "x 3-D, mask of one sequence",
            lambda data, dtype: {
                "x": hidden(data, 6, 33, dtype).reshape(2, 3, 33),
                "mask": np.ascontiguousarray(_keep(2, 33)[:, None]),
            },
            ("float32",),
        ),
        Case("no rows", lambda data, dtype: {"x": np.empty((0, 64), dtype)}),
        Case("NaN and Inf", lambda data, dtype: {"x": non_finite(4, 65, dtype)}),
        Case("row of -inf", _all_minus_inf),
    ),
    valid_args=_softmax_args(3, 64),
    errors=(
        *X_ERRORS,
        RANK_ERROR,
        ErrorCase("mask shape", {"mask": np.ones((2, 64), bool)}, ValueError, "mask has shape"),
        ErrorCase("mask float64", {"mask": np.ones((3, 64))}, TypeError, "mask has dtype"),
        ErrorCase("mask int32", {"mask": np.ones((3, 64), np.int32)}, TypeError, "mask has dtype"),
        *OUT_ERRORS,
    ),
    mutants=(
        Mutant(
            "the first barrier of a sum", "  __syncthreads();\n#pragma unroll", "#pragma unroll", "65 x 1536"
        ),
        Mutant(
            "a row of -inf", "float base = top == MINUS_INF ? 0.0f : top;", "float base = top;", "row of -inf"
        ),
    ),
)
