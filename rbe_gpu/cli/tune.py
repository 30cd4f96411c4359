"""`rbe-gpu tune`: measure the planner's costs."""

from __future__ import annotations

from dataclasses import asdict

from ._errors import errors_on_one_line
from ._output import Json, new_table, print_json, show


def command(as_json: Json = False) -> None:
    """Measure the cost model of the CPU's linear layers on this machine (about 20 seconds)."""
    from .. import planner

    with errors_on_one_line():
        costs = planner.tune()
    if as_json:
        print_json({"file": str(planner.costs_file()), "machine": planner.machine(), **asdict(costs)})
        return
    table = new_table("what", ">ns", title=f"One thread of this machine ({planner.machine()})")
    for name, value in asdict(costs).items():
        table.add_row(name, f"{value:.3g}")
    show(table, f"kept in {planner.costs_file()}")
