"""`rbe-gpu tune`: measure the cost model of the CPU's matmul algorithms."""

from __future__ import annotations

from dataclasses import asdict

from ._errors import writes
from ._files import check_folder
from ._output import Json, new_table, print_json, show
from ._signals import cleaning_up


def command(as_json: Json = False) -> None:
    """Measure the cost model of the CPU's linear layers on this machine (about 20 seconds)."""
    from ..tuning import costs_file, machine, tune

    check_folder(costs_file().parent)
    writes(costs_file())
    with cleaning_up():
        costs = tune()
    if as_json:
        print_json({"file": str(costs_file()), "machine": machine(), **asdict(costs)})
        return
    table = new_table("cost", ">ns", title=f"One thread of this machine ({machine()})")
    for name, value in asdict(costs).items():
        table.add_row(name, f"{value:.3g}")
    show(table, f"stored in {costs_file()}")
