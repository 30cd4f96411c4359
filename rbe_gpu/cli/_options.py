"""Values of options, checked before any file is opened: a wrong one is a usage error (exit code 2)."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import typer

Check = Callable[[float | None], float | None]


def number(
    least: float = 0.0, most: float | None = None, *, above: bool = False, what: str = "a finite number"
) -> Check:
    """A callback that accepts finite numbers from `least` (`above`: greater ones) to `most`."""
    low = f"greater than {least:g}" if above else f"of {least:g} or more"
    expected = f"{what} {low}" + ("" if most is None else f" and at most {most:g}")

    def check(value: float | None) -> float | None:
        if value is None:
            return None
        inside = isfinite(value) and (value > least if above else value >= least)
        if not inside or (most is not None and value > most):
            raise typer.BadParameter(f"{value:g} is not {expected}")
        return value

    return check


def compression(
    grade: str | None, density: float | None, block: int | None, transform: str | None, codes: str | None
) -> None:
    """Check the names of grades, blocks, transforms and codes, and what goes with `--density`."""
    from ..codecs.search import candidates, config_named
    from ..encode import GRADES
    from ..transforms import BLOCK_SIZES, TRANSFORMS

    transforms = ("dwt", "adaptive", *TRANSFORMS)
    code_names = tuple(dict.fromkeys(c.name for c in candidates()))
    for option, value, known in (
        ("--grade", grade, tuple(GRADES)),
        ("--block", block, BLOCK_SIZES),
        ("--transform", transform, transforms),
        ("--codes", codes, code_names),
    ):
        if value is not None and value not in known:
            raise typer.BadParameter(
                f"{value!r} is not one of {', '.join(map(str, known))}", param_hint=option
            )
    if density is not None and density < 1 and codes is not None and not config_named(codes).prunes:
        raise typer.BadParameter(
            f"{codes} stores every coefficient; use sparse codes with --density", param_hint="--codes"
        )
