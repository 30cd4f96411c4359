"""Cases of rms_norm."""

from __future__ import annotations

from rbe_gpu import reference

from ._case import Mutant, OpCases
from ._norm import ERRORS, FULL, norm_args, norm_cases, norm_expected

CASES = OpCases(
    "rms_norm",
    output_like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=norm_expected(reference.rms_norm),
    cases=norm_cases("rms_norm"),
    valid_args=norm_args("rms_norm", 3, 64, **FULL),
    errors=ERRORS,
    mutants=(
        Mutant(
            "the first barrier of a sum", "  __syncthreads();\n#pragma unroll", "#pragma unroll", "65 x 1536"
        ),
        Mutant(
            "residual_out",
            "if (p.residual_out) store<VEC>",
            "if (false) store<VEC>",
            "residual and residual_out",
        ),
    ),
)
