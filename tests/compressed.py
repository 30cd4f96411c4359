"""Compressed weights of every form, made from real weights, for the tests of the ops."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.codecs import GridCodes

from . import real

#: name -> (shape to cut from a real weight, arguments of compress, or of `gridded`)
FORMS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "dct int2 b64": ((130, 200), {"codes": "dense-int2"}),
    "dct int3 b32 basis": ((96, 384), {"codes": "dense-int3", "block": 32, "basis": True}),
    "dct int4 b128": ((384, 256), {"codes": "dense-int4", "block": 128}),
    "dwt int5 b64": ((70, 384), {"codes": "dense-int5", "transform": "dwt"}),
    "hadamard int6 b32": ((33, 65), {"codes": "dense-int6", "block": 32, "transform": "hadamard"}),
    "haar int7 b32": ((33, 65), {"codes": "dense-int7", "block": 32, "transform": "dwt-haar"}),
    "bior int8 b64 basis": ((64, 64), {"codes": "dense-int8", "transform": "dwt-bior3.1", "basis": True}),
    "none int12 b64": ((1, 63), {"codes": "dense-int12", "transform": "none"}),
    "dct f16 bitmap": ((130, 384), {"density": 0.3, "basis": False}),
    "dct f16 delta basis": ((384, 384), {"density": 0.02, "basis": True}),
    "dct f32 full": ((65, 129), {"codes": "sparse-f32"}),
    "dwt int8 bitmap b128": (
        (200, 300), {"density": 0.25, "codes": "sparse-int8", "block": 128, "transform": "dwt"}
    ),
    "none int4 delta": ((384, 1536), {"density": 0.05, "codes": "sparse-int4", "transform": "none"}),
    "dct int1 delta b32": ((384, 384), {"density": 0.05, "codes": "sparse-int1", "block": 32}),
    "vectors int4 b64": ((300, 384), {"codes": "dense-int4", "kind": "vectors"}),
    "vectors int6 b32 basis": (
        (65, 100), {"codes": "dense-int6", "kind": "vectors", "block": 32, "basis": True}
    ),
    "vectors f16 bitmap b128": ((37, 384), {"density": 0.4, "kind": "vectors", "block": 128}),
    "vectors int3 delta none": (
        (100, 384), {"density": 0.04, "codes": "sparse-int3", "kind": "vectors", "transform": "none"}
    ),
    "grid int2 b32": ((96, 384), {"grid": 2, "block": 32}),
    "grid int3 none": ((33, 65), {"grid": 3, "transform": "none"}),
    "grid int4 dwt basis": ((130, 200), {"grid": 4, "transform": "dwt", "basis": True}),
    "grid int5 b128": ((384, 1536), {"grid": 5, "block": 128}),
    "grid int8 no shrink": ((70, 384), {"grid": 8, "shrink": 0.0}),
    "grid vectors int4": ((300, 384), {"grid": 4, "kind": "vectors"}),
    "grid vectors int6 b32 basis": ((65, 100), {"grid": 6, "kind": "vectors", "block": 32, "basis": True}),
    "grid int3 b32 exceptions": ((130, 200), {"grid": 3, "block": 32, "factor": 40, "basis": True}),
    "grid int4 none exceptions": ((70, 384), {"grid": 4, "transform": "none", "factor": 9, "shrink": 0.0}),
    "grid vectors int2 exceptions": ((65, 300), {"grid": 2, "kind": "vectors", "factor": -90}),
}  # fmt: skip


@cache
def original(form: str) -> np.ndarray:
    """The dense weight of a form: a corner of real weights."""
    rows, cols = FORMS[form][0]
    name = "intermediate.dense.weight" if cols <= 384 else "output.dense.weight"
    w = np.ascontiguousarray(real.layer(1, name)[:rows, :cols])
    w.flags.writeable = False
    return w


@cache
def compressed(form: str) -> rbe.RBEMatrix | rbe.RBEVectors:
    arguments = FORMS[form][1]
    return (gridded if "grid" in arguments else rbe.compress)(original(form), **arguments)


@cache
def decoded(form: str) -> np.ndarray:
    """What a form stands for, float64."""
    m = compressed(form)
    return reference.decode(m).reshape(m.rows, m.cols)


def gridded(
    w: np.ndarray,
    grid: int,
    shrink: float = 0.1,
    row_steps: bool = True,
    factor: int = 1,
    **arguments: Any,
) -> rbe.RBEMatrix | rbe.RBEVectors:
    """A weight rounded to a grid of `grid` bits: row steps follow the rows' spread (or are 1), column steps
    their top. Every 61st integer is multiplied by `factor`."""
    m = rbe.compress(w, codes="dense-int12", **{"basis": False, **arguments})
    c = reference.coefficients(m)
    spread = c.std(axis=1)
    row = np.where(spread > 0, np.sqrt(spread / max(spread.mean(), 1e-30)), 1).astype(np.float16)
    row = row if row_steps else np.ones_like(row)
    top = 2 ** (grid - 1) - 1
    column = (np.abs(c / row[:, None].astype(np.float64)).max(axis=0) / top).astype(np.float16)
    step = np.outer(row.astype(np.float64), column.astype(np.float64))
    q = np.clip(np.rint(np.divide(c, step, out=np.zeros_like(c), where=step > 0)), -top, top)
    q.reshape(-1)[::61] *= factor
    return replace(m, codes=GridCodes.from_integers(q.astype(np.int64), row, column, shrink))


def for_gpu(m: rbe.RBEMatrix | rbe.RBEVectors) -> rbe.RBEMatrix | rbe.RBEVectors:
    """The weight as CUDA kernels read it, on the host."""
    return replace(m, codes=m.codes.for_gpu())


def relative(y: np.ndarray, reference: np.ndarray) -> float:
    """||y - reference|| / ||reference||, in float64."""
    reference = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(y, np.float64) - reference) / np.linalg.norm(reference))


def few_integers(shape: tuple[int, int], density: float, low: int = -128, high: int = 127) -> np.ndarray:
    """Integers of a real weight, int8, of which a share of `density` is not zero: those of the largest weights."""
    name = "intermediate.dense.weight" if shape[1] <= 384 else "output.dense.weight"
    w = real.layer(2, name)[: shape[0], : shape[1]]
    least = np.quantile(abs(w), 1 - density)
    q = np.where(abs(w) >= least, np.rint(w / w.std() * 2), 0)
    q[(abs(w) >= least) & (q == 0)] = 1
    return np.clip(q, low, high).astype(np.int8)


def with_integers(
    q: np.ndarray, kind: str = "matrix", transform: str = "none", block: int = 64, shrink: float = 0.0
) -> rbe.RBEMatrix | rbe.RBEVectors:
    """Grid codes of integers, with scales that differ."""
    pad = [(0, -len(q) % (block if kind == "matrix" else 1)), (0, -q.shape[1] % block)]
    padded = np.pad(q, pad)
    scales = np.linspace(0.5, 2, padded.shape[0]), np.linspace(2, 0.5, padded.shape[1])
    codes = GridCodes.from_integers(padded, *scales, shrink=shrink)
    make = rbe.RBEMatrix if kind == "matrix" else rbe.RBEVectors
    return make(q.shape, block, transform, 0.5, None, codes)
