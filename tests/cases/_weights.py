"""Compressed weights of the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.encode import compress
from rbe_gpu.transforms import BLOCK_SIZES, TRANSFORMS

from ._case import Data

_SOURCES: dict[str, Callable[[Data], NDArray[np.float32]]] = {
    "100x150": lambda data: data.layer(0, "attention.self.query.weight")[:100, :150],
    "33x65": lambda data: data.layer(1, "attention.self.key.weight")[:33, :65],
    "1x384": lambda data: data.layer(1, "attention.self.value.weight")[:1],
    "64x384": lambda data: data.layer(2, "attention.output.dense.weight")[:64],
    "384x384": lambda data: data.layer(2, "attention.self.query.weight"),
    "200x1536": lambda data: data.layer(2, "output.dense.weight")[:200],
    "words 30x384": lambda data: data.weight("embeddings.word_embeddings.weight")[2000:2030],
    "words 30x100": lambda data: data.weight("embeddings.word_embeddings.weight")[2000:2030, :100],
    "vector 384": lambda data: data.weight("embeddings.word_embeddings.weight")[1996],
    "vector 1000": lambda data: data.weight("embeddings.word_embeddings.weight").reshape(-1)[7000:8000],
}


@lru_cache(maxsize=256)
def _compressed(data: Data, source: str, kind: str, settings: tuple[tuple[str, Any], ...]) -> RBEBlocks:
    return compress(np.ascontiguousarray(_SOURCES[source](data)), kind=kind, **dict(settings))


@dataclass(frozen=True)
class Weight:
    """A compressed weight of the cases: a slice of a real one, its kind, and the encoder's settings."""

    source: str
    kind: str
    block: int
    transform: str
    codes: str
    density: float | None
    basis: bool

    @property
    def name(self) -> str:
        density = "" if self.density is None else f" density {self.density:g}"
        basis = " basis" if self.basis else ""
        return f"{self.kind} {self.source} {self.transform} {self.block} {self.codes}{density}{basis}"

    def blocks(self, data: Data) -> RBEBlocks:
        settings = {
            "block": self.block,
            "transform": self.transform,
            "codes": self.codes,
            "basis": self.basis,
        }
        if self.density is not None:
            settings["density"] = self.density
        return _compressed(data, self.source, self.kind, tuple(settings.items()))


def _weights() -> tuple[Weight, ...]:
    """Both kinds: every transform with every block size, every code and every index; with and without a basis."""
    weights = []
    for i, transform in enumerate(TRANSFORMS):
        for j, block in enumerate(BLOCK_SIZES):
            basis = (i + j) % 2 == 0
            weights.append(Weight("100x150", "matrix", block, transform, "sparse-int8", 0.3, basis))
            weights.append(Weight("words 30x100", "vectors", block, transform, "sparse-int4", 0.3, not basis))
    for bits in range(2, 9):
        weights.append(Weight("64x384", "matrix", 64, "dct", f"dense-int{bits}", None, bits % 2 == 0))
        weights.append(Weight("words 30x384", "vectors", 64, "dct", f"dense-int{bits}", None, bits % 2 == 1))
    for values in ("f32", "f16", "int8", "int4"):
        for density in (0.04, 0.3, 1.0):  # delta, bitmap and full index
            weights.append(Weight("100x150", "matrix", 32, "dct", f"sparse-{values}", density, False))
            weights.append(Weight("words 30x384", "vectors", 64, "dct", f"sparse-{values}", density, True))
    for source in ("33x65", "1x384"):
        weights.append(Weight(source, "matrix", 64, "dct", "dense-int4", None, True))
        weights.append(Weight(source, "vectors", 32, "dct", "sparse-int2", 0.2, False))
    return tuple(weights)


WEIGHTS = _weights()
VECTORS = (
    Weight("vector 384", "vectors", 64, "dct", "dense-int4", None, True),
    Weight("vector 1000", "vectors", 128, "dwt-db2", "sparse-f16", 0.2, False),
)
MATRICES = (
    Weight("384x384", "matrix", 32, "dct", "sparse-int4", 0.25, False),
    Weight("384x384", "matrix", 64, "dct", "dense-int4", None, True),
    Weight("384x384", "matrix", 128, "dwt-db2", "sparse-f16", 0.05, True),
    Weight("200x1536", "matrix", 64, "none", "dense-int3", None, False),
    Weight("200x1536", "matrix", 64, "dwt-bior3.1", "sparse-int8", 0.1, True),
    Weight("words 30x384", "vectors", 64, "dct", "dense-int4", None, True),
)
