"""The commands of `rbe-gpu` under one typer application."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from . import _environment, compress, distill, embed, eval, generate, info, inspect, report, tune, warmup
from ._errors import exit_code


class _Group(TyperGroup):
    """The application: reports every error on one line, whoever runs it."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> Any:
        sys.exit(self.exit_code(args))

    def exit_code(self, args: Sequence[str] | None = None) -> int:
        """Run a command line (`sys.argv` for None); the exit code of the process."""
        run = super().main
        arguments = None if args is None else list(args)
        return exit_code(lambda: run(arguments, prog_name="rbe-gpu", standalone_mode=False))


app = typer.Typer(
    name="rbe-gpu",
    cls=_Group,
    help="Compress transformer models, run them and measure them.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run() -> int:
    """Run the command line of this process; its exit code."""
    group = typer.main.get_command(app)
    assert isinstance(group, _Group)
    return group.exit_code()


def _checked(command: Callable[..., None]) -> Callable[..., None]:
    """The command, run after a check of the environment variables that it may read."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        _environment.check()
        command(*args, **options)

    return run


for module in (compress, distill, inspect, embed, generate, eval, report, warmup, tune, info):
    app.command(module.__name__.rpartition(".")[2])(_checked(module.command))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rbe-gpu {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress transformer models, run them and measure them."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.BadParameter("no command is given")
