"""Token ids of the corpus's texts, stored in a model folder instead of its tokenizer.

A machine with a GPU then needs no package `tokenizers`, and computes on the same tokens as the machine that the
folder comes from, whatever the docstrings of its own Python are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu.models import corpus, locate

FILE = "token_ids.npz"
TEXTS: Mapping[str, Callable[[int], list[str]]] = {
    "calibration": corpus.calibration,
    "held_out": corpus.held_out,
}
#: texts of each kind that a folder holds: more than any stage asks for
COUNTS = {"calibration": 64, "held_out": 512}

Ids = list[list[int]]


def model_folder(path: Path | None = None) -> Path:
    """`locate.model_folder(path)`; a folder that holds ids needs no tokenizer.

    Raises
    ------
    FileNotFoundError
        No such folder or package, or a file is not there.
    """
    if path is not None and all(
        (path / name).is_file() for name in (FILE, "config.json", "model.safetensors")
    ):
        return path
    return locate.model_folder(path)


def store(folder: Path, encode: Callable[[list[str]], Ids]) -> None:
    """Write the ids of `COUNTS` texts of each kind into a folder, uint16 where they fit.

    encode : the tokenizer: texts to ids, special tokens included
    """
    arrays: dict[str, Any] = {}
    for kind, count in COUNTS.items():
        ids = encode(TEXTS[kind](count))
        flat = np.array([i for one in ids for i in one])
        arrays[kind] = flat.astype(np.uint16 if flat.max() < 1 << 16 else np.int32)
        arrays[f"{kind}_lengths"] = np.array([len(one) for one in ids], np.int32)
    np.savez_compressed(folder / FILE, **arrays)


def renumber(folder: Path) -> NDArray[np.int64]:
    """Number the ids of a folder by the rows that they use, and row 0, which is padding's, in their order.

    Returns
    -------
    (rows,) the row of the whole table that each new id stands for; the folder's model has to have these rows alone
    """
    with np.load(folder / FILE) as held:
        arrays = dict(held)
    rows = np.unique(np.concatenate([[0], *(arrays[kind] for kind in COUNTS)])).astype(np.int64)
    for kind in COUNTS:
        arrays[kind] = np.searchsorted(rows, arrays[kind]).astype(arrays[kind].dtype)
    np.savez_compressed(folder / FILE, **arrays)
    return rows


def stored(folder: Path) -> dict[str, Ids] | None:
    """The ids that `store` left in a folder, by kind of text, or None."""
    path = folder / FILE
    if not path.is_file():
        return None
    with np.load(path) as held:
        return {
            kind: [
                one.astype(np.int64).tolist()
                for one in np.split(held[kind], np.cumsum(held[f"{kind}_lengths"])[:-1])
            ]
            for kind in COUNTS
        }
