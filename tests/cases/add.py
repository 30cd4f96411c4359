"""Cases of add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rbe_gpu import reference

from ._arrays import COLS, hidden
from ._case import Args, Case, Data, ErrorCase, Mutant, OpCases
from ._errors import OUT_ERRORS, RESIDUAL_ERRORS, X_ERRORS, as_float16


def _args(*shape: int) -> Callable[[Data, Any], Args]:
    count = int(np.prod(shape))
    return lambda data, dtype: {
        name: hidden(data, 1, count, dtype, layer).reshape(shape)
        for name, layer in (("x", 3), ("residual", 2))
    }


def _non_finite(data: Data, dtype: Any) -> Args:
    """Hand-made: every pair of {NaN, Inf, -Inf, 0, 1}."""
    x, residual = np.meshgrid([np.nan, np.inf, -np.inf, 0.0, 1.0], [np.nan, np.inf, -np.inf, 0.0, 1.0])
    return {"x": x.astype(dtype), "residual": residual.astype(dtype)}


CASES = OpCases(
    "add",
    output_like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.add(**args)},
    cases=(
        *(Case(f"3 x {cols}", _args(3, cols)) for cols in COLS),
        Case("65 x 1537", _args(65, 1537)),
        Case("200 x 1536", _args(200, 1536), ("float32",)),
        Case("x 0-D", _args()),
        Case("x 1-D", _args(1027)),
        Case("x 3-D", _args(2, 3, 33)),
        Case("no rows", _args(0, 64)),
        Case("NaN and Inf", _non_finite),
    ),
    valid_args=_args(3, 64),
    errors=(
        *X_ERRORS,
        *RESIDUAL_ERRORS,
        ErrorCase("residual of another dtype", {"residual": as_float16}, TypeError, "residual has dtype"),
        ErrorCase(
            "residual broadcast", {"residual": lambda a: a[0].copy()}, ValueError, "residual has shape"
        ),
        *OUT_ERRORS,
    ),
    mutants=(
        Mutant("the last elements", "for (; at < count; ++at)", "for (++at; at < count; ++at)", "3 x 33"),
        Mutant("the sum", "v[i] += r[i];", "v[i] = r[i];", "65 x 1537", "float16"),
    ),
)
