"""Cases of swiglu."""

from __future__ import annotations

from rbe_gpu import reference

from ._case import ErrorCase, Mutant, OpCases
from ._elementwise import ERRORS, element_args, element_cases
from ._errors import (
    narrower,
)

CASES = OpCases(
    "swiglu",
    output_like=lambda args, dtype: ((*args["x"].shape[:-1], args["x"].shape[-1] // 2), args["x"].dtype),
    expected=lambda args: {"out": reference.swiglu(**args)},
    cases=element_cases(step=2),
    valid_args=element_args(3, 64, bias=True),
    errors=(*ERRORS, ErrorCase("odd columns", {"x": narrower}, ValueError, "even")),
    mutants=(
        Mutant("up", "load<VEC>(gates + p.cols, up);", "load<VEC>(gates, up);", "3 x 130"),
        Mutant("columns of up's bias", "p.cols + col, b", "col, b", "bias, 3 x 130"),
    ),
)
