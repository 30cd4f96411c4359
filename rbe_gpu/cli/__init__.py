"""The `rbe-gpu` command, one module per subcommand.

Tables and messages are for people; `--json` prints one JSON document and nothing else on standard output. Progress
bars go to standard error, and only to a terminal. Exit codes: 0 success, 1 invalid input or a missing requirement
(with a one-line message), 2 usage error, 130 interrupted. Each command imports what it needs when it runs, so that
`--help` is fast.
"""

from __future__ import annotations

import signal
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from . import compress, embed, eval, info, inspect, report, tune, warmup

app = typer.Typer(
    name="rbe-gpu",
    help="Compress transformer models, run them and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (compress, inspect, embed, eval, report, warmup, tune, info):
    app.command(module.__name__.rpartition(".")[2])(module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rbe-gpu {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress transformer models, run them and measure them."""


def main() -> None:
    """Entry point of `rbe-gpu`."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # a terminated run cleans up as an interrupted one does
    app()
