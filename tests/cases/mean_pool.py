"""Cases of mean_pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rbe_gpu import reference

from ._arrays import COLS, extreme_rows, hidden
from ._case import Args, Case, Data, ErrorCase, Mutant, OpCases
from ._errors import NO_SYNC, OUT_ERRORS, X_ERRORS, shorter, to_float64


def _padded(
    batch: int, seq: int, cols: int, lengths: Any = None, poison: bool = False, **options: Any
) -> Callable[[Data, Any], Args]:
    """(batch, seq, cols), with NaN in the padding if `poison`."""

    def make(data: Data, dtype: Any) -> Args:
        x = hidden(data, batch * seq, cols, dtype).reshape(batch, seq, cols)
        args: Args = {"x": x, **options}
        if lengths is not None:
            args["lengths"] = np.array(lengths, np.int64)
            if poison:
                x[np.arange(seq) >= args["lengths"][:, None]] = np.nan
        return args

    return make


def _packed(lengths: Any, cols: int, index: Any = np.int64, **options: Any) -> Callable[[Data, Any], Args]:
    ends = np.cumsum([0, *lengths]).astype(index)
    return lambda data, dtype: {
        "x": hidden(data, int(ends[-1]), cols, dtype),
        "cu_seqlens": ends.copy(),
        **options,
    }


def _non_finite(data: Data, dtype: Any) -> Args:
    """Hand-made: NaN, Inf and -Inf, each in one sequence, and both infinities in one column."""
    x = np.ones((4, 5, 20))
    x[0, 3, 2], x[1, 0, 19], x[2, 4, 0] = np.nan, np.inf, -np.inf
    x[3, 1, 7], x[3, 2, 7] = np.inf, -np.inf
    return {"x": x.astype(dtype)}


def _extreme(cols: int, poison: bool) -> Callable[[Data, Any], Args]:
    """Sequences of 20 tokens over all of a dtype's range, whose sums overflow; `poison`: one value is infinite."""

    def make(data: Data, dtype: Any) -> Args:
        rows = extreme_rows(data, cols, dtype)
        x = np.stack([np.roll(np.resize(rows, (20, cols)), n, axis=1) for n in range(3)])
        x[1] = np.abs(x[1])
        x[2] = ml_dtypes.finfo(dtype).max
        if poison:
            x[2, 4, cols // 2] = np.inf
        return {"x": x, "lengths": np.array([20, 13, 20])}

    return make


def _expected(args: Args) -> dict[str, NDArray[np.float64]]:
    with np.errstate(invalid="ignore"):
        return {"out": reference.mean_pool(**{k: v for k, v in args.items() if k != "dtype"})}


def _result(args: Args, dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    batch = len(args["cu_seqlens"]) - 1 if "cu_seqlens" in args else args["x"].shape[0]
    return (batch, args["x"].shape[-1]), np.dtype(args.get("dtype", args["x"].dtype))


def _packed_error(
    name: str, change: dict[str, Any], error: type[Exception], match: str, why: str = ""
) -> Any:
    """An invalid argument beside a packed x."""
    return ErrorCase(
        name, {"x": lambda a: a.reshape(-1, a.shape[-1]), "lengths": None, **change}, error, match, why
    )


_LENGTHS = [7, 0, 19, 1]

CASES = OpCases(
    "mean_pool",
    output_like=_result,
    expected=_expected,
    cases=(
        *(Case(f"packed, {cols} columns", _packed(_LENGTHS, cols)) for cols in COLS),
        Case("padded, 384 columns", _padded(4, 19, 384, _LENGTHS, poison=True)),
        Case("padded, 65 columns", _padded(4, 19, 65, _LENGTHS, poison=True)),
        Case("int32 lengths", _packed(_LENGTHS, 64, np.int32)),
        Case("no padding", _padded(3, 9, 384)),
        Case("one sequence of 300 tokens", _packed([300], 384)),
        Case("float32 result", _packed(_LENGTHS, 384, dtype=np.dtype(np.float32)), ("float16", "bfloat16")),
        Case("float16 result", _packed(_LENGTHS, 384, dtype=np.dtype(np.float16)), ("float32",)),
        Case("no tokens", _padded(2, 0, 64)),
        Case("no sequences", _packed([], 64)),
        Case("NaN and Inf", _non_finite),
        *(Case(f"sums that overflow, {cols} columns", _extreme(cols, False)) for cols in (64, 70, 384)),
        Case("sums that overflow, and Inf", _extreme(70, True)),
    ),
    valid_args=_padded(3, 5, 64, [5, 2, 0]),
    errors=(
        *X_ERRORS,
        ErrorCase("x 2-D without cu_seqlens", {"x": lambda a: a[0].copy()}, ValueError, "axes"),
        ErrorCase("lengths float64", {"lengths": to_float64}, TypeError, "lengths has dtype"),
        ErrorCase("lengths shorter", {"lengths": shorter}, ValueError, "lengths has shape"),
        ErrorCase("lengths above seq", {"lengths": lambda a: a + 1}, ValueError, "seq=5", NO_SYNC),
        ErrorCase("lengths negative", {"lengths": lambda a: a - 1}, ValueError, "between 0", NO_SYNC),
        ErrorCase("dtype float64", {"dtype": np.dtype(np.float64)}, TypeError, "float64"),
        ErrorCase(
            "lengths and cu_seqlens",
            {"x": lambda a: a.reshape(-1, a.shape[-1]), "cu_seqlens": np.array([0, 15])},
            ValueError,
            "cu_seqlens",
        ),
        ErrorCase(
            "x 3-D with cu_seqlens", {"lengths": None, "cu_seqlens": np.array([0, 15])}, ValueError, "axes"
        ),
        _packed_error(
            "cu_seqlens float64", {"cu_seqlens": np.array([0.0, 15.0])}, TypeError, "cu_seqlens has dtype"
        ),
        _packed_error(
            "cu_seqlens 2-D", {"cu_seqlens": np.array([[0, 15]])}, ValueError, "cu_seqlens has shape"
        ),
        _packed_error(
            "cu_seqlens too long", {"cu_seqlens": np.array([0, 16])}, ValueError, "cu_seqlens must", NO_SYNC
        ),
        _packed_error(
            "cu_seqlens falls",
            {"cu_seqlens": np.array([0, 9, 8, 15])},
            ValueError,
            "cu_seqlens must",
            NO_SYNC,
        ),
        ErrorCase("out float64", {"out": to_float64}, TypeError, "float64"),
        *OUT_ERRORS[1:],
    ),
    mutants=(
        Mutant("tokens of a warp", "t += WARPS)", "t += WARPS + 1)", "one sequence of 300 tokens"),
        Mutant(
            "padding",
            "count = p.lengths[b] < seq ? p.lengths[b] : seq;",
            "count = seq;",
            "padded, 384 columns",
        ),
        Mutant(
            "the barrier before the sums",
            "    __syncthreads();\n    if (warp == 0 && col < cols) {",
            "    if (warp == 0 && col < cols) {",
            "packed, 384 columns",
        ),
        Mutant(
            "the barrier behind the sums",
            "    __syncthreads();  // `sums` is free again\n",
            "",
            "packed, 384 columns",
            one_block=True,
        ),
    ),
)
