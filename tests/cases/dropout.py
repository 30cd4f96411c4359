"""Cases of dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rbe_gpu import reference

from ._arrays import COLS, hidden
from ._case import Args, Case, Data, ErrorCase, Mutant, OpCases
from ._errors import (
    OUT_ERRORS,
    RESIDUAL_ERRORS,
    X_ERRORS,
)


def _dropout_args(
    shape: tuple[int, ...], p: float, residual: bool = False, **options: Any
) -> Callable[..., Args]:
    count = int(np.prod(shape))

    def make(data: Data, dtype: Any) -> Args:
        args: Args = {"x": hidden(data, 1, count, dtype).reshape(shape), "p": p, "seed": 1234, **options}
        if residual:
            args["residual"] = hidden(data, 1, count, dtype, 2).reshape(shape)
        return args

    return make


def _dropout_non_finite(p: float) -> Callable[[Data, Any], Args]:
    """Hand-made: a dropped NaN or Inf is 0."""
    return lambda data, dtype: {
        "x": np.resize([np.nan, np.inf, -np.inf, 1.0], 64).astype(dtype),
        "p": p,
        "seed": 5,
    }


CASES = OpCases(
    "dropout",
    output_like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.dropout(**args)},
    cases=(
        *(Case(f"3 x {cols}", _dropout_args((3, cols), 0.1)) for cols in COLS),
        Case("65 x 384", _dropout_args((65, 384), 0.5)),
        Case("residual", _dropout_args((3, 65), 0.1, residual=True)),
        Case("residual, 65 x 384", _dropout_args((65, 384), 0.3, residual=True), ("float32",)),
        Case("p 0", _dropout_args((3, 65), 0.0)),
        Case("p 0, residual", _dropout_args((3, 65), 0.0, residual=True)),
        Case("p 1", _dropout_args((3, 65), 1.0)),
        Case("p 1, residual", _dropout_args((3, 65), 1.0, residual=True)),
        Case("64-bit seed and offset", _dropout_args((3, 65), 0.5, seed=2**64 - 2, offset=2**64 - 9)),
        Case("offset across 2^32", _dropout_args((3, 65), 0.5, offset=2**32 - 9)),
        Case("x 1-D", _dropout_args((1027,), 0.5)),
        Case("x 0-D", _dropout_args((), 0.5)),
        Case("x 3-D", _dropout_args((2, 3, 33), 0.5)),
        Case("no rows", _dropout_args((0, 64), 0.5, residual=True)),
        Case("NaN and Inf", _dropout_non_finite(0.5)),
        Case("NaN and Inf, p 1", _dropout_non_finite(1.0)),
    ),
    valid_args=_dropout_args((3, 64), 0.1, residual=True),
    errors=(
        *X_ERRORS,
        ErrorCase("p negative", {"p": -0.1}, ValueError, "p=-0.1"),
        ErrorCase("p above 1", {"p": 1.1}, ValueError, "p=1.1"),
        ErrorCase("p NaN", {"p": float("nan")}, ValueError, "p=nan"),
        ErrorCase("seed negative", {"seed": -1}, ValueError, "seed"),
        ErrorCase("seed too large", {"seed": 2**64}, ValueError, "seed"),
        ErrorCase("offset too large", {"offset": 2**64}, ValueError, "offset"),
        *RESIDUAL_ERRORS,
        *OUT_ERRORS,
    ),
    mutants=(
        Mutant(
            "blocks of random numbers",
            "p.offset + static_cast<u64>((at + i) / 4)",
            "p.offset + static_cast<u64>(at / 4)",
            "65 x 384",
            "float16",
        ),
        Mutant("carry", "c1 = static_cast<u32>(counter >> 32), c2", "c1 = 0, c2", "offset across 2^32"),
    ),
)
