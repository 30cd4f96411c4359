"""Cases that gelu, silu and swiglu share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._arrays import COLS, bias_values, hidden
from ._case import Args, Case, Data
from ._errors import (
    BIAS_ERRORS,
    OUT_ERRORS,
    RANK_ERROR,
    X_ERRORS,
)


def element_args(
    rows: int | tuple[int, ...], cols: int, bias: Any = False, **options: Any
) -> Callable[..., Args]:
    """x (rows, cols), and a bias in x's dtype (True) or in the dtype `bias`."""
    lead = (rows,) if isinstance(rows, int) else rows
    count = int(np.prod(lead))

    def make(data: Data, dtype: Any) -> Args:
        args: Args = {"x": hidden(data, count, cols, dtype).reshape(*lead, cols), **options}
        if bias:
            args["bias"] = bias_values(data, cols, dtype if bias is True else bias)
        return args

    return make


def non_finite_pairs(cols: int, **options: Any) -> Callable[[Data, Any], Args]:
    """Hand-made: every pair of {NaN, Inf, -Inf, 0, 1} and large values, in both halves of the columns."""
    values = (np.nan, np.inf, -np.inf, 0.0, 1.0, -1.0, 60.0, -60.0, 3e4, -3e4)

    def make(data: Data, dtype: Any) -> Args:
        left, right = np.meshgrid(values, values)
        x = np.concatenate([left, right], axis=1)
        return {"x": np.resize(x, (len(values), cols)).astype(dtype), **options}

    return make


def element_cases(step: int = 1, **options: Any) -> tuple[Case, ...]:
    """Column counts are multiples of `step`: 2 for an op that needs an even number."""
    cases = [Case(f"3 x {step * cols}", element_args(3, step * cols, **options)) for cols in COLS]
    cases += [
        Case(f"1 x {step * 384}", element_args(1, step * 384, **options)),
        Case(f"65 x {step * 1536}", element_args(65, step * 1536, **options)),
        Case(f"bias, 3 x {step * 65}", element_args(3, step * 65, bias=True, **options)),
        Case(f"bias, 65 x {step}", element_args(65, step, bias=True, **options), ("float32",)),
        Case(f"bias, 65 x {step * 1537}", element_args(65, step * 1537, bias=True, **options), ("float32",)),
        Case("float32 bias", element_args(3, step * 65, bias=np.float32, **options), ("float16", "bfloat16")),
        Case("x 1-D", element_args((), step * 65, **options)),
        Case("x 3-D", element_args((2, 3), step * 33, bias=True, **options)),
        Case("no rows", element_args(0, step * 64, bias=True, **options)),
        Case("NaN and Inf", non_finite_pairs(20, **options)),
    ]
    return tuple(cases)


ERRORS = (*X_ERRORS, RANK_ERROR, *BIAS_ERRORS, *OUT_ERRORS)
