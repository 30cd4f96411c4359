"""Arrays of real values for the cases, and hand-made ones with NaN and Inf."""

from __future__ import annotations

from typing import Any

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
