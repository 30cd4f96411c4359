"""Cases of layer_norm."""

from __future__ import annotations

from rbe_gpu import reference

from ._case import Mutant, OpCases
from ._errors import (
    BIAS_ERRORS,
)
from ._norm import ERRORS, FULL, norm_args, norm_cases, norm_expected

CASES = OpCases(
    "layer_norm",
    output_like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=norm_expected(reference.layer_norm),
    cases=norm_cases("layer_norm"),
    valid_args=norm_args("layer_norm", 3, 64, **FULL),
    errors=(*ERRORS, *BIAS_ERRORS),
    mutants=(
        Mutant(
            "columns past the end",
            "if (col < end) {\n        held.chunk",
            "{\n        held.chunk",
            "3 x 65",
        ),
        Mutant("residual", "if (residual) {", "if (false) {", "residual and residual_out"),
    ),
)
