"""Grid codes: every coefficient as a small integer times a row scale and a column scale, entropy-coded in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..dispatch import CPU
from ..json_checks import Fail, json_choice, json_fields, json_integer, json_number
from . import entropy, packing
from .base import Array, Codes, LoadCost, Take, on_host
from .cut import Exceptions, cut_columns

GRID_BITS = tuple(range(2, 9))
_CHUNK = 1 << 20  # integers packed at a time
_MAX_BYTES = (1 << 32) - 1  # that `row_start` counts
_MAX_ROW_BYTES = (1 << 16) - 1


@dataclass(frozen=True)
class GridCodes(Codes):
    """Every coefficient as a small signed integer on a grid whose steps are row scale times column scale.

    c[r, k] = row_scale[r] * col_scale[k] * (q - sign(q) * shrink), q the integer.
    Coefficients are peaked, so within a step most lie nearer to zero; `shrink` moves the value there.

    In memory the integers are cut to `base_bits` bits, and what is beyond that are exceptions (see `cut`); in a file
    they are a `stream`, entropy-coded (see `entropy`). `integers` gives them.
    Make them with `GridCodes.from_integers`; the calibrated encoder (`feedback`) does.

    Attributes
    ----------
    bits : 2 to 8, of the integers
    shrink : float32 value, 0 <= shrink < 0.5
    value : (rows_pad, cols_pad * base_bits / 8) uint8, cut integers plus 2**(base_bits - 1), packed (see `packing`)
    row_scale : (rows_pad,) float16; a file leaves it out where every row's is 1
    col_scale : (cols_pad,) float16
    stored : the stream that `value` was read from, its bytes a view of the file; None: made when needed
    exceptions : None where there are none
    """

    bits: int
    shrink: float
    value: Array
    row_scale: Array
    col_scale: Array
    stored: entropy.Stream | None = field(default=None, repr=False)
    exceptions: Exceptions | None = field(default=None, repr=False)
    kind: ClassVar[str] = "grid"
    array_names: ClassVar[tuple[str, ...]] = ("stream", "row_scale", "col_scale")

    @classmethod
    def from_integers(
        cls, q: NDArray[Any], row_scale: NDArray[Any], col_scale: NDArray[Any], shrink: float = 0.0
    ) -> GridCodes:
        """Integers and scales as codes, of the smallest width that holds the integers.

        c[r, k] = row_scale[r] * col_scale[k] * (q[r, k] - sign(q[r, k]) * shrink)

        Parameters
        ----------
        q : (rows_pad, cols_pad) integers, -128 to 127; cols_pad is a multiple of 32
        row_scale : (rows_pad,) rounded to float16
        col_scale : (cols_pad,) rounded to float16
        shrink : 0 <= shrink < 0.5, rounded to float32

        Raises
        ------
        ValueError
            A shape that does not fit, an integer out of range, a scale that is not finite as float16, a shrink
            out of range.
        TypeError
            q is not of integers.
        """
        if q.dtype.kind not in "iu":
            raise TypeError(f"q has dtype {q.dtype}; use integers")
        if q.ndim != 2 or q.shape[1] % packing.RUN or not q.size:
            raise ValueError(
                f"q has shape {q.shape}; expected (rows, cols), cols a multiple of {packing.RUN}"
            )
        low, high = int(q.min()), int(q.max())
        if low < entropy.LOWEST or high > entropy.HIGHEST:
            raise ValueError(
                f"q holds {low} to {high}; a grid has {entropy.LOWEST} to {entropy.HIGHEST}: use larger scales"
            )
        shrink = float(np.float32(shrink))
        if not 0.0 <= shrink < 0.5:
            raise ValueError(f"shrink={shrink} is not in 0 <= shrink < 0.5")
        scales = []
        for name, scale, size in (("row_scale", row_scale, q.shape[0]), ("col_scale", col_scale, q.shape[1])):
            if scale.shape != (size,):
                raise ValueError(f"{name} has shape {scale.shape}, expected ({size},)")
            with np.errstate(over="ignore"):
                half = np.ascontiguousarray(scale, np.float16)
            if not np.isfinite(half).all():
                raise ValueError(
                    f"{name} holds NaN, Inf or a value beyond float16; move magnitude to the gain"
                )
            scales.append(half)
        bits = next(b for b in GRID_BITS if -(1 << (b - 1)) <= low and high < 1 << (b - 1))
        return cls._packed(entropy.Columns(_columns_of(q), None), bits, shrink, scales[0], scales[1], None)

    @classmethod
    def _packed(
        cls,
        columns: entropy.Columns,
        bits: int,
        shrink: float,
        row_scale: NDArray[np.float16],
        col_scale: NDArray[np.float16],
        stored: entropy.Stream | None,
    ) -> GridCodes:
        """The codes of integers, which are overwritten."""
        integers, order = columns
        rows = len(row_scale)
        base_bits, exceptions = cut_columns(integers, bits, rows, order)
        value = packing.pack_columns(integers.view(np.uint8), base_bits, rows, order)
        return cls(bits, shrink, value, row_scale, col_scale, stored, exceptions)

    @property
    def base_bits(self) -> int:
        """Bits of a packed code, at most `bits`."""
        return int(8 * self.value.shape[1] // len(self.col_scale))

    def integers(self) -> NDArray[np.int8]:
        """q, (rows_pad, cols_pad) int8 on the host."""
        q = _unpack_integers(on_host(self.value), self.base_bits, len(self.col_scale))
        if self.exceptions is not None:
            self.exceptions.add_to(q)
        return q

    def for_gpu(self) -> GridCodes:
        """Without exceptions, which CUDA kernels do not read: packed with `bits` bits, also when moved back."""
        if self.exceptions is None:
            return self
        return replace(self, value=_pack_integers(self.integers(), self.bits), exceptions=None)

    def for_lookup(self) -> GridCodes:
        rows, cols = len(self.row_scale), len(self.col_scale)
        if self.device != "cpu" or rows * (2 * cols + 3) > _MAX_BYTES or 2 * cols > _MAX_ROW_BYTES:
            return self
        value, row_start = CPU.module("grid_rows").codes_of_rows(self)
        made = GridRows(
            self.bits, self.shrink, value, self.row_scale, self.col_scale, self.stored, row_start=row_start
        )  # fmt: skip
        return made if made.resident_nbytes < self.resident_nbytes else self

    def for_int8(self) -> GridCodes:
        if self.device != "cpu" or self.shrink:
            return self
        planes = CPU.module("grid_planes").planes_of(self)
        if planes is None:
            return self
        return GridPlanes(
            self.bits,
            self.shrink,
            row_scale=self.row_scale,
            col_scale=self.col_scale,
            stored=self.stored,
            **planes,
        )

    @property
    def name(self) -> str:
        return f"grid-int{self.bits}"

    @cached_property
    def stream(self) -> entropy.Stream:
        """The integers as a file holds them, on the host. Made once."""
        if self.stored is not None:
            return self.stored
        return entropy.compress_integers(self.integers())

    @cached_property
    def has_row_scale(self) -> bool:
        """Whether a row's scale is other than 1."""
        return bool((self.row_scale != 1).any())

    @property
    def arrays(self) -> dict[str, Array]:
        rows = {"row_scale": self.row_scale} if self.has_row_scale else {}
        return {"stream": self.stream.data, **rows, "col_scale": self.col_scale}

    def has_size(self, rows: int, cols: int) -> bool:
        return (len(self.row_scale), len(self.col_scale)) == (rows, cols)

    @property
    def resident_nbytes(self) -> int:
        """Bytes in memory: integers and scales. (The stream of a loaded file stays in the file.)"""
        exceptions = 0 if self.exceptions is None else self.exceptions.nbytes
        return int(self.value.nbytes + exceptions + self.row_scale.nbytes + self.col_scale.nbytes)

    def description(self) -> dict[str, Any]:
        return {
            "kind": "grid",
            "bits": int(self.bits),
            "shrink": float(self.shrink),
            "row_scale": self.has_row_scale,
            "bands": self.stream.bands,
        }

    @classmethod
    def upgrade(cls, stored: dict[str, Any], version: int, fail: Fail) -> dict[str, Any]:
        if version > 1:
            return stored
        if "bands" in stored:
            fail('codes has an unknown entry "bands"')
        return {**stored, "bands": 1}

    @classmethod
    def from_file(cls, stored: Any, rows: int, cols: int, take: Take, fail: Fail) -> GridCodes:
        bits, shrink, has_row_scale, bands = cls._parameters(stored, fail)
        row_scale = take("row_scale", ("F16",), (rows,), finite=True) if has_row_scale else None
        col_scale = take("col_scale", ("F16",), (cols,), finite=True)
        stream = take("stream", ("U8",), None)
        try:
            columns = entropy.decompress_columns(stream, rows, cols, bits, bands)
        except entropy.StreamError as error:
            fail(f"stream: {error}")
        if row_scale is None:  # only now: rows is no longer a claim
            row_scale = np.ones(rows, np.float16)
        return cls._packed(columns, bits, shrink, row_scale, col_scale, entropy.Stream(stream, bands))

    @classmethod
    def check_file(cls, stored: Any, rows: int, cols: int, take: Take, fail: Fail) -> None:
        bits, _, has_row_scale, bands = cls._parameters(stored, fail)
        if has_row_scale:
            take("row_scale", ("F16",), (rows,), finite=True)
        take("col_scale", ("F16",), (cols,), finite=True)
        try:
            entropy.check_stream(take("stream", ("U8",), None), rows, cols, bits, bands)
        except entropy.StreamError as error:
            fail(f"stream: {error}")

    @staticmethod
    def _parameters(stored: Any, fail: Fail) -> tuple[int, float, bool, int]:
        names = ("kind", "bits", "shrink", "row_scale", "bands")
        _, bits, shrink, has_row_scale, bands = json_fields(stored, names, "codes", fail)
        bits = json_choice(bits, GRID_BITS, "bits", fail)
        shrink = json_number(shrink, "shrink", fail)
        if not (0.0 <= shrink < 0.5 and float(np.float32(shrink)) == shrink):
            fail(f"shrink={shrink} is not a float32 of 0 or more and less than 0.5")
        if type(has_row_scale) is not bool:
            fail("row_scale is not true or false")
        return bits, shrink, has_row_scale, json_integer(bands, 1, entropy.MAX_BANDS, "bands", fail)

    @classmethod
    def load_cost(cls, stored: Any, rows: int, cols: int) -> LoadCost:
        bits = stored.get("bits")
        packed = rows * packing.packed_bytes(cols, bits if bits in GRID_BITS else max(GRID_BITS))
        # working: the content of the frame, a class, and all columns, with rows rounded up
        working = 4 * (rows + 7) * cols + 16 * cols
        bands = stored.get("bands")
        if bands != 1:  # their bytes, and the places of the rows
            bands = bands if type(bands) is int and 1 < bands <= entropy.MAX_BANDS else entropy.MAX_BANDS
            working += bands * cols + 18 * rows
        return LoadCost(packed + 2 * rows, working, rows * cols)

    @classmethod
    def header_bound(cls, rows: int, cols: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        description = {
            "kind": "grid",
            "bits": max(GRID_BITS),
            "shrink": 0.12345678901234567,
            "row_scale": False,
            "bands": entropy.MAX_BANDS,
        }
        return description, {"stream": (8 * rows * cols,), "row_scale": (rows,), "col_scale": (cols,)}

    def map_arrays(self, function: Callable[[Array], Array]) -> GridCodes:
        # the stream is for files and stays on the host; not made here: most codes that are moved are never written
        stored = vars(self).get("stream") if self.stored is None else self.stored
        return replace(
            self,
            value=function(self.value),
            row_scale=function(self.row_scale),
            col_scale=function(self.col_scale),
            stored=stored,
            exceptions=None if self.exceptions is None else self.exceptions.map_arrays(function),
        )

    def check_read_back(self, read: Codes, fail: Fail) -> None:
        assert isinstance(read, GridCodes)
        if not np.array_equal(read.integers(), self.integers()):
            fail("the stream and the value of its codes differ; make them with GridCodes.from_integers")


@dataclass(frozen=True)
class GridRows(GridCodes):
    """Grid codes in memory of a table that only rows are looked up in: Rice codes, near the entropy of each row.

    The Rice code of a number n >= 0 with parameter k is n >> k zeros, a one and the low k bits of n, from the lowest
    bit up; k is chosen so that there are 15 zeros at most, and then for the fewest bits. A row is the size of what
    follows in bytes, one byte, or 255 and two bytes. A row of zeros has size 0. Any other is a byte of parameters,
    g + 16 s + 128 a, and codes without gaps between them, with zeros at the end to whole bytes:

        a = 0    of each integer that is not zero, in the order of columns: the columns since the one before, with
                 parameter g; a bit, whether it is positive; its size minus 1, with parameter s
        a = 1    of each integer q: 2 q - 1 where it is positive, else -2 q, with parameter g (and s = 0)

    Made by `GridCodes.for_lookup`. CPU kernels read no other columns of it than a whole row's, so that a matmul
    decodes it; GPUs get `GridCodes`.

    Attributes
    ----------
    value : (bytes,) uint8, the rows, then 8 zeros
    row_start : (rows_pad / 32, rounded up) uint32, where every 32nd row begins
    """

    row_start: Array = field(default=None, repr=False, kw_only=True)

    def integers(self) -> NDArray[np.int8]:
        q: NDArray[np.int8] = CPU.module("grid_rows").integers_of(self)
        return q

    def for_gpu(self) -> GridCodes:
        value = _pack_integers(self.integers(), self.bits)
        return GridCodes(self.bits, self.shrink, value, self.row_scale, self.col_scale, self.stored)

    def for_lookup(self) -> GridCodes:
        return self

    @property
    def resident_nbytes(self) -> int:
        return super().resident_nbytes + int(self.row_start.nbytes)

    def map_arrays(self, function: Callable[[Array], Array]) -> GridRows:
        mapped = super().map_arrays(function)
        assert isinstance(mapped, GridRows)
        return replace(mapped, row_start=function(self.row_start))


@dataclass(frozen=True)
class GridPlanes(GridCodes):
    """Grid codes in memory whose integers are nested bit planes: for integers that are small, and many of them zero.

    Made by `GridCodes.for_int8`. CPU kernels multiply int8 activations with it, and decode it for everything else;
    GPUs get `GridCodes`.

    256 columns of a row are a chunk, the last may have less. A chunk is, each followed by the next without a gap and
    zeros at its end to whole bytes,

        a bit for each column, whether its integer is not zero, to a multiple of 64 columns; or, with `fours`, a bit
            for each four columns, whether one of them is not zero, and then a bit for each column of those four
        for s = 1 up to planes - 1, a bit for each integer of at least size s: whether its size is above s
        a bit for each integer that is not zero: whether it is positive

    Sizes above `planes` are exceptions (see `cut`; integers are cut to -planes ... planes).

    Attributes
    ----------
    value : (bytes,) uint8, the chunks, row after row, then 12 zeros
    planes : 1 to 4, the largest size
    fours : whether zeros are marked four at a time
    chunk_start : (rows_pad / 8, rounded up) uint32, where those of every 8th row begin
    chunk_bytes : (rows_pad, chunks) uint8, how many each has
    """

    planes: int = field(default=1, kw_only=True)
    fours: bool = field(default=False, kw_only=True)
    chunk_start: Array = field(default=None, repr=False, kw_only=True)
    chunk_bytes: Array = field(default=None, repr=False, kw_only=True)

    @property
    def base_bits(self) -> int:
        """Bits of the largest size with its sign."""
        return 1 + self.planes.bit_length()

    def integers(self) -> NDArray[np.int8]:
        q: NDArray[np.int8] = CPU.module("grid_planes").integers_of(self)
        return q

    def for_gpu(self) -> GridCodes:
        value = _pack_integers(self.integers(), self.bits)
        return GridCodes(self.bits, self.shrink, value, self.row_scale, self.col_scale, self.stored)

    def for_lookup(self) -> GridCodes:
        return self.for_float().for_lookup()

    is_for_int8: ClassVar[bool] = True

    def for_int8(self) -> GridCodes:
        return self

    def for_float(self) -> GridCodes:
        columns = entropy.Columns(_columns_of(self.integers()), None)
        return GridCodes._packed(columns, self.bits, self.shrink, self.row_scale, self.col_scale, self.stored)

    @property
    def resident_nbytes(self) -> int:
        return super().resident_nbytes + int(self.chunk_start.nbytes + self.chunk_bytes.nbytes)

    def map_arrays(self, function: Callable[[Array], Array]) -> GridPlanes:
        mapped = super().map_arrays(function)
        assert isinstance(mapped, GridPlanes)
        return replace(mapped, chunk_start=function(self.chunk_start), chunk_bytes=function(self.chunk_bytes))


def _columns_of(q: NDArray[Any]) -> NDArray[np.int8]:
    """Integers (rows, cols) as (cols, rows rounded up to a multiple of 8) int8."""
    columns = np.zeros((q.shape[1], -(-q.shape[0] // 8) * 8), np.int8)
    columns[:, : q.shape[0]] = q.T
    return columns


def _pack_integers(q: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """u = q + 2^(bits-1), packed: q (rows, cols) int8 to (rows, bytes) uint8, a few rows at a time."""
    value = np.empty((q.shape[0], packing.packed_bytes(q.shape[1], bits)), np.uint8)
    step = max(1, _CHUNK // q.shape[1])
    for start in range(0, len(q), step):
        u = np.ascontiguousarray(q[start : start + step]).view(np.uint8) + np.uint8(1 << (bits - 1))
        value[start : start + step] = packing.pack(u, bits)
    return value


def _unpack_integers(value: NDArray[np.uint8], bits: int, cols: int) -> NDArray[np.int8]:
    """The inverse of `_pack_integers`: (rows, bytes) uint8 to q (rows, cols) int8."""
    q = np.empty((len(value), cols), np.int8)
    step = max(1, _CHUNK // cols)
    for start in range(0, len(value), step):
        u = packing.unpack(value[start : start + step], bits, cols)
        q[start : start + step] = u.astype(np.int16) - (1 << (bits - 1))
    return q
