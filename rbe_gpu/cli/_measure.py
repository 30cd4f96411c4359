"""`python -m rbe_gpu.cli._measure`: the process in which `rbe-gpu report` measures. Its parent reports interrupts."""

from __future__ import annotations

from . import _signals

if __name__ == "__main__":
    _signals.start(quiet=True)
    from importlib import import_module

    from . import _errors

    run = import_module("rbe_gpu.reports.run")  # by name: the package never imports the reports
    with _signals.cleaning_up():
        code = _errors.exit_code(run.command)
    _signals.end(code)
