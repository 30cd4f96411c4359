"""Cases of embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu import reference

from ._case import FLOATS, Args, Case, Data, ErrorCase, Mutant, OpCases
from ._errors import (
    NO_SYNC,
    OUT_ERRORS,
    strided,
    to_int32,
)
from ._weights import MATRICES, WEIGHTS, Weight


def _ids(rows: int, shape: tuple[int, ...], dtype: Any = np.int64) -> NDArray[Any]:
    """Row numbers with repeats; the first and the last row are among them."""
    ids = np.arange(int(np.prod(shape))) * 7 % rows
    ids[-1:] = rows - 1
    return ids.reshape(shape).astype(dtype)


def _embedding_case(weight: Weight, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Case:
    def make(data: Data, dtype: Any) -> Args:
        blocks = weight.blocks(data)
        return {"ids": _ids(blocks.rows, shape), "weight": blocks, "dtype": dtype}

    return Case(f"{weight.name} ids {shape}", make, dtypes)


def _words(data: Data, dtype: Any = np.float32) -> NDArray[Any]:
    return data.weight("embeddings.word_embeddings.weight")[2000:2030].astype(dtype)


def _embedding_dense(name: str, shape: tuple[int, ...], ids: Any = np.int64, cols: int = 384) -> Case:
    def make(data: Data, dtype: Any) -> Args:
        weight = np.ascontiguousarray(_words(data, dtype)[:, :cols])
        return {"ids": _ids(30, shape, ids), "weight": weight}

    return Case(name, make)


_ROW_WEIGHTS = tuple(w for w in WEIGHTS if w.kind == "vectors")
_BLOCK_WEIGHTS = tuple(w for w in WEIGHTS if w.kind == "matrix")


CASES = OpCases(
    "embedding",
    output_like=lambda args, dtype: ((*args["ids"].shape, args["weight"].shape[1]), dtype),
    expected=lambda args: {"out": reference.embedding(args["ids"], args["weight"])},
    cases=(
        _embedding_dense("dense", (65,)),
        _embedding_dense("dense one id", ()),
        _embedding_dense("dense 3-D ids", (2, 3, 5)),
        _embedding_dense("dense no ids", (0,)),
        _embedding_dense("dense int32 ids", (33,), np.int32),
        _embedding_dense("dense uint8 ids", (33,), np.uint8),
        _embedding_dense("dense 63 columns", (31,), cols=63),
        _embedding_dense("dense 1 column", (31,), cols=1),
        *(_embedding_case(w, (33,), ("float32",)) for w in _ROW_WEIGHTS),
        *(_embedding_case(w, (9,), ("float32",)) for w in _BLOCK_WEIGHTS),
        *(_embedding_case(w, (2, 33), FLOATS) for w in (*_ROW_WEIGHTS[:2], MATRICES[0], MATRICES[1])),
        _embedding_case(_ROW_WEIGHTS[0], (), FLOATS),
        _embedding_case(_ROW_WEIGHTS[0], (0,), FLOATS),
    ),
    valid_args=lambda data, dtype: {"ids": _ids(30, (3,)), "weight": _words(data, dtype)},
    errors=(
        ErrorCase("ids float", {"ids": np.zeros(3, np.float32)}, TypeError, "integers"),
        ErrorCase("ids a list", {"ids": [0, 1, 2]}, TypeError, "numpy"),
        ErrorCase("id too large", {"ids": np.array([0, 30])}, IndexError, "30", NO_SYNC),
        ErrorCase("id negative", {"ids": np.array([-1, 3])}, IndexError, "-1", NO_SYNC),
        ErrorCase("weight int32", {"weight": to_int32}, TypeError, "int32"),
        ErrorCase("weight 1-D", {"weight": lambda a: a[0].copy()}, ValueError, "weight has shape"),
        ErrorCase("weight strided", {"weight": strided}, ValueError, "contiguous"),
        *OUT_ERRORS,
    ),
    mutants=(
        Mutant("row of a table", "row * p.units + i % p.units", "row * p.units", "dense"),
        Mutant(
            "the barrier before the next tiles",
            "    __syncthreads();  // the tiles are free again\n",
            "",
            "matrix 384x384 dct 64 dense-int4 basis ids (2, 33)",
            one_block=True,
        ),
    ),
)
