"""Calls without `workspace=`: small ones reuse scratch memory of their thread, large ones free theirs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import workspace

from . import real
from .test_layers import FORMS, SMALL, attention, traced_peak

CODES: list[dict[str, Any]] = [
    {"codes": "dense-int4", "basis": False},
    {"density": 0.1, "basis": False},
    {"grade": "B", "basis": True},
]


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return real.layer(0, "attention.self.query.weight")


def thread_bytes() -> int:
    return workspace._own.own.nbytes


@pytest.mark.parametrize("codes", CODES, ids=["dense", "sparse", "basis"])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_second_call_allocates_nothing(codes: dict[str, Any], tokens: int, weight: np.ndarray) -> None:
    m, x = rbe.compress(weight, **codes), real.activations(tokens)
    want = rbe.linear(x, m, workspace=rbe.Workspace())
    out = np.empty_like(want)
    rbe.linear(x, m, out=out)
    peak = traced_peak(lambda: rbe.linear(x, m, out=out))
    np.testing.assert_array_equal(out, want)
    assert peak < SMALL


@pytest.mark.parametrize("call", ["linear", "decode", "attention"])
def test_memory_of_a_large_call_is_freed(call: str, weight: np.ndarray) -> None:
    m, x = rbe.compress(weight, codes="dense-int4"), np.tile(real.activations(64), (11, 1))
    assert x.size > workspace._MAX_SHARED_VALUES
    before = thread_bytes()
    if call == "linear":
        rbe.linear(x, m)
    elif call == "decode":
        rbe.decode(rbe.compress(np.tile(weight, (2, 1)), codes="dense-int4"))
    else:
        attention(FORMS[1])(x[None])
    assert thread_bytes() == before


def test_no_result_is_in_shared_memory(weight: np.ndarray) -> None:
    m, layer = rbe.compress(weight, codes="dense-int4"), attention(FORMS[1])
    x, other = real.activations(64)[:8], real.activations(64)[8:16]
    prepared = rbe.prepare_input(x)
    results = [rbe.linear(prepared, m), rbe.decode(m), layer(x[None]), layer.mix(x[None])]
    copies = [a.copy() for a in results]
    for f in (rbe.linear(other, m), rbe.decode(m), layer(other[None]), layer.mix(other[None])):
        assert not any(np.may_share_memory(f, a) for a in results)
    for a, b in zip(results, copies, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(rbe.linear(prepared, m), copies[0])


def test_threads_have_memory_of_their_own(weight: np.ndarray) -> None:
    m = rbe.compress(weight, codes="dense-int4")
    inputs = [real.activations(64)[i : i + 8] for i in range(0, 64, 8)]
    want = [rbe.linear(x, m) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        spaces = set(pool.map(lambda _: id(workspace._own.own), range(8)))
        got = list(pool.map(lambda x: [rbe.linear(x, m) for _ in range(50)][-1], inputs))
    assert id(workspace._own.own) not in spaces
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_device_has_memory_of_its_own() -> None:
    """Calls of one thread may be on several streams of a GPU."""
    a, b = workspace.scratch_for(None, "cuda:0", 1), workspace.scratch_for(None, "cuda:0", 1)
    assert a is not b
    assert a.device == "cuda:0"
