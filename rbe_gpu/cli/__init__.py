"""The `rbe-gpu` command, one module per subcommand.

Tables and messages are for people; `--json` prints one JSON document and nothing else on standard output. Progress
bars go to standard error, and only to a terminal. Errors and warnings are one line each on standard error. Exit
codes:

    0    success
    1    the command line is right, but a file, the machine or the output is not; an error of rbe-gpu itself
    2    usage: an option, an argument or an environment variable is wrong, whatever the files hold
    130  interrupted (SIGINT, SIGTERM or SIGHUP)

This module imports next to nothing, so that an interrupt is handled from the start; `_app` has the commands, and
each of them imports what it needs when it runs.
"""

from __future__ import annotations

from . import _signals


def main() -> None:
    """Entry point of `rbe-gpu`."""
    _signals.start()
    from . import _app, _streams

    _streams.open_closed()
    _signals.end(_app.run())


def __getattr__(name: str) -> object:
    if name == "app":
        from ._app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
