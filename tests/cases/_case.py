"""What a case is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rbe_gpu.registry import DTYPES

FLOATS = tuple(DTYPES)

Args = dict[str, Any]


class Data(Hashable, Protocol):
    """A source of real weights and activations: the module `tests.real`."""

    def layer(self, index: int, name: str) -> NDArray[np.float32]:
        """A tensor of encoder layer `index`, e.g. "attention.self.query.weight" (384, 384)."""

    def weight(self, name: str) -> NDArray[np.float32]:
        """A tensor by its full name, e.g. "embeddings.word_embeddings.weight" (30522, 384)."""

    def activations(self, rows: int, layer_index: int = 3) -> NDArray[np.float32]:
        """Hidden vectors in front of encoder layer `layer_index`, (rows, 384)."""

    def qkv(self, count: int = 8, layer_index: int = 2) -> tuple[NDArray[Any], ...]:
        """q, k, v (count, seq, 12, 32) of `count` texts, and their lengths (count,) int64."""


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one call. `make(data, dtype)` returns new, writable arrays."""

    name: str
    make: Callable[[Data, np.dtype[Any]], Args]
    dtypes: tuple[str, ...] = FLOATS


@dataclass(frozen=True, eq=False)
class ErrorCase:
    """A call that an op refuses with `error`, whose message contains `match`.

    `change` maps names of arguments to the invalid value, or to a function that computes it from the valid one. The
    valid value of "out" is an array of the right shape and dtype.

    `not_on_gpu` is the reason why a call with CuPy arrays does not raise.
    """

    name: str
    change: dict[str, Any]
    error: type[Exception]
    match: str
    not_on_gpu: str = ""


@dataclass(frozen=True)
class Mutant:
    """A mistake in the op's CUDA source that the op's cases must catch.

    Attributes
    ----------
    name : the mistake
    old, new : a text that the source, with its headers inlined, has once, and what replaces it
    case, dtype : the case whose result must be wrong
    source : the file in `cuda_src`, without its suffix; "" for that of the op
    one_block : launch a grid of one block, which then goes through all of the work
    """

    name: str
    old: str
    new: str
    case: str
    dtype: str = "float32"
    source: str = ""
    one_block: bool = False


@dataclass(frozen=True, eq=False)
class OpCases:
    """All cases of an op.

    Attributes
    ----------
    op : its name
    output_like : shape and dtype of the result, from the arguments and the case's dtype
    expected : float64 results by name: "out", those of the op's `outputs` that it also writes, and what it returns
        after "out" if asked to
    valid_args : a valid call that `errors` change
    mutants : at least one, of what is particular to the op's kernels
    """

    op: str
    output_like: Callable[[Args, np.dtype[Any]], tuple[tuple[int, ...], np.dtype[Any]]]
    expected: Callable[[Args], dict[str, NDArray[np.float64]]]
    cases: tuple[Case, ...]
    valid_args: Callable[[Data, np.dtype[Any]], Args]
    errors: tuple[ErrorCase, ...]
    mutants: tuple[Mutant, ...]

    def invalid_args(self, case: ErrorCase, data: Data) -> Args:
        """The arguments of a refused call."""
        float32 = DTYPES["float32"]
        args = self.valid_args(data, float32)
        valid = {**args, "out": np.empty(*self.output_like(args, float32))}
        return {**args, **{k: v(valid[k]) if callable(v) else v for k, v in case.change.items()}}
