"""Choosing a codec for a target: the configuration of least error for given bytes, or of least bytes for an error.

Errors are those of a `Sample` of the coefficients; the caller checks the whole weight.
"""

from __future__ import annotations

from dataclasses import replace

from . import CODECS
from .base import DEFAULT_GROUP, EncodeConfig, Sample

Names = tuple[str, ...] | None  # of codes that are allowed; None: all


def candidates(names: Names = None) -> list[EncodeConfig]:
    """The configurations of all codecs whose name is allowed, at density 1."""
    every = [config for codec in CODECS.values() for config in codec.candidates()]
    return [config for config in every if names is None or config.name in names]


def config_named(name: str) -> EncodeConfig:
    """The configuration of a name, with the default group."""
    return next(c for c in candidates((name,)) if c.group in (0, DEFAULT_GROUP))


def _one_bit_wider(config: EncodeConfig, among: list[EncodeConfig]) -> EncodeConfig | None:
    wider = replace(config, bits=config.bits + 1)
    return wider if wider in among else None


def _density_within(config: EncodeConfig, budget: float, rows: int, cols: int) -> float:
    """The largest density whose bytes fit `budget`; 0 if none does."""
    if config.nbytes(rows, cols) <= budget:
        return 1.0
    low, high = 0, rows * cols
    while low < high:
        middle = (low + high + 1) // 2
        if replace(config, density=middle / (rows * cols)).nbytes(rows, cols) <= budget:
            low = middle
        else:
            high = middle - 1
    return low / (rows * cols)


def best_for_bytes(
    sample: Sample, budget: float, rows: int, cols: int, names: Names
) -> tuple[EncodeConfig, float]:
    """The configuration of least error whose bytes fit `budget`, with its error on the sample."""
    best: tuple[float, EncodeConfig] | None = None
    configs = candidates(names)
    for config in configs:
        if config.prunes:
            density = _density_within(config, budget, rows, cols)
            if density <= 0.0:
                continue
            config = replace(config, density=density)
        else:
            wider = _one_bit_wider(config, configs)
            fits_wider = wider is not None and wider.nbytes(rows, cols) <= budget
            if config.nbytes(rows, cols) > budget or (fits_wider and names is None):
                continue
        error = sample.relative_error(config)
        if best is None or error < best[0]:
            best = error, config
    if best is None:
        raise ValueError(_unreachable(budget, rows, cols, configs))
    return best[1], best[0]


def _unreachable(budget: float, rows: int, cols: int, configs: list[EncodeConfig]) -> str:
    one = 1 / (rows * cols)
    smallest = (replace(c, density=one) if c.prunes else c for c in configs)
    least = min(c.nbytes(rows, cols) for c in smallest)
    return f"the target leaves {int(budget)} bytes for codes, but the least is {least}; use a lower ratio"


def best_for_error(
    sample: Sample, target: float, rows: int, cols: int, names: Names
) -> tuple[EncodeConfig, float]:
    """The configuration of least bytes whose error on the sample meets `target`, with its bytes.

    Where none does, the widest codes allowed.
    """
    configs = candidates(names)
    widest = max(configs, key=lambda c: (c.bits, -c.group))
    best, best_size = widest, float(widest.nbytes(rows, cols))
    series: dict[
        tuple[type[EncodeConfig], int], list[EncodeConfig]
    ] = {}  # widths of one codec and group size
    for config in configs:
        if not config.prunes:
            series.setdefault((type(config), config.group), []).append(config)
    for widths in series.values():
        low, high = 0, len(widths)  # errors fall with the width: bisect for the first that meets the target
        while low < high:
            middle = (low + high) // 2
            if sample.relative_error(widths[middle]) <= target:
                high = middle
            else:
                low = middle + 1
        if low < len(widths) and widths[low].nbytes(rows, cols) < best_size:
            best, best_size = widths[low], widths[low].nbytes(rows, cols)
    least_density = sample.least_density(target)
    for config in configs:
        if not config.prunes or replace(config, density=least_density).nbytes(rows, cols) >= best_size:
            continue
        high_density = _density_within(config, best_size - 1, rows, cols)
        if sample.relative_error(replace(config, density=high_density)) > target:
            continue
        low_density = least_density
        while high_density - low_density > 2e-3:
            density = (low_density + high_density) / 2
            if sample.relative_error(replace(config, density=density)) <= target:
                high_density = density
            else:
                low_density = density
        best = replace(config, density=high_density)
        best_size = best.nbytes(rows, cols)
    return best, best_size
