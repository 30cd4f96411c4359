"""The options of commands that run on more than one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from ._errors import usage

Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="local|ADDRESS",
        help="Run on the workers of a Dask scheduler, tcp://HOST:PORT, or on processes of this machine, local "
        "(pip install 'rbe-gpu[cluster]').",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="With --scheduler local: how many processes. Default: one for each four threads, or each GPU.",
    ),
]


def check_cluster(scheduler: str | None, workers: int | None, options: Mapping[str, object]) -> None:
    """Refuse an address that is none, and what goes with --scheduler only. options : None where one is not given."""
    if scheduler is None:
        for option, value in options.items():
            if value is not None:
                usage("it goes with --scheduler", option)
        return
    from ..cluster import LOCAL, check_address

    try:
        check_address(scheduler)
    except ValueError as error:
        usage(str(error), "--scheduler")
    if workers is not None and scheduler != LOCAL:
        usage(f"it goes with --scheduler {LOCAL}; {scheduler} has its own workers", "--workers")
