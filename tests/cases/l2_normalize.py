"""Cases of l2_normalize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rbe_gpu import reference

from ._arrays import COLS, extreme_rows, hidden, non_finite
from ._case import Args, Case, Data, ErrorCase, Mutant, OpCases
from ._errors import OUT_ERRORS, RANK_ERROR, X_ERRORS


def _args(rows: int | tuple[int, ...], cols: int, **options: Any) -> Callable[[Data, Any], Args]:
    lead = (rows,) if isinstance(rows, int) else rows

    def make(data: Data, dtype: Any) -> Args:
        return {"x": hidden(data, int(np.prod(lead)), cols, dtype).reshape(*lead, cols), **options}

    return make


def _extreme(cols: int, eps: float) -> Callable[[Data, Any], Args]:
    return lambda data, dtype: {"x": extreme_rows(data, cols, dtype), "eps": eps}


CASES = OpCases(
    "l2_normalize",
    output_like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.l2_normalize(**args)},
    cases=(
        *(Case(f"3 x {cols}", _args(3, cols)) for cols in COLS),
        Case("1 x 384", _args(1, 384)),
        Case("65 x 1536", _args(65, 1536)),
        Case("3 x 5000", _args(3, 5000)),
        Case("eps larger than every norm", _args(3, 384, eps=1e3)),
        Case("eps 0", _args(3, 65, eps=0.0)),
        Case("x 1-D", _args((), 65)),
        Case("x 3-D", _args((2, 3), 33)),
        Case("no rows", _args(0, 64)),
        Case("NaN and Inf", lambda data, dtype: {"x": non_finite(4, 65, dtype)}),
        Case("row of zeros", lambda data, dtype: {"x": np.zeros((2, 33), dtype)}),
        Case(
            "rows of zeros, eps 0",
            lambda data, dtype: {"x": np.zeros((2, 33), dtype), "eps": 0.0},
        ),
        *(
            Case(f"rows of any size, {cols}, eps {eps:g}", _extreme(cols, eps))
            for cols, eps in ((33, 0.0), (384, 0.0), (384, 1e-12), (1500, 1e-50), (9000, 0.0))
        ),
        Case("row of zeros, tiny eps", lambda data, dtype: {"x": np.zeros((2, 33), dtype), "eps": 1e-50}),
    ),
    valid_args=_args(3, 64),
    errors=(
        *X_ERRORS,
        RANK_ERROR,
        ErrorCase("eps negative", {"eps": -1e-5}, ValueError, "eps"),
        ErrorCase("eps NaN", {"eps": float("nan")}, ValueError, "eps"),
        *OUT_ERRORS,
    ),
    mutants=(
        Mutant("the sum", "sum += x[k][i] * x[k][i];", "sum = x[k][i] * x[k][i];", "3 x 384", "float16"),
        Mutant(
            "range",
            "return !in_range(mean_square) && !(",
            "return false && !(",
            "rows of any size, 384, eps 0",
        ),
        Mutant("eps", "return norm < eps ? eps : norm;", "return norm;", "eps larger than every norm"),
        Mutant(
            "the last column",
            "int end = row < rows ? static_cast<int>(cols) : 0;",
            "int end = row < rows ? static_cast<int>(cols) - 1 : 0;",
            "3 x 65",
        ),
    ),
)
