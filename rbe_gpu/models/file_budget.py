"""The bytes of a compressed file of a given ratio that are left for its compressed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, prod
from typing import Any, NamedTuple

from .. import transforms
from ..codecs import CODECS
from ..container import header
from .compress_tasks import Budget, stored
from .source import FLOATS, Source
from .stored_tokenizer import ARRAY as TOKENIZER_ARRAY


class _Sized(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def _largest_header(
    source: Source, kind_by_name: Mapping[str, str], block: int, config: dict[str, Any]
) -> int:
    """Bytes that no header of the result exceeds: per tensor the codec of the longest entry, and long numbers."""
    arrays: dict[str, _Sized] = {}
    described: dict[str, Any] = {}
    if source.tokenizer is not None:
        arrays[TOKENIZER_ARRAY] = _Sized("U8", source.tokenizer.shape, source.tokenizer.nbytes)
        described[TOKENIZER_ARRAY] = {"kind": "dense"}
    for name, kind in kind_by_name.items():
        dtype, shape = source.entry(name)[:2]
        if kind == "dense":
            arrays[name] = _Sized(dtype, shape, 8 * prod(shape))
            described[name] = {"kind": "dense"}
            continue
        rows, cols = (-(-n // block) * block for n in shape)
        largest: tuple[int, dict[str, _Sized], dict[str, Any]] | None = None
        for codec in CODECS.values():
            codes, shapes = codec.header_bound(rows, cols)
            shapes["basis"] = (rows, cols, 8)
            parts = {f"{name}.{part}": _Sized("F16", s, 4 * rows * cols) for part, s in shapes.items()}
            description = {
                "kind": "vectors",
                "shape": list(shape),
                "block": block,
                "transform": max(transforms.TRANSFORMS, key=len),
                "gain": 2.0**-120,
                "basis": False,
                "codes": codes,
            }
            size = len(header(parts, {name: description}, {}))
            if largest is None or size > largest[0]:
                largest = size, parts, description
        assert largest is not None
        arrays |= largest[1]
        described[name] = largest[2]
    return len(header(arrays, described, config))


def _stored_dense_bytes(source: Source, name: str, halve: bool) -> int:
    dtype, shape = source.entry(name)[:2]
    entry = source.files[name].entries[name]
    if dtype not in FLOATS:
        return int(entry.stop - entry.start)
    return stored(source, name, None, halve).value.nbytes if halve else 4 * prod(shape)


def budget_of_ratio(
    source: Source,
    kind_by_name: Mapping[str, str],
    ratio: float,
    block: int,
    config: dict[str, Any],
    dense_bytes: int,
    halve: bool,
) -> Budget:
    """The budget of the compressed tensors: what dense ones, tokenizer and header leave of dense_bytes / ratio.

    Parameters
    ----------
    kind_by_name : how each tensor is stored, as `compress.kind_of` has it
    block : of the compressed tensors
    config : of the file, with room for all that is still to be measured
    dense_bytes : the float tensors as float32
    halve : dense tensors are stored as float16

    Raises
    ------
    ValueError
        Nothing is left.
    """
    fixed = _largest_header(source, kind_by_name, block, config)
    fixed += 0 if source.tokenizer is None else source.tokenizer.nbytes
    compressible = 0
    for name, kind in kind_by_name.items():
        if kind == "dense":
            fixed += _stored_dense_bytes(source, name, halve)
        else:
            compressible += 4 * prod(source.entry(name)[1])
    left = floor(dense_bytes / ratio) - fixed
    if left < 1:
        highest = floor(100 * dense_bytes / (fixed + 1)) / 100
        raise ValueError(
            f"{source.path}: ratio={ratio:g} allows {floor(dense_bytes / ratio)} bytes, but dense tensors, "
            f"tokenizer and header alone take {fixed}; the highest reachable ratio is below {highest:g}"
        )
    return Budget(left, compressible)
