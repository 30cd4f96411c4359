"""Mistakes in the CUDA sources are caught by the cases of their op: `mutants` of `tests/cases/<op>.py`."""

from __future__ import annotations

import pytest

from rbe_gpu import registry

from .cases import CASES, Mutant
from .host.mutants import error

MUTANTS = [
    pytest.param(op, mutant, id=f"{op}-{mutant.name}".replace(" ", "_"))
    for op in registry.OPS
    for mutant in CASES[op].mutants
]


@pytest.mark.parametrize(("op", "mutant"), MUTANTS)
def test_a_mutant_is_caught(op: str, mutant: Mutant) -> None:
    """In one of the two orders of warps and lanes, by ten times the tolerance."""
    limit = registry.OPS[op].tolerances[mutant.dtype].rel
    assert any(not error(op, mutant, reverse) <= 10 * limit for reverse in (False, True))


@pytest.mark.parametrize(("op", "mutant"), [p for p in MUTANTS if p.values[1].one_block])
def test_one_block_does_all_of_the_work(op: str, mutant: Mutant) -> None:
    """The source as it is passes with a grid of one block too; other launches are those of the conformance tests."""
    limit = registry.OPS[op].tolerances[mutant.dtype].rel
    for reverse in (False, True):
        assert error(op, mutant, reverse, sound=True) <= limit
