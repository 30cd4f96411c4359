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

from .bench import Row, Session
from .peers import F32, Folder

OURS = "rbe_gpu"


@dataclass(frozen=True)
class Target:
    """One way to compress the model: a grade for every tensor, a ratio for the whole file, or a share of the
    coefficients.
    """

    grade: str | None = None
    ratio: int | None = None
    kept: float | None = None

    @property
    def name(self) -> str:
        """As rows and tables call it."""
        if self.kept is not None:
            return f"{self.kept:.0%} kept"
        return f"grade {self.grade}" if self.grade else f"ratio {self.ratio}"

    @property
    def options(self) -> dict[str, Any]:
        """What `compress_model` takes."""
        if self.kept is not None:
            return {"density": self.kept, "codes": "sparse-int8", "basis": False}
        return {"grade": self.grade, "ratio": self.ratio}

    @property
    def short(self) -> str:
        """As plots call it."""
        return str(self.grade) if self.grade else f"{self.ratio}x"


TARGETS = (*(Target(grade=g) for g in "SABC"), *(Target(ratio=r) for r in (4, 8, 16, 50)))
#: for its speed: without calibration too few coefficients are left for vectors of any use
FAST = Target(kept=0.12)
ALL_TARGETS = (*TARGETS, FAST)
QUICK_TARGETS = (Target(grade="B"), Target(ratio=16), FAST)


def warm_up(weight: F32) -> None:
    """Compile the encoder and the decoder (once per machine; kept on disk), so that no timing includes it."""
    part = np.ascontiguousarray(weight[:128, :128])
    for kind in ("matrix", "vectors"):
        for options in ({"grade": "B"}, {"ratio": 8}, {"ratio": 40}, {"codes": "dense-int8"}):
            rbe.compress(part, kind=kind, **options).decode()


def encode(
    source: Path, out: Path, target: Target, session: Session, progress: Callable[[str, int, int], None]
) -> Iterator[Row]:
    """Compress the model folder into the file `out`, and read it back: times of each step and file bytes."""
    start = time.perf_counter()
    compress_model(source, out, **target.options, progress=progress)
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
        yield session.row("model", target.name, OURS, metric, "s", seconds)
    yield session.row("model", target.name, OURS, "file_bytes", "B", float(out.stat().st_size))


def weight_rows(folder: Folder, file: Path, target: Target, session: Session) -> Iterator[Row]:
    """Bits per weight and relative Frobenius error, over all compressed tensors of the file together."""
    tensors, _ = load_file(file)
    bits = lost = energy = 0.0
    count = 0
    for name, tensor in tensors.items():
        if not isinstance(tensor, RBEBlocks):
            continue
        original = folder.tensor(name)
        length = float(np.linalg.norm(original.astype(np.float64)))
        lost += (tensor.error_report(original).relative_error * length) ** 2
        energy += length**2
        bits += 8.0 * tensor.nbytes
        count += original.size
    yield session.row("model", target.name, OURS, "bits_per_weight", "bit", bits / count)
    yield session.row("model", target.name, OURS, "weight_error", "", float(np.sqrt(lost / energy)))


def nearest(vectors: F32) -> np.ndarray[Any, Any]:
    """For each vector the index of the most similar other one, (count,)."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return np.asarray(similar.argmax(axis=1))


def unrelated_cosine(dense: F32) -> float:
    """Mean cosine of two different texts in the dense model: what a vector scores that says nothing."""
    n = len(dense)
    return float(((dense @ dense.T).sum(dtype=np.float64) - n) / (n * (n - 1)))


def vector_rows(dense: F32, vectors: F32, case: str, session: Session, provider: str = OURS) -> Iterator[Row]:
    """Cosine of each text's vector to the dense model's, and how many texts keep their nearest neighbour.

    dense, vectors : (texts, hidden_size), of length 1
    """
    a, b = dense.astype(np.float64), vectors.astype(np.float64)
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    kept = float((nearest(dense) == nearest(vectors)).mean())
    for metric, value in (
        ("cosine_mean", float(cosines.mean())), ("cosine_min", float(cosines.min())), ("nearest_kept", kept),
    ):  # fmt: skip
        yield session.row("model", case, provider, metric, "", value, shape=f"{len(dense)} texts")
