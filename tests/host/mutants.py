"""The host build of a CUDA source with a mistake in it, and what a case of its op then gives."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from unittest import mock

import numpy as np

from rbe_gpu import dispatch, ops, registry
from rbe_gpu.gpu import _execute, _source, attention_wgmma
from rbe_gpu.gpu._launch import Launch

from .. import real
from ..cases import CASES, Args, Mutant
from . import build
from .executor import CAPABILITY, KernelError, Library, library


def replaced(text: str, old: str, new: str) -> str:
    """`text` with its one `old` replaced."""
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the source"
    return text.replace(old, new)


@lru_cache
def _library(source: str, old: str, new: str) -> Library:
    return Library(build.build(replaced(_source.source(source), old, new), optimised=False))


def error(op: str, mutant: Mutant, reverse: bool = False, sound: bool = False) -> float:
    """The largest relative error of the mutant's case, infinite where the host build raises.

    Parameters
    ----------
    reverse : warps and lanes in descending order
    sound : with the source as it is
    """
    cases = CASES[op]
    (case,) = (case for case in cases.cases if case.name == mutant.case)
    dtype = registry.DTYPES[mutant.dtype]
    args: Args = case.make(real, dtype)  # compressed with the CPU's kernels
    expected = cases.expected({k: v for k, v in args.items() if k != "dtype"})
    args["out"] = np.full(*cases.output_like(args, dtype)[:1], np.nan, cases.output_like(args, dtype)[1])
    source = mutant.source or op
    changed = None if sound else _library(source, mutant.old, mutant.new)

    def execute(launches: tuple[Launch, ...]) -> None:
        for launch in launches:
            lib = changed if changed is not None and launch.op == source else library(launch.op)
            lib.launch(replace(launch, grid=(1, 1, 1)) if mutant.one_block else launch, reverse)

    launchers = dispatch.Backend("host", "rbe_gpu.gpu")
    try:
        with (
            mock.patch.object(dispatch, "CPU", launchers),
            _execute.executor(execute, CAPABILITY),
            attention_wgmma.preferring("wgmma" if source == "attention_wgmma" else "mma"),
        ):
            getattr(ops, op)(**{k: v for k, v in args.items() if k != "dtype"})
    except KernelError:
        return float("inf")
    floor = registry.OPS[op].tolerances[mutant.dtype].floor
    return max(
        registry.relative_error(args[name], expected[name], floor) for name in expected if name in args
    )
