"""Arrays of real values for the cases, and hand-made ones with NaN and Inf."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ._case import Data

ROWS = (1, 3, 65)
COLS = (1, 31, 33, 63, 64, 65, 384, 1536)


def hidden(data: Data, rows: int, cols: int, dtype: Any, layer_index: int = 3) -> NDArray[Any]:
    """(rows, cols) real hidden values, in memory order."""
    values = data.activations(-(-rows * cols // 384), layer_index).reshape(-1)
    return values[: rows * cols].reshape(rows, cols).astype(dtype)


def layer_vector(data: Data, name: str, count: int, dtype: Any) -> NDArray[Any]:
    """`count` values of a bias or gain of layer 3, repeated if it is shorter."""
    return np.resize(data.layer(3, name), count).astype(dtype)


def gain(data: Data, cols: int, dtype: Any) -> NDArray[Any]:
    return layer_vector(data, "output.LayerNorm.weight", cols, dtype)


def bias_values(data: Data, cols: int, dtype: Any) -> NDArray[Any]:
    return layer_vector(data, "intermediate.dense.bias", cols, dtype)


def non_finite(rows: int, cols: int, dtype: Any) -> NDArray[Any]:
    """Hand-made: row 0 has one NaN, row 1 one Inf, row 2 one -Inf; all other values are finite."""
    x = np.linspace(-3.0, 3.0, rows * cols).reshape(rows, cols)
    for row, value in enumerate((np.nan, np.inf, -np.inf)):
        x[row, (7 * row + 3) % cols] = value
    return x.astype(dtype)


def extreme_rows(data: Data, cols: int, dtype: Any) -> NDArray[Any]:
    """Finite rows over all of a dtype's range: real values times powers of ten, the largest and the smallest numbers,
    both in one row, rows of equal values and of values that differ in the last place."""
    info = ml_dtypes.finfo(dtype)
    largest, smallest = float(info.max), float(info.smallest_subnormal)
    real = hidden(data, 1, cols, np.float32)[0].astype(np.float64)
    signs = np.where(real < 0, -1.0, 1.0)
    powers = (1e-43, 1e-38, 1e-30, 1e-25, 1e-20, 1e-6, 1e4, 1e17, 1e18, 1e19, 1e20, 1e30, 1e37)
    rows = [real * p for p in powers if smallest <= p <= largest]
    rows += [signs * largest, signs * smallest, real * (largest / np.abs(real).max()), np.full(cols, largest)]
    mixed = signs * smallest
    mixed[:: max(1, cols // 3)] = largest
    one = np.zeros(cols)
    one[cols // 2] = largest
    near = np.full(cols, 3.0)
    near[cols // 3] += 3.0 * float(info.eps)
    wide = signs * np.exp2(np.linspace(np.log2(smallest), np.log2(largest), cols))
    rows += [mixed, one, -one, one / largest * smallest, near, wide]
    return np.clip(np.stack(rows), -largest, largest).astype(dtype)
