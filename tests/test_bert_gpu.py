"""Results of the BERT encoder on CuPy arrays, tested in host emulation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu.models import BertEncoder

from . import real
from .host import stand_in
from .test_bert import relative, small_config, used_tensors

LIMITS = {
    "float32": 1e-6,
    "float16": 2e-3,
    "bfloat16": 1.5e-2,
}  # CPU and GPU round at different places


@pytest.fixture
def cupy() -> Iterator[Any]:
    with stand_in.installed() as module:
        yield module


@cache
def short_texts() -> list[str]:
    """Two, of 16 and 17 tokens: each emulated GPU thread is a fiber."""
    return sorted(real.texts()[:40], key=len)[:2]


@cache
def one_layer(dtype: str = "float32", **pooling: bool) -> BertEncoder:
    return BertEncoder(used_tensors(1), small_config(), real.tokenizer(), pooling or None, dtype=dtype)


@pytest.mark.parametrize("dtype", LIMITS)
def test_embeddings(cupy: Any, dtype: str) -> None:
    here = one_layer(dtype)
    there = rbe.to(here, "cuda")
    assert there.device == "cuda:0"
    assert relative(there.embed(short_texts()), here.embed(short_texts())) <= LIMITS[dtype]


def test_hidden_states(cupy: Any) -> None:
    ids = np.zeros((2, 7), np.int64)
    ids[0], ids[1, :3] = (101, 2023, 2003, 1037, 3231, 1012, 102), (101, 3231, 102)
    lengths, types = np.array([7, 3]), (ids > 2000).astype(np.int64)
    here, there = one_layer(), rbe.to(one_layer(), "cuda")
    for args in ((lengths,), (lengths, types)):
        result = there.forward(ids, *args)
        assert isinstance(result, cupy.ndarray)
        assert relative(result.get(), here.forward(ids, *args)) <= LIMITS["float32"]
