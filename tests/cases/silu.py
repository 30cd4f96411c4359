"""Cases of silu."""

from __future__ import annotations

from rbe_gpu import reference

from ._case import Mutant, OpCases
from ._elementwise import ERRORS, element_args, element_cases

CASES = OpCases(
    "silu",
    output_like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.silu(**args)},
    cases=element_cases(),
    valid_args=element_args(3, 64, bias=True),
    errors=ERRORS,
    mutants=(
        Mutant("the last elements", "for (; at < p.count; ++at)", "for (++at; at < p.count; ++at)", "3 x 33"),
        Mutant(
            "columns of the bias", "at - quotient(chunk, p.by_cols) * p.cols, b", "0, b", "bias, 65 x 1537"
        ),
    ),
)
