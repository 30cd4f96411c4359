"""Cases of rope."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu import reference

from ._case import Args, Case, Data, ErrorCase, Mutant, OpCases
from ._errors import NO_SYNC, OUT_ERRORS, RANK_ERROR, X_ERRORS, narrower, shorter, strided, to_float64

MAX_POSITIONS = 70


def tables(rotary_dim: int, rows: int = MAX_POSITIONS) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of p * 10000 ** (-2 j / rotary_dim), (rows, rotary_dim / 2)."""
    angles = np.outer(np.arange(rows), 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@lru_cache(maxsize=1)
def _queries(data: Data) -> NDArray[Any]:
    return data.qkv(4)[0]


def _turn(
    shape: tuple[int, ...], rotary_dim: int, positions: Any = None, interleaved: bool = False
) -> Callable[[Data, Any], Args]:
    """Real queries of a shape; positions of every token, the last ones first and repeated, in an integer type."""

    def make(data: Data, dtype: Any) -> Args:
        cos, sin = tables(rotary_dim)
        args: Args = {"x": np.resize(_queries(data), shape).astype(dtype), "cos": cos, "sin": sin}
        if positions is not None:
            tokens = np.arange(int(np.prod(shape[:-2])))
            args["positions"] = (MAX_POSITIONS - 1 - 3 * tokens % 64).reshape(shape[:-2]).astype(positions)
        if interleaved:
            args["interleaved"] = True
        return args

    return make


def _non_finite(interleaved: bool) -> Callable[[Data, Any], Args]:
    """Hand-made: NaN, Inf and -Inf, each in one pair or in one copied feature."""

    def make(data: Data, dtype: Any) -> Args:
        x = np.ones((3, 4, 2, 40))
        x[0, 1, 0, 3], x[0, 2, 1, 38] = np.nan, np.nan
        x[1, 0, 0, 18], x[1, 3, 1, 33] = np.inf, -np.inf
        x[2, 2, 0, [4, 5, 20]] = np.inf
        cos, sin = tables(32)
        return {"x": x.astype(dtype), "cos": cos, "sin": sin, "interleaved": interleaved}

    return make


def _both(name: str, *args: Any, dtypes: Any = None) -> tuple[Case, ...]:
    """A case in halves and interleaved."""
    more = () if dtypes is None else (dtypes,)
    return (
        Case(name, _turn(*args), *more),
        Case(f"{name}, interleaved", _turn(*args, interleaved=True), *more),
    )


#: head_dim, rotary_dim: whole vectors, parts of vectors, and features that are copied
DIMS = ((64, 64), (32, 32), (128, 128), (80, 32), (96, 64), (34, 34), (6, 2), (5, 4), (33, 20), (72, 72))

CASES = OpCases(
    "rope",
    output_like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.rope(**args)},
    cases=(
        *(
            case
            for head_dim, rotary_dim in DIMS
            for case in _both(f"{rotary_dim} of {head_dim}", (2, 5, 3, head_dim), rotary_dim)
        ),
        *_both("packed", (61, 3, 64), 64),
        *_both("positions", (2, 33, 4, 64), 64, np.int64),
        *_both("positions, packed", (67, 1, 32), 32, np.int64),
        *_both("int32 positions", (3, 11, 2, 80), 32, np.int32),
        *_both("one token", (1, 1, 9, 64), 64, np.int64),
        *_both("every position", (1, MAX_POSITIONS, 2, 64), 64, dtypes=("float32",)),
        Case("5 axes", _turn((2, 2, 3, 2, 64), 64)),
        Case("5 axes, positions", _turn((2, 2, 3, 2, 64), 64, np.int64), ("float32",)),
        Case("no tokens", _turn((2, 0, 3, 64), 64, np.int64)),
        Case("no sequences", _turn((0, 5, 3, 64), 64)),
        Case("no heads", _turn((2, 5, 0, 64), 64)),
        Case("NaN and Inf", _non_finite(False)),
        Case("NaN and Inf, interleaved", _non_finite(True)),
    ),
    valid_args=_turn((2, 5, 3, 64), 32, np.int64),
    errors=(
        *X_ERRORS,
        RANK_ERROR,
        ErrorCase("x 2-D", {"x": lambda a: a[0, 0]}, ValueError, "axes"),
        ErrorCase("cos float64", {"cos": to_float64}, TypeError, "cos has dtype float64"),
        ErrorCase("sin float16", {"sin": lambda a: a.astype(np.float16)}, TypeError, "sin has dtype float16"),
        ErrorCase("cos strided", {"cos": strided}, ValueError, "cos is not C-contiguous"),
        ErrorCase("sin strided", {"sin": strided}, ValueError, "sin is not C-contiguous"),
        ErrorCase("cos 1-D", {"cos": lambda a: a[0].copy()}, ValueError, "cos has shape"),
        ErrorCase("cos without rows", {"cos": lambda a: a[:0].copy()}, ValueError, "cos has shape (0, 16)"),
        ErrorCase("cos without columns", {"cos": lambda a: a[:, :0].copy()}, ValueError, "1 to 32"),
        ErrorCase(
            "cos too wide",
            {n: np.ones((9, 33), np.float32) for n in ("cos", "sin")},
            ValueError,
            "33 columns",
        ),
        ErrorCase("sin narrower", {"sin": narrower}, ValueError, "sin has shape"),
        ErrorCase("sin shorter", {"sin": shorter}, ValueError, "sin has shape"),
        ErrorCase("positions float64", {"positions": to_float64}, TypeError, "positions has dtype float64"),
        ErrorCase("positions uint8", {"positions": lambda a: a.astype(np.uint8)}, TypeError, "uint8"),
        ErrorCase("positions shorter", {"positions": shorter}, ValueError, "positions has shape"),
        ErrorCase(
            "positions of one sequence", {"positions": lambda a: a[0]}, ValueError, "positions has shape"
        ),
        ErrorCase("positions above", {"positions": lambda a: a + 1}, ValueError, "0 to 69", NO_SYNC),
        ErrorCase("positions negative", {"positions": lambda a: a - 60}, ValueError, "-", NO_SYNC),
        ErrorCase(
            "more tokens than rows",
            {"positions": None, **{n: lambda a: a[:4].copy() for n in ("cos", "sin")}},
            ValueError,
            "5 tokens",
        ),
        *OUT_ERRORS,
    ),
    mutants=(
        Mutant("sign of the sine", "a[i] * c[i] - b[i] * s[i]", "a[i] * c[i] + b[i] * s[i]", "64 of 64"),
        Mutant("position in a sequence", "token - quotient(token, p.by_seq) * p.seq", "token", "32 of 32"),
        Mutant("int32 positions", "p.wide ?", "true ?", "int32 positions"),
        Mutant("first of the copied", "2 * p.half + (at", "p.half + (at", "32 of 80, interleaved", "float16"),
        Mutant("places of pairs", "INTERLEAVED ? 2 * j : j", "j", "64 of 64, interleaved", "bfloat16"),
    ),
)
