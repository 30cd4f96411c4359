"""Cases of decode."""

from __future__ import annotations

import numpy as np

from rbe_gpu import reference

from ._case import FLOATS, Case, ErrorCase, Mutant, OpCases
from ._errors import (
    OUT_ERRORS,
    to_float64,
)
from ._weights import MATRICES, VECTORS, WEIGHTS, Weight


def _decode_case(weight: Weight, dtypes: tuple[str, ...]) -> Case:
    return Case(weight.name, lambda data, dtype: {"weight": weight.blocks(data), "dtype": dtype}, dtypes)


CASES = OpCases(
    "decode",
    output_like=lambda args, dtype: (tuple(args["weight"].shape), dtype),
    expected=lambda args: {"out": reference.decode(args["weight"])},
    # the dtype only changes the final store: a few weights in all three
    cases=tuple(_decode_case(w, ("float32",)) for w in WEIGHTS)
    + tuple(_decode_case(w, FLOATS) for w in VECTORS + MATRICES),
    valid_args=lambda data, dtype: {"weight": MATRICES[0].blocks(data)},
    errors=(
        ErrorCase("an array", {"weight": np.ones((3, 4), np.float32)}, TypeError, "RBEMatrix"),
        ErrorCase("dtype float64", {"dtype": np.dtype(np.float64)}, TypeError, "float64"),
        ErrorCase("out float64", {"out": to_float64}, TypeError, "float64"),
        *OUT_ERRORS[1:],
    ),
    mutants=(
        Mutant(
            "first entry of a block",
            "static_cast<u32>(carry + sum - own)",
            "static_cast<u32>(carry + sum)",
            "matrix 384x384 dct 32 sparse-int4 density 0.25",
        ),
        Mutant(
            "first column",
            "int column = -1, done = 0;",
            "int column = 0, done = 0;",
            "matrix 384x384 dwt-db2 128 sparse-f16 density 0.05 basis",
        ),
        Mutant(
            "the barrier before the transform",
            "tiles, source);\n    __syncthreads();",
            "tiles, source);",
            "matrix 384x384 dct 64 dense-int4 basis",
        ),
        Mutant(
            "the barrier before the next tile",
            "    __syncthreads();  // the tiles are free again\n",
            "",
            "matrix 384x384 dwt-db2 128 sparse-f16 density 0.05 basis",
            one_block=True,
        ),
    ),
)
