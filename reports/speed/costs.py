"""What a call costs beside its time: the memory it allocates, the bytes it has to move, its operations."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator
from math import prod

import rbe_gpu as rbe

from ..harness.measure import NUMPY, OURS, Case, Provider, library_of
from ..harness.rows import Row, Session

ALLOCATED, MOVED = "allocated_bytes", "moved_bytes"
#: operations per element of x, as the equation has them; exp, erf, a division and a maximum are one each
_PER_ELEMENT = {
    "add": 1.0,
    "dropout": 2.0,
    "gelu": 4.0,
    "l2_normalize": 3.0,
    "layer_norm": 8.0,
    "mean_pool": 1.0,
    "rms_norm": 4.0,
    "rope": 3.0,
    "silu": 4.0,
    "softmax": 6.0,
    "swiglu": 2.5,
}


def operations(op: str, shape: str, case: str) -> float | None:
    """Floating-point operations of a case on dense arrays, from its row; None of an op without any.

    shape : as rows have it: "(tokens, in) x (out, in)" of linear, that of q of attention, else that of x
    """
    numbers = [int(n) for n in re.findall(r"\d+", shape)]
    if op == "linear":
        tokens, features, out_features, _ = numbers
        return 2.0 * tokens * features * out_features
    if op == "attention":
        if "padded" in case:  # how many keys each query sees is not in the row
            return None
        batch, tokens, heads, head_dim = numbers
        return 4.0 * batch * heads * tokens**2 * head_dim * (0.5 if "causal" in case else 1.0)
    return _PER_ELEMENT[op] * prod(numbers) if op in _PER_ELEMENT and numbers else None


def allocated(provider: Provider) -> int:
    """The most memory that Python and NumPy hold at once for a call, beyond what they held before it."""
    call = provider.calls[0]
    call()
    tracemalloc.start()
    try:
        call()  # what the first traced call makes and keeps, such as caches, is not the call's
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        call()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return max(0, peak - before)


def moved(provider: Provider) -> int:
    """Bytes of operands and results of a call of ours, as `rbe_gpu.profile` counts them."""
    with rbe.profile() as profile:
        provider.calls[0]()
    return sum(call.nbytes for call in profile.calls)


def rows(case: Case, session: Session) -> Iterator[Row]:
    """Allocated bytes of NumPy's and our providers (other libraries allocate unseen), and moved ones of ours."""
    for name, provider in case.providers.items():
        library = library_of(name)
        if library in (OURS, NUMPY):
            yield case.row(session, name, ALLOCATED, "B", float(allocated(provider)))
        if library == OURS:
            yield case.row(session, name, MOVED, "B", float(moved(provider)))
