"""What is measured on the CPU: one file per op, each with `cases(inputs, quick)`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rbe_gpu import registry

from ...harness.baselines import F32, torch_or_none
from ...harness.inputs import Inputs
from ...harness.measure import NUMPY, ONNX, OURS, TORCH, Case, Provider
from ...harness.row_names import DENSE, DENSE_NEW

__all__ = [
    "DENSE",
    "DENSE_NEW",
    "NUMPY",
    "ONNX",
    "OPS",
    "OURS",
    "TORCH",
    "Case",
    "Provider",
    "load",
]

OPS = tuple(registry.OPS)
#: metric of what the system that this project succeeds reported of itself, on a machine of its own
ORIGINAL_TIME = "original_time"


def load(op: str) -> Callable[[Inputs, bool], Iterator[Case]]:
    """The function `cases` of an op's file."""
    cases: Callable[[Inputs, bool], Iterator[Case]] = importlib.import_module(f"{__name__}.{op}").cases
    return cases


def rowwise(
    op: str,
    x: F32,
    numpy: Callable[[F32, F32], F32],
    torch: Callable[[Any, Any], Any],
    ours: Callable[[F32, F32 | None], F32],
    cols_out: int | None = None,
    checked: bool = True,
    suffix: str = "",
    original: tuple[float, float] | None = None,
) -> Case:
    """A case of an op that maps rows to rows.

    Parameters
    ----------
    x : (rows, cols)
    numpy : (x, out) -> result
    torch : (torch.nn.functional, x) -> result
    ours : (x, out or None) -> result
    cols_out : columns of the result, when not those of x
    checked : whether all providers must give the same result (not so where each draws its own random numbers)
    suffix : of the case's name
    original : seconds of the original system with an output buffer and without
    """
    rows, cols = x.shape
    numpy_out, out = (np.empty((rows, cols_out or cols), np.float32) for _ in range(2))
    expected = numpy(x, np.empty_like(out)) if checked else None
    providers = {NUMPY: Provider([lambda: numpy(x, numpy_out)])}
    module = torch_or_none()
    if module is not None:
        f, t = module.nn.functional, module.from_numpy(x)
        providers[TORCH] = Provider([lambda: torch(f, t)], expected)
    with_out, without_out = (
        {} if original is None else {ORIGINAL_TIME: (t, "s")} for t in original or (0, 0)
    )
    providers[DENSE] = Provider([lambda: ours(x, out)], expected, facts=with_out)
    providers[DENSE_NEW] = Provider([lambda: ours(x, None)], expected, facts=without_out)
    return Case(op, f"{rows} x {cols}{suffix}", str(x.shape), providers)
