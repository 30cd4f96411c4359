"""Cases of linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu import reference
from rbe_gpu.blocks import RBEBlocks, RBEMatrix
from rbe_gpu.codecs import GridCodes
from rbe_gpu.codecs.dense import quantize_dense

from ._arrays import ROWS, bias_values, hidden, non_finite
from ._case import Args, Case, Data, ErrorCase, Mutant, OpCases
from ._errors import (
    BIAS_ERRORS,
    OUT_ERRORS,
    RANK_ERROR,
    RESIDUAL_ERRORS,
    X_ERRORS,
    as_list,
    narrower,
    strided,
    to_int32,
)
from ._weights import MATRICES, WEIGHTS, Weight


def _linear_args(
    data: Data,
    dtype: Any,
    weight: Any,
    rows: int | tuple[int, ...],
    bias: bool = True,
    activation: str | None = None,
    residual: bool = False,
    bias_dtype: Any = None,
    method: str | None = None,
    activation_bits: int | None = None,
) -> Args:
    out_features, in_features = weight.shape
    lead = (rows,) if isinstance(rows, int) else rows
    count = int(np.prod(lead))
    args: Args = {"x": hidden(data, count, in_features, dtype).reshape(*lead, in_features), "weight": weight}
    if bias:
        args["bias"] = bias_values(data, out_features, bias_dtype or dtype)
    if activation:
        args["activation"] = activation
    if residual:
        args["residual"] = hidden(data, count, out_features, dtype, 2).reshape(*lead, out_features)
    if method:
        args["method"] = method
    if activation_bits:
        args["activation_bits"] = activation_bits
    return args


def _dense_weight(data: Data, out_features: int, in_features: int, dtype: Any) -> NDArray[Any]:
    name = "intermediate.dense.weight" if in_features <= 384 else "output.dense.weight"
    return np.ascontiguousarray(data.layer(2, name)[:out_features, :in_features]).astype(dtype)


def _int8_weight(
    data: Data, kind: str, bits: int = 4, group: int = 64, block: int = 64, transform: str = "none"
) -> RBEBlocks:
    """Codes that are multiplied with int8 activations: those of W itself, whatever the transform is said to be."""
    w = _dense_weight(data, 100, 384, np.float32)
    if kind == "dense":
        padded = np.pad(w, [(0, -size % block) for size in w.shape])
        return RBEMatrix(w.shape, block, transform, 1.0, None, quantize_dense(padded, bits, group))
    most = (1 << (bits - 1)) - 1
    padded = np.pad(w, ((0, -len(w) % block), (0, 0)))
    row, column = np.abs(padded).max(axis=1) / most, np.abs(w).max(axis=0) / np.abs(w).max()
    steps = np.maximum(np.outer(row, column), np.float32(1e-9))
    q = np.clip(np.rint(padded / steps), -most - 1, most).astype(np.int8)
    codes = GridCodes.from_integers(q, row, column).for_gpu()
    return RBEMatrix(w.shape, block, transform, 1.0, None, codes)


def _expected(args: Args) -> Args:
    """`method` selects the algorithm, not the result."""
    given = {k: v for k, v in args.items() if k not in ("method", "activation_bits")}
    return {"out": (reference.linear_int8 if "activation_bits" in args else reference.linear)(**given)}


def _linear_cases() -> tuple[Case, ...]:
    def dense(shape: tuple[int, int], rows: Any, **options: Any) -> Callable[..., Args]:
        return lambda data, dtype: _linear_args(
            data, dtype, _dense_weight(data, *shape, dtype), rows, **options
        )

    def compressed(weight: Weight, rows: Any, **options: Any) -> Callable[..., Args]:
        return lambda data, dtype: _linear_args(data, dtype, weight.blocks(data), rows, **options)

    cases = [
        Case(f"dense {n}x{k} rows {rows}", dense((n, k), rows, bias=rows != 3))
        for (n, k), rows in zip(
            ((1, 1), (31, 33), (63, 64), (65, 31), (384, 384), (200, 1536)), (3, 65, 1, 3, 65, 3), strict=True
        )
    ]
    for i, activation in enumerate(("relu", "gelu", "gelu_tanh", "silu")):
        residual = i % 2 == 0
        name = f"dense {activation}" + (" residual" if residual else "")
        cases.append(Case(name, dense((65, 384), 3, activation=activation, residual=residual)))
    cases += [
        Case("dense plain", dense((65, 384), 3, bias=False)),
        Case("dense x 1-D", dense((65, 384), ())),
        Case("dense x 3-D", dense((65, 384), (2, 3), residual=True)),
        Case("dense no rows", dense((65, 384), 0)),
        Case("dense float32 bias", dense((65, 384), 3, bias_dtype=np.float32), ("float16", "bfloat16")),
        Case(
            "dense float32 weight",
            lambda data, dtype: _linear_args(data, dtype, _dense_weight(data, 65, 384, np.float32), 3),
            ("float16", "bfloat16"),
        ),
        Case(
            "dense NaN and Inf",
            lambda data, dtype: {
                "x": non_finite(4, 64, dtype),
                "weight": np.abs(_dense_weight(data, 33, 64, dtype)) + np.asarray(0.01, dtype),
            },
        ),
    ]
    for w in WEIGHTS:
        cases.append(Case(f"{w.name} rows 3", compressed(w, 3), ("float32",)))
    for i, w in enumerate(MATRICES):
        for rows in ROWS:
            cases.append(Case(f"{w.name} rows {rows}", compressed(w, rows, residual=rows == 3)))
        act = (None, "relu", "gelu", "gelu_tanh", "silu")[i % 5]
        cases.append(
            Case(f"{w.name} {act}", compressed(w, (2, 3), activation=act, residual=True), ("float32",))
        )
        cases.append(
            Case(f"{w.name} rows 65, transform", compressed(w, 65, residual=i % 2 == 0, method="transform"))
        )
    short = Weight("64x384", "matrix", 64, "dct", "dense-int4", None, False)  # rows too short to split
    cases.append(Case(f"{short.name} rows 65", compressed(short, 65, residual=True)))
    for kind in ("grid", "dense"):
        for rows in (3, 65):
            cases.append(
                Case(
                    f"int8 activations, {kind} rows {rows}",
                    lambda data, dtype, kind=kind, rows=rows: _linear_args(
                        data, dtype, _int8_weight(data, kind), rows, residual=rows == 3, activation_bits=8
                    ),
                )
            )
    for kind, bits, group, block in (("dense", 8, 32, 128), ("grid", 7, 0, 64)):
        for rows in (16, 72):
            cases.append(
                Case(
                    f"int8 activations, {kind} {bits} bits dct rows {rows}",
                    lambda data, dtype, rows=rows, form=(kind, bits, group, block): _linear_args(
                        data, dtype, _int8_weight(data, *form, transform="dct"), rows, activation_bits=8
                    ),
                    # in float32 the transform's rounding would show where it moves an activation by an integer
                    ("float16", "bfloat16"),
                )
            )
    cases += [
        Case("compressed plain", compressed(MATRICES[0], 3, bias=False)),
        Case("compressed x 1-D", compressed(MATRICES[0], ())),
        Case("compressed no rows", compressed(MATRICES[0], 0)),
        Case(
            "compressed NaN and Inf",
            # a NaN reaches every result of its row, and so does an Inf unless its factor is exactly zero
            lambda data, dtype: {"x": non_finite(4, 384, dtype)[[0, 3]], "weight": MATRICES[1].blocks(data)},
        ),
    ]
    return tuple(cases)


_MEMORY = np.ones(3 * 384 + 3 * 65, np.float32)
_OVERLAP = (_MEMORY[: 3 * 384].reshape(3, 384), _MEMORY[3 * 384 - 1 : -1].reshape(3, 65))  # one shared value


CASES = OpCases(
    "linear",
    output_like=lambda args, dtype: ((*args["x"].shape[:-1], args["weight"].shape[0]), args["x"].dtype),
    expected=_expected,
    cases=_linear_cases(),
    valid_args=lambda data, dtype: _linear_args(
        data, dtype, _dense_weight(data, 65, 384, dtype), 3, residual=True
    ),
    errors=(
        *X_ERRORS,
        RANK_ERROR,
        ErrorCase("x narrower", {"x": narrower}, ValueError, "features"),
        ErrorCase("weight 1-D", {"weight": lambda a: a[0].copy()}, ValueError, "weight has shape"),
        ErrorCase("weight int32", {"weight": to_int32}, TypeError, "weight has dtype"),
        ErrorCase("weight a list", {"weight": as_list}, TypeError, "numpy"),
        ErrorCase("weight strided", {"weight": strided}, ValueError, "weight is not C-contiguous"),
        ErrorCase("activation", {"activation": "tanh"}, ValueError, "tanh"),
        ErrorCase("out over x", {"x": _OVERLAP[0], "out": _OVERLAP[1]}, ValueError, "memory"),
        *BIAS_ERRORS,
        *RESIDUAL_ERRORS,
        *OUT_ERRORS,
    ),
    mutants=(
        Mutant(
            "a counter for each tile",
            "place.group * tiles + place.first_row / rows_each",
            "place.group * tiles",
            "matrix 200x1536 none 64 dense-int3 rows 3",
            "float16",
            source="linear_few",
        ),
        Mutant(
            "the parts of every split",
            "load_from_blocks(part + s * apart)",
            "load_from_blocks(part)",
            "matrix 200x1536 none 64 dense-int3 rows 3",
            "float16",
            source="linear_few",
        ),
        Mutant(
            "the wait for the copies",
            "      cp_async_wait<0>();\n",
            "      cp_async_wait<1>();\n",
            "matrix 384x384 dct 64 dense-int4 basis rows 65",
            "float16",
        ),
        Mutant(
            "the barrier of a step",
            "      __syncthreads();  // this stage is complete, and the other is free\n",
            "",
            "matrix 384x384 dct 64 dense-int4 basis rows 65",
            "float16",
        ),
        Mutant(
            "the barrier of a step of entries",
            "    __syncthreads();  // this stage of x^ is complete, and the other is free\n",
            "",
            "matrix 384x384 dct 32 sparse-int4 density 0.25 rows 65, transform",
            source="linear_transform",
        ),
        Mutant(
            "entries before a column",
            "- (lane < 16 ? __popc(low) : 0)",
            "- __popc(low)",
            "matrix 384x384 dct 32 sparse-int4 density 0.25 rows 65, transform",
            "float16",
            source="linear_transform",
        ),
        Mutant(
            "columns that a group's scales belong to",
            "first * BN + n0",
            "n0",
            "int8 activations, dense rows 65",
            source="linear_integers",
        ),
        Mutant(
            "the sign of codes",
            "^ 0x80808080u;",
            ";",
            "int8 activations, grid rows 65",
            source="linear_integers",
        ),
    ),
)
