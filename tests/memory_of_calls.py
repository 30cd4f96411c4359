"""Resident memory over many calls of an encoder: `python -m tests.memory_of_calls MODEL --calls 10000`."""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rbe_gpu.models.bert import BertEncoder

from . import real

_PAGE = 4096
_SAMPLES = 20


class Memory(NamedTuple):
    """before : resident bytes after the first tenth of the calls. after : the largest of the samples that follow."""

    calls: int
    before: int
    after: int

    @property
    def growth(self) -> int:
        return self.after - self.before

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls: {self.before / 1e6:.1f} MB after a tenth of them, later at most "
            f"{self.after / 1e6:.1f} MB ({self.growth / 1e3:+.0f} kB)"
        )


def resident() -> int:
    """Resident memory of this process now, in bytes. Linux."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def memory_of(model: BertEncoder, calls: int, seed: int = 0) -> Memory:
    """Embed `calls` times one of 50 batches of one to four texts.

    The longest batch comes first: scratch memory is kept for the next, as arguments of kernels are, for each number
    of tokens.
    """
    rng = random.Random(seed)
    texts = real.texts()[:400]
    longest = sorted(texts, key=len)[-4:]
    expected = model.embed(longest)
    batches = [rng.sample(texts, rng.randint(1, 4)) for _ in range(50)]
    samples = []
    for i in range(calls):
        model.embed(batches[i % len(batches)])
        if i % max(1, calls // _SAMPLES) == 0 and i >= calls // 10:
            samples.append(resident())
    np.testing.assert_array_equal(model.embed(longest), expected)
    return Memory(calls, samples[0], max(samples))


def main(arguments: Sequence[str] | None = None) -> None:
    import rbe_gpu as rbe

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a model folder or a .rbe.safetensors file")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--activations", choices=("int8", "float"))
    chosen = parser.parse_args(arguments)
    print(memory_of(rbe.load(chosen.model, activations=chosen.activations), chosen.calls))


if __name__ == "__main__":
    main()
