"""Numbers and ratings as text. A figure that has no row is shown as "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

PASSED, FAILED, MISSING = "passed", "failed", "not measured"
SIGNIFICANT = 3


def megabytes(value: float | None, precise: bool = False) -> str:
    """Bytes in MB (10^6 bytes); `precise`: two places below 10 MB, which tell small files apart."""
    return MISSING if value is None else f"{value / 1e6:.{2 if precise and value < 10e6 else 1}f} MB"


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None:
        return MISSING
    value = float(f"{value:.{SIGNIFICANT}g}")
    unit, size = next(
        ((u, z) for u, z in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if value >= z), ("ns", 1e-9)
    )
    return f"{value / size:.0f} {unit}" if value >= 100 * size else f"{value / size:.{SIGNIFICANT}g} {unit}"


def plain(value: float | None, digits: int = SIGNIFICANT) -> str:
    """A number with so many significant digits."""
    return MISSING if value is None else f"{value:.{digits}g}"


def fixed(value: float | None, places: int = 4) -> str:
    """A number with so many decimal places, never rounded up to 1."""
    if value is None:
        return MISSING
    step = 10.0**-places
    # a cosine that differs from 1 by rounding alone is 1
    return f"{1 - step:.{places}f}" if 1 - step < value < 1 - 1e-6 else f"{value:.{places}f}"


def times(value: float | None) -> str:
    """A ratio, e.g. 1.25×."""
    if value is None:
        return MISSING
    return f"{value:.0f}×" if value >= 100 else f"{value:.2f}×" if value >= 0.1 else f"{value:.2g}×"


def percent(value: float | None, places: int = 0) -> str:
    """A fraction as a percentage."""
    return MISSING if value is None else f"{100 * value:.{places}f}%"


def signed(value: float | None, places: int = 4) -> str:
    """A difference with its sign."""
    return MISSING if value is None else f"{value:+.{places}f}"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


#: unit of a row -> how its values are shown
_SHOWN: dict[str, Callable[[float], str]] = {
    "s": seconds,
    "x": times,
    "B": lambda value: megabytes(value) if value >= 1e5 else f"{value:.0f} B",
    "B/s": lambda value: f"{value / 1e9:.3g} GB/s",
    "FLOP/s": lambda value: f"{value / 1e9:.4g} GFLOP/s",
    "1/s": lambda value: f"{value:.4g}/s",
}


def shown(value: float, unit: str) -> str:
    """A row's value in its unit."""
    return _SHOWN[unit](value) if unit in _SHOWN else f"{value:.6g} {unit}".strip()


# --- ratings ----------------------------------------------------------------------------------------------


class Rating(NamedTuple):
    """A coloured label. `level`: "good", "fair", "lost", "gone", or "" for none."""

    level: str
    words: str


#: (least mean cosine, rating), best first
RATINGS = (
    (0.999, Rating("good", "as good as dense")),
    (0.99, Rating("good", "very close to dense")),
    (0.95, Rating("fair", "small differences")),
    (0.90, Rating("fair", "noticeable loss; test it on your task")),
    (0.50, Rating("lost", "quality is lost; do not use")),
)
CLOSE = RATINGS[1][0]  # least mean cosine of "very close to dense"
GONE = Rating("gone", "quality is gone; unusable")
UNKNOWN = Rating("", MISSING)
#: level -> its range of the mean cosine
LOSSES = {"lost": f"0.5 to {RATINGS[3][0]}", "gone": f"below {RATINGS[4][0]}"}


def cosine_rating(cosine_mean: float | None) -> Rating:
    """How good a model of this mean cosine to the dense one is; "not measured" on None."""
    if cosine_mean is None:
        return UNKNOWN
    return next((rating for least, rating in RATINGS if cosine_mean >= least), GONE)
