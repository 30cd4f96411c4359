"""Calls of an encoder leave nothing in memory; `python -m tests.memory_of_calls` makes ten thousand of MiniLM."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import pytest

import rbe_gpu as rbe
from rbe_gpu.models import BertEncoder
from rbe_gpu.models.compress import compress_model

from .memory_of_calls import memory_of
from .test_compress_model import make_model

CALLS = 600
GROWTH = 512 << 10  # bytes that the allocator may take; 1 kB left by each call would be 540 kB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_memory_is_flat(activations: str, tmp_path: Path) -> None:
    compress_model(make_model(tmp_path / "m"), tmp_path / "file", codes="dense-int6")
    model = rbe.load(tmp_path / "file", activations=activations)
    memory = memory_of(model, CALLS)
    assert memory.growth < GROWTH, memory


def test_a_leak_is_seen(tmp_path: Path) -> None:
    model, left = rbe.load(make_model(tmp_path / "m")), []

    class Leaking(BertEncoder):
        def embed(self, *arguments: Any, **options: Any) -> Any:
            block = mmap.mmap(-1, 8 << 10)  # malloc would take what earlier tests have left of its heap
            block.write(b"\x01" * len(block))
            left.append(block)
            return super().embed(*arguments, **options)

    model.__class__ = Leaking
    assert memory_of(model, CALLS).growth > GROWTH
