"""dropout: y[i] = x[i] / (1 - p) where element i is kept, else 0; plus residual[i]."""

from __future__ import annotations

from typing import Any

from ._elements import BLOCK, grid, vector
from ._execute import run
from ._launch import SUFFIX, Launch, aligned
from ._params import DROPOUT


def launches(x: Any, p: float, seed: int, offset: int, residual: Any, out: Any) -> tuple[Launch, ...]:
    """The launch of `dropout`, from shapes, dtypes and addresses."""
    single = "" if aligned(x, residual, out) else "_single"
    params = DROPOUT.fill(
        x=x,
        residual=residual,
        out=out,
        count=x.size,
        threshold=int(p * 2**32),
        factor=1.0 / (1.0 - p) if p < 1.0 else 0.0,
        seed=seed,
        offset=offset,
    )
    entry = f"dropout_{SUFFIX[x.dtype]}{single}"
    return (Launch("dropout", entry, grid(x.size, vector(x)), BLOCK, params),)


def dropout(x: Any, p: float, seed: int, offset: int, residual: Any, out: Any) -> None:
    """Write x / (1 - p) where kept, else 0, plus residual, to `out`.

    Parameters
    ----------
    x, residual, out : (count,) float32/float16/bfloat16, one dtype; `out` may be one of the others
    p : 0 <= p <= 1
    seed, offset : 0 <= value < 2^64
    """
    run(*launches(x, p, seed, offset, residual, out))
