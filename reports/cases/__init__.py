"""What is measured: one file per op, each with `cases(inputs, quick)`.

A case is one shape with its rivals. Every rival that says what its result must be is checked before it is
timed, so that no figure stands for a wrong result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bench import Row, Session, paired_times, speeds
from ..inputs import Inputs
from ..peers import F32, torch_or_none

OPS = (
    "decode",
    "linear",
    "embedding",
    "attention",
    "layer_norm",
    "rms_norm",
    "softmax",
    "l2_normalize",
    "mean_pool",
    "gelu",
    "silu",
    "swiglu",
    "dropout",
    "add",
)
NUMPY, TORCH, ONNX = "NumPy", "PyTorch", "ONNX Runtime"
#: metric of what the system that this project succeeds reported of itself, on a machine of its own
ORIGINAL_TIME = "original_time"
DENSE, DENSE_NEW = "rbe_gpu dense", "rbe_gpu dense, no out="
#: largest relative Frobenius error of a float32 result against NumPy's. The longest sums have 4096 terms;
#: sums of that length in another order differ by 1e-6, polynomials by 5e-7
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Rival:
    """One way to compute a case.

    Attributes
    ----------
    run : computes it once and returns the result
    expected : what `run` must return to `TOLERANCE`, or None when there is nothing to compare with
    facts : further measured values of this rival, metric -> (value, unit)
    """

    run: Callable[[], Any]
    expected: Any = None
    facts: Mapping[str, tuple[float, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One shape of one op and everyone who computes it, by the name of the provider."""

    op: str
    name: str
    shape: str
    rivals: Mapping[str, Rival]
    dtype: str = "float32"


def load(op: str) -> Callable[[Inputs, bool], Iterator[Case]]:
    """The function `cases` of an op's file."""
    found: Callable[[Inputs, bool], Iterator[Case]] = importlib.import_module(f"{__name__}.{op}").cases
    return found


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
    checked : whether all rivals must give the same result (not so where each draws its own random numbers)
    suffix : of the case's name
    original : seconds of the original system with a given output buffer and without
    """
    rows, cols = x.shape
    numpy_out, out = (np.empty((rows, cols_out or cols), np.float32) for _ in range(2))
    expected = numpy(x, np.empty_like(out)) if checked else None
    rivals = {NUMPY: Rival(lambda: numpy(x, numpy_out))}
    module = torch_or_none()
    if module is not None:
        f, t = module.nn.functional, module.from_numpy(x)
        rivals[TORCH] = Rival(lambda: torch(f, t), expected)
    given, new = ({} if original is None else {ORIGINAL_TIME: (t, "s")} for t in original or (0, 0))
    rivals[DENSE] = Rival(lambda: ours(x, out), expected, given)
    rivals[DENSE_NEW] = Rival(lambda: ours(x, None), expected, new)
    return Case(op, f"{rows} x {cols}{suffix}", str(x.shape), rivals)


def relative_error(result: Any, expected: Any) -> float:
    """||result - expected|| / ||expected||, in float64."""
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (result, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure(case: Case, session: Session, seconds: float, least: int = 5) -> list[Row]:
    """Check every rival of a case, time them in turn, and give the rows.

    Raises
    ------
    RuntimeError : a result is further than `TOLERANCE` from what it must be
    """
    rows: list[Row] = []

    def row(provider: str, metric: str, unit: str, values: Any) -> None:
        rows.append(
            session.row(
                case.op, case.name, provider, metric, unit, values, shape=case.shape, dtype=case.dtype
            )
        )

    for name, rival in case.rivals.items():
        if rival.expected is not None:
            error = relative_error(rival.run(), rival.expected)
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"{case.op}, {case.name}: the result of {name} is off by {error:.2g} "
                    f"(allowed {TOLERANCE}); a wrong result is not timed"
                )
            row(name, "relative_error", "", error)
        for metric, (value, unit) in rival.facts.items():
            row(name, metric, unit, value)
    times = paired_times({name: r.run for name, r in case.rivals.items()}, seconds=seconds, least=least)
    for name, seen in times.items():
        row(name, "time", "s", seen)
    for peer in (TORCH, NUMPY):
        if peer in times:
            for name, ratio in speeds(times, peer).items():
                if name not in (TORCH, NUMPY):
                    row(name, f"speed_vs_{peer}", "x", ratio)
    return rows
