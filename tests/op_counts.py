"""A pytest plugin (`-p tests.op_counts`): at the end, a table of how many tests of each op passed per dtype."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

DTYPES = ("float32", "float16", "bfloat16")
ALL = "any"  # tests of an op that have no dtype: bad inputs, signatures

_passed: Counter[tuple[str, str]] = Counter()
_failed: Counter[tuple[str, str]] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "op" in params:
        key = params["op"].name, params.get("dtype", ALL)
        if report.failed:
            _failed[key] += 1
        elif report.when == "call" and report.passed:
            _passed[key] += 1
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    write = terminalreporter.write_line
    write("")
    write(f"{'passed':12}" + "".join(f"{d:>10}" for d in (*DTYPES, ALL)) + f"{'failed':>10}")
    for op in sorted({op for op, _ in _passed | _failed}):
        counts = "".join(f"{_passed[op, d]:10}" for d in (*DTYPES, ALL))
        write(f"{op:12}{counts}{sum(n for (o, _), n in _failed.items() if o == op):10}")
