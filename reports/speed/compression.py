"""What compression costs: size, weight error, and how far the sentence vectors move, on held-out text.

Every figure is measured on its own: bytes from the file, weight error from decoded tensors against the
checkpoint, cosines from vectors that the compressed model computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import rbe_gpu as rbe
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.container import load_file, save_file
from rbe_gpu.models.compress import compress_model

from ..harness.baselines import F32, Folder
from ..harness.measure import OURS
from ..harness.row_names import FAST_DENSITY
from ..harness.rows import Row, Session
from ..harness.weight_error import file_weight_error


@dataclass(frozen=True)
class Setting:
    """How the model is compressed: a grade for every tensor, a ratio for the whole file, or a density."""

    grade: str | None = None
    ratio: int | None = None
    density: float | None = None

    @property
    def name(self) -> str:
        """The name in rows and tables."""
        if self.density is not None:
            return f"density {self.density:.0%}"
        return f"grade {self.grade}" if self.grade else f"ratio {self.ratio}"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `compress_model`."""
        if self.density is not None:
            return {"density": self.density, "codes": "sparse-int8", "basis": False}
        return {"grade": self.grade, "ratio": self.ratio}

    @property
    def short(self) -> str:
        """The name in plots."""
        return str(self.grade) if self.grade else f"{self.ratio}x"


SETTINGS = (*(Setting(grade=g) for g in "SABC"), *(Setting(ratio=r) for r in (4, 8, 16, 50)))
#: measured for its speed: without calibration, too few coefficients are left for useful vectors
FAST = Setting(density=FAST_DENSITY)
ALL_SETTINGS = (*SETTINGS, FAST)
QUICK_SETTINGS = (Setting(grade="B"), Setting(ratio=16), FAST)


def warm_up(weight: F32) -> None:
    """Compile the encoder and the decoder (once per machine; cached on disk), so that no timing includes it."""
    part = np.ascontiguousarray(weight[:128, :128])
    for kind in ("matrix", "vectors"):
        for options in ({"grade": "B"}, {"ratio": 8}, {"ratio": 40}, {"codes": "dense-int8"}):
            rbe.compress(part, kind=kind, **options).decode()


def encode(
    source: Path, out: Path, setting: Setting, session: Session, progress: Callable[[str, int, int], None]
) -> Iterator[Row]:
    """Compress the model folder into the file `out`, and read it back: times of each step and file bytes."""
    start = time.perf_counter()
    compress_model(source, out, **setting.options, progress=progress)
    encoded = time.perf_counter() - start
    start = time.perf_counter()
    tensors, config = load_file(out)
    loaded = time.perf_counter() - start
    compressed = [t for t in tensors.values() if isinstance(t, RBEBlocks)]
    start = time.perf_counter()
    for t in compressed:
        t.decode()
    decoded = time.perf_counter() - start
    copy = out.with_suffix(".copy")
    start = time.perf_counter()
    save_file(copy, tensors, config)
    saved = time.perf_counter() - start
    copy.unlink()
    for metric, seconds in (
        ("encode_time", encoded), ("write_time", saved), ("read_time", loaded), ("decode_time", decoded),
    ):  # fmt: skip
        yield session.row("model", setting.name, OURS, metric, "s", seconds)
    yield session.row("model", setting.name, OURS, "file_bytes", "B", float(out.stat().st_size))


def weight_rows(folder: Folder, file: Path, setting: Setting, session: Session) -> Iterator[Row]:
    """Bits per weight and relative Frobenius error, over all compressed tensors of the file together."""
    _, bits, error = file_weight_error(file, folder)
    yield session.row("model", setting.name, OURS, "bits_per_weight", "bit", bits)
    yield session.row("model", setting.name, OURS, "weight_error", "", error)


def nearest(vectors: F32) -> np.ndarray[Any, Any]:
    """For each vector the index of the most similar other one, (count,)."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return np.asarray(similar.argmax(axis=1))


def unrelated_cosine(dense: F32) -> float:
    """Mean cosine of two different texts in the dense model: the score of vectors without meaning."""
    n = len(dense)
    return float(((dense @ dense.T).sum(dtype=np.float64) - n) / (n * (n - 1)))


def vector_rows(dense: F32, vectors: F32, case: str, session: Session, provider: str = OURS) -> Iterator[Row]:
    """Cosine of each text's vector to the dense model's, and how many texts keep their nearest neighbour.

    dense, vectors : (texts, hidden_size), of length 1
    """
    a, b = dense.astype(np.float64), vectors.astype(np.float64)
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    same = float((nearest(dense) == nearest(vectors)).mean())
    for metric, value in (
        ("cosine_mean", float(cosines.mean())), ("cosine_min", float(cosines.min())), ("nearest_same", same),
    ):  # fmt: skip
        yield session.row("model", case, provider, metric, "", value, shape=f"{len(dense)} texts")
