"""A valid file with real weights in every kind of codes, to damage on purpose."""

from __future__ import annotations

import json
import os
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rbe_gpu import compress
from rbe_gpu.container import save_file
from tests.compressed import gridded
from tests.test_container import encoded, golden_tensors, small

CAP = 1 << 22  # bytes that a damaged file may claim to decode to: the tests decode what loads


def valid_tensors() -> dict[str, Any]:
    return {
        **golden_tensors(),  # dense-int4, delta f16, bitmap int3 with a basis, grid, float32, bfloat16
        "layer.d": encoded("sparse-int4-delta"),
        "layer.e": compress(small(32, 32), codes="sparse-int5", block=32, basis=False),  # a full index
        "layer.h": gridded(small(32, 40), 4, block=32),
        "layer.mask": np.array([True, False, True]),
    }


@lru_cache(maxsize=1)
def valid_bytes() -> bytes:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"rbe-hostile-{os.getpid()}"
    try:
        save_file(path, valid_tensors(), {"model_type": "example", "sizes": [1, 2.5, None, True]})
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


class Parts:
    """A file taken apart: `header` and `description` as JSON, `payload` as bytes; `join` is the way back."""

    def __init__(self) -> None:
        raw = valid_bytes()
        (n,) = struct.unpack("<Q", raw[:8])
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + n])
        self.description: dict[str, Any] = json.loads(self.header["__metadata__"]["rbe"])
        self.payload = bytearray(raw[8 + n :])

    @property
    def tensors(self) -> dict[str, Any]:
        return self.description["tensors"]

    def array(self, name: str) -> np.ndarray:
        """A writable view of an array in the payload."""
        entry = self.header[name]
        dtype = {"F32": "<f4", "F16": "<f2", "U8": "u1", "U16": "<u2", "BOOL": "u1", "BF16": "<u2"}[
            entry["dtype"]
        ]
        begin, _ = entry["data_offsets"]
        return np.frombuffer(self.payload, dtype, prod(entry["shape"]), begin).reshape(entry["shape"])

    def replace(self, name: str, raw: bytes) -> None:
        """Other bytes for an array, of any number; what follows it in the payload moves."""
        begin, end = self.header[name]["data_offsets"]
        self.payload[begin:end] = raw
        self.header[name]["shape"] = [len(raw)]
        self.header[name]["data_offsets"][1] = begin + len(raw)
        for other, entry in self.header.items():
            if other not in ("__metadata__", name) and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [n + begin + len(raw) - end for n in entry["data_offsets"]]

    def join(self) -> bytes:
        self.header["__metadata__"]["rbe"] = json.dumps(self.description)
        return packed(json.dumps(self.header)) + bytes(self.payload)


def packed(text: str | bytes) -> bytes:
    """The length and the header, padded to 8 bytes."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
