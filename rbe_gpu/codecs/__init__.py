"""The codecs: how a coefficient matrix is stored, in memory and in a file. One file per codec.

`CODECS` is the registry. Outside this package a codec is asked through the interface of `base.Codes`; only the
code that chooses a kernel distinguishes between codecs. `docs/add-a-codec.md` adds one, step by step.
"""

from __future__ import annotations

from inspect import isabstract

from .base import Codes, EncodeConfig
from .dense import DenseCodes
from .grid import GridCodes
from .sparse import SparseCodes

__all__ = ["CODECS", "Codes", "DenseCodes", "EncodeConfig", "GridCodes", "SparseCodes", "register"]

#: kind -> codec; kind names the codec in a file
CODECS: dict[str, type[Codes]] = {}


def register(codec: type[Codes]) -> None:
    """Add a codec: files may hold it, and `compress` chooses among its candidates too.

    Raises
    ------
    TypeError
        A method of the interface is missing.
    ValueError
        The kind is taken.
    """
    if isabstract(codec):
        missing = ", ".join(sorted(codec.__abstractmethods__))
        raise TypeError(f"{codec.__name__} does not define {missing}")
    if codec.kind in CODECS:
        raise ValueError(f"the codec {codec.kind!r} is registered already ({CODECS[codec.kind].__name__})")
    CODECS[codec.kind] = codec


for _codec in (DenseCodes, SparseCodes, GridCodes):
    register(_codec)
