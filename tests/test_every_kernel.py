"""The pass that compute-sanitizer looks at reaches every kernel."""

from __future__ import annotations

import pytest

from rbe_gpu import registry
from rbe_gpu.gpu import _source

from .every_kernel import calls, launched
from .host.executor import library
from .host.sanitized import Shapes

FURTHER = {"linear": ("linear_few", "linear_transform", "linear_integers")}  # sources beside an op's own


@pytest.mark.parametrize("op", [op for op in registry.OPS if _source.has(op)])
def test_the_pass_reaches_every_kernel(op: str) -> None:
    data = Shapes()
    found = set().union(*(launched(*call, data) for call in calls(op)))
    there = {name for source in (op, *FURTHER.get(op, ())) for name in library(source).index}
    assert {entry for entry in found if entry.startswith(f"{op}_")} == there
