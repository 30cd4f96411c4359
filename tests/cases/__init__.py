"""The test cases of every op: `CASES[op]` is that of `tests/cases/<op>.py`.

A case is a function of a source of real weights and activations (`tests.real`) and of a dtype, and returns the
arguments of a call as NumPy arrays. Hand-made values appear only where an edge case is tested: NaN, Inf, masks.

`tests/test_conformance.py` runs every case on every backend against `rbe_gpu.reference`.
"""

from __future__ import annotations

from importlib import import_module

from rbe_gpu.registry import OPS

from ._case import Args, Case, Data, ErrorCase, OpCases

__all__ = ["CASES", "Args", "Case", "Data", "ErrorCase", "OpCases"]

CASES: dict[str, OpCases] = {op: import_module(f"{__name__}.{op}").CASES for op in OPS}
