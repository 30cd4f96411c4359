"""Cases of gelu."""

from __future__ import annotations

from rbe_gpu import reference

from ._case import Case, ErrorCase, Mutant, OpCases
from ._elementwise import ERRORS, element_args, element_cases, non_finite_pairs

CASES = OpCases(
    "gelu",
    output_like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.gelu(**args)},
    cases=(
        *element_cases(),
        Case("tanh 3 x 65", element_args(3, 65, approximate="tanh")),
        Case("tanh bias, 3 x 65", element_args(3, 65, bias=True, approximate="tanh")),
        Case("tanh NaN and Inf", non_finite_pairs(20, approximate="tanh")),
    ),
    valid_args=element_args(3, 64, bias=True),
    errors=(*ERRORS, ErrorCase("approximate", {"approximate": "erf"}, ValueError, "approximate")),
    mutants=(
        Mutant("erf", "t < 0.0f ? tail", "t > 0.0f ? tail", "3 x 65"),
        Mutant("tanh", "0.044715f;", "0.44715f;", "tanh 3 x 65"),
    ),
)
