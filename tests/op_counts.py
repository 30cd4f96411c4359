"""A pytest plugin (`-p tests.op_counts`) that prints the number of passed tests per op and dtype.

`--per-op N` runs only N cases of each test, op and dtype, evenly spaced, for machines that are too slow for all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

DTYPES = ("float32", "float16", "bfloat16")
ALL = "any"  # tests of an op without a dtype: error cases, signatures

_passed: Counter[tuple[str, str]] = Counter()
_failed: Counter[tuple[str, str]] = Counter()


def _key(item: pytest.Item) -> tuple[str, str] | None:
    """The op and dtype of a test, or None."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return (params["op"].name, params.get("dtype", ALL)) if "op" in params else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--per-op", type=int, help="number of cases of each test, op and dtype (default: all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    count = config.getoption("--per-op")
    if count is None:
        return
    groups: defaultdict[tuple[Any, ...], list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[getattr(item, "originalname", item.name), _key(item) or item.nodeid].append(item)
    selected = {group[i * len(group) // count] for group in groups.values() for i in range(count)}
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = [item for item in items if item in selected]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    key = _key(item)
    if key is not None:
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
