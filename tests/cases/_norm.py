"""Cases that layer_norm and rms_norm share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import COLS, bias_values, extreme_rows, gain, hidden, non_finite
from ._case import Args, Case, Data, ErrorCase
from ._errors import (
    OUT_ERRORS,
    RANK_ERROR,
    RESIDUAL_ERRORS,
    X_ERRORS,
    as_float16,
    narrower,
    strided,
    to_float64,
)


def norm_args(
    op: str,
    rows: int | tuple[int, ...],
    cols: int,
    bias: bool = False,
    residual: bool = False,
    residual_out: bool = False,
    vector_dtype: Any = None,
    **options: Any,
) -> Callable[[Data, Any], Args]:
    lead = (rows,) if isinstance(rows, int) else rows
    count = int(np.prod(lead))

    def make(data: Data, dtype: Any) -> Args:
        x = hidden(data, count, cols, dtype).reshape(*lead, cols)
        args: Args = {"x": x, "weight": gain(data, cols, vector_dtype or dtype), **options}
        if bias and op == "layer_norm":
            args["bias"] = bias_values(data, cols, vector_dtype or dtype)
        if residual:
            args["residual"] = hidden(data, count, cols, dtype, 2).reshape(x.shape)
        if residual_out:
            args["residual_out"] = np.full_like(x, np.nan)
        return args

    return make


def extreme_args(op: str, cols: int, residual: bool = False, **options: Any) -> Callable[[Data, Any], Args]:
    def make(data: Data, dtype: Any) -> Args:
        x = extreme_rows(data, cols, dtype)
        args: Args = {"x": x, "weight": gain(data, cols, dtype), **options}
        if residual:  # sums beyond the dtype's largest number are among them
            args.update(residual=x.copy(), residual_out=np.full_like(x, np.nan))
        return args

    return make


FULL = {"bias": True, "residual": True, "residual_out": True}


def norm_cases(op: str) -> tuple[Case, ...]:
    cases = [Case(f"3 x {cols}", norm_args(op, 3, cols, bias=True)) for cols in COLS]
    cases += [
        Case("1 x 384", norm_args(op, 1, 384, bias=True)),
        Case("65 x 1536", norm_args(op, 65, 1536, bias=True)),
        Case("3 x 5000", norm_args(op, 3, 5000, bias=True)),
        Case("eps", norm_args(op, 3, 384, bias=True, eps=0.5)),
        Case("residual", norm_args(op, 3, 65, bias=True, residual=True), ("float32",)),
        Case("residual and residual_out", norm_args(op, 3, 65, **FULL)),
        Case("residual and residual_out, 65 x 1536", norm_args(op, 65, 1536, **FULL), ("float32",)),
        Case("residual_out alone", norm_args(op, 3, 65, bias=True, residual_out=True), ("float32",)),
        Case(
            "float32 weight",
            norm_args(op, 3, 65, bias=True, vector_dtype=np.float32),
            ("float16", "bfloat16"),
        ),
        Case("x 1-D", norm_args(op, (), 65, bias=True)),
        Case("x 3-D", norm_args(op, (2, 3), 33, **FULL)),
        Case("no rows", norm_args(op, 0, 64, **FULL)),
        Case(
            "NaN and Inf",
            lambda data, dtype: {"x": non_finite(4, 65, dtype), "weight": gain(data, 65, dtype)},
        ),
        Case(
            "row of zeros",
            lambda data, dtype: {"x": np.zeros((2, 33), dtype), "weight": gain(data, 33, dtype)},
        ),
    ]
    cases += [
        Case(f"rows of any size, {cols}, eps {eps:g}", extreme_args(op, cols, eps=eps))
        for cols, eps in ((33, 0.0), (384, 0.0), (384, 1e-5), (1500, 1e-30), (9000, 0.0))
    ]
    cases.append(Case("rows of any size and residual", extreme_args(op, 65, residual=True, eps=0.0)))
    if op == "layer_norm":
        cases.append(Case("no bias", norm_args(op, 3, 384)))
    return tuple(cases)


ERRORS = (
    *X_ERRORS,
    RANK_ERROR,
    ErrorCase("weight narrower", {"weight": narrower}, ValueError, "weight has shape"),
    ErrorCase("weight 2-D", {"weight": lambda a: a[None]}, ValueError, "weight has shape"),
    ErrorCase("weight float64", {"weight": to_float64}, TypeError, "weight has dtype"),
    ErrorCase("weight strided", {"weight": strided}, ValueError, "weight is not C-contiguous"),
    ErrorCase("eps negative", {"eps": -1e-5}, ValueError, "eps"),
    ErrorCase("eps NaN", {"eps": float("nan")}, ValueError, "eps"),
    ErrorCase("residual of another dtype", {"residual": as_float16}, TypeError, "residual has dtype"),
    ErrorCase("residual_out float16", {"residual_out": as_float16}, TypeError, "residual_out has dtype"),
    ErrorCase("residual_out narrower", {"residual_out": narrower}, ValueError, "residual_out has shape"),
    *RESIDUAL_ERRORS,
    *OUT_ERRORS,
)


def norm_expected(op: Callable[..., Any]) -> Callable[[Args], dict[str, NDArray[np.float64]]]:
    def expected(args: Args) -> dict[str, NDArray[np.float64]]:
        y, s = op(**{k: v for k, v in args.items() if k != "residual_out"})
        return {"out": y, "residual_out": s}

    return expected
