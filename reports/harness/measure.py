"""Measure a case: check the result of every provider, time them in pairs, and make the rows.

A provider whose result is wrong is not timed, so that no figure stands for a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu.registry import relative_error

from .rows import Row, Session
from .timing import Calls, speedups

OURS, NUMPY, TORCH, ONNX = "rbe_gpu", "NumPy", "PyTorch", "ONNX Runtime"
_only: str | None = None  # the library that this process builds cases for
#: largest relative Frobenius error of a float32 result against NumPy's. The longest sums have 4096 terms;
#: sums of that length in another order differ by 1e-6, polynomials by 5e-7
TOLERANCE = 1e-5

#: provider -> its calls to seconds per call, round by round
Timer = Callable[[Mapping[str, Calls]], dict[str, list[float]]]


class WrongResult(RuntimeError):
    """A provider's result is further from the expected one than allowed."""


@dataclass(frozen=True)
class Provider:
    """One implementation of a case.

    Attributes
    ----------
    calls : the computation, once for each set of buffers; a call returns the result
    expected : what the last call must return (of it the case's `sample`); None: it is not checked
    allowed : largest relative error, of differences beyond `floor`
    facts : further measured values, metric -> (value, unit)
    """

    calls: Calls
    expected: Any = None
    allowed: float = TOLERANCE
    floor: float = 0.0
    facts: Mapping[str, tuple[float, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One shape of one op and everyone who computes it, by the name of the provider.

    Attributes
    ----------
    sample : indices of the result that are compared; None: the whole result
    baselines : the providers that the others' speed is compared with, where they are there
    """

    op: str
    name: str
    shape: str
    providers: Mapping[str, Provider]
    dtype: str = "float32"
    sample: Sequence[Any] | None = None
    baselines: tuple[str, ...] = (TORCH, NUMPY)

    def row(self, session: Session, provider: str, metric: str, unit: str, values: Any) -> Row:
        """A row of this case."""
        return session.row(
            self.op, self.name, provider, metric, unit, values, shape=self.shape, dtype=self.dtype
        )


def library_of(provider: str) -> str:
    """The library that a provider computes with: `OURS`, `TORCH`, `ONNX` or `NUMPY`."""
    return next((name for name in (OURS, TORCH, ONNX) if provider.startswith(name)), NUMPY)


def build_only(library: str | None) -> None:
    """From now on this process builds the providers of one library alone; None: those of all."""
    global _only
    _only = library


def builds(library: str) -> bool:
    """Whether this process builds the providers of a library."""
    return _only in (None, library)


def rate_rows(
    session: Session,
    op: str,
    case: str,
    times: Mapping[str, Sequence[float]],
    *,
    texts: int,
    shape: str,
    baselines: Mapping[str, Collection[str]],
) -> Iterator[Row]:
    """Rows of the time per call, of the sentences per second, and of the speed relative to baselines, all round by
    round.

    times : provider -> seconds of a call that embeds `texts` texts
    baselines : provider -> those that are not compared with it; one that was not timed is left out
    """
    for name, seconds in times.items():
        yield session.row(op, case, name, "time", "s", seconds, shape=shape)
        rate = [texts / t for t in seconds]
        yield session.row(op, case, name, "sentences_per_second", "1/s", rate, shape=shape)
    for baseline, others in baselines.items():
        if baseline in times:
            for name, ratio in speedups(times, baseline).items():
                if name != baseline and name not in others:
                    yield session.row(op, case, name, f"speed_vs_{baseline}", "x", ratio, shape=shape)


def to_numpy(array: Any) -> NDArray[Any]:
    """An array of NumPy or CuPy, or a tensor of PyTorch, as a NumPy array."""
    if hasattr(array, "get"):
        array = array.get()
    return np.asarray(array.detach().cpu().numpy() if hasattr(array, "detach") else array)


def check(
    what: str,
    result: Any,
    expected: Any,
    allowed: float,
    floor: float = 0.0,
    sample: Sequence[Any] | None = None,
) -> float:
    """The relative Frobenius error of a result, or of what `sample` indexes in it.

    Raises
    ------
    WrongResult
        It exceeds `allowed`.
    """
    host = to_numpy(result) if sample is None else np.stack([to_numpy(result[i]) for i in sample])
    error = relative_error(host, np.asarray(expected, np.float64), floor)
    if not error <= allowed:
        raise WrongResult(f"{what} is off by {error:.3g} (allowed {allowed:g}); a wrong result is not timed")
    return error


def check_case(case: Case, session: Session) -> list[Row]:
    """Check the result of every provider of a case. Returns the rows of errors and of further facts.

    Raises
    ------
    WrongResult
        A provider's error exceeds what it is allowed.
    """
    rows = []
    for name, p in case.providers.items():
        if p.expected is not None:
            what = f"{case.op}, {case.name}, {case.dtype}: {name}"
            error = check(what, p.calls[-1](), p.expected, p.allowed, p.floor, case.sample)
            rows.append(case.row(session, name, "relative_error", "", error))
        rows += [case.row(session, name, metric, unit, value) for metric, (value, unit) in p.facts.items()]
    return rows


def measure(
    case: Case,
    session: Session,
    timer: Timer,
    check: Callable[[Case, Session], list[Row]] = check_case,
) -> tuple[list[Row], dict[str, list[float]]]:
    """Check every provider of a case and time them. Returns the rows, and the times by provider.

    check : as `check_case`

    Raises
    ------
    WrongResult
        A provider's error exceeds what it is allowed.
    """
    rows = check(case, session)
    times = timer({name: p.calls for name, p in case.providers.items()})
    return rows + time_rows(case, session, times), times


def time_rows(case: Case, session: Session, times: Mapping[str, Sequence[float]]) -> list[Row]:
    """Rows of the times of a case's providers, and of their speed relative to its baselines.

    times : provider -> seconds per call, round by round; a provider may be left out
    """
    rows = [case.row(session, name, "time", "s", seconds) for name, seconds in times.items()]
    for baseline in case.baselines:
        if baseline in times:
            rows += [
                case.row(session, name, f"speed_vs_{baseline}", "x", ratios)
                for name, ratios in speedups(times, baseline).items()
                if name not in case.baselines
            ]
    return rows
