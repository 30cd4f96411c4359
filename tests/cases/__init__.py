"""The test cases of every op: `CASES[op]` is that of `tests/cases/<op>.py`.

A case is a function of a source of real weights and activations (`tests.real`) and of a dtype, and returns the
arguments of a call as NumPy arrays. Hand-made values appear only where an edge case is tested: NaN, Inf, masks.

`tests/test_conformance.py` runs every case on every backend against `rbe_gpu.reference`, `tests/test_mutants.py`
checks that they catch mistakes in the CUDA sources.
"""

from __future__ import annotations

from importlib import import_module

from ._case import Args, Case, Data, ErrorCase, Mutant, OpCases

__all__ = ["CASES", "Args", "Case", "Data", "ErrorCase", "Mutant", "OpCases"]


class _ByOp(dict[str, OpCases]):
    """Imports the cases of an op when they are first asked for: a missing file concerns the tests of its op only."""

    def __missing__(self, op: str) -> OpCases:
        self[op] = import_module(f"{__name__}.{op}").CASES
        return self[op]


CASES = _ByOp()
