"""The steps of docs/add-a-codec.md, followed with a toy codec: one class, one registration, one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rbe_gpu.cpu_fallback import decode

import rbe_gpu as rbe
from rbe_gpu import codecs, transforms
from rbe_gpu.codecs import packing
from rbe_gpu.codecs.base import Codes, EncodeConfig, Sample, Take
from rbe_gpu.container import describe
from rbe_gpu.gpu import decode as launcher
from rbe_gpu.json_checks import Fail, FormatError, json_fields

from . import real

# --- 1. the codec's file ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TernaryCodes(Codes):
    """c[r, k] = scale[r] * (u[r, k] - 1), u = 0, 1 or 2 in two bits.

    value : (rows_pad, cols_pad / 4) uint8, packed; scale : (rows_pad,) float16
    """

    value: Any
    scale: Any
    kind: ClassVar[str] = "ternary"
    array_names: ClassVar[tuple[str, ...]] = ("value", "scale")
    name: ClassVar[str] = "ternary"

    @property
    def arrays(self) -> dict[str, Any]:
        return {"value": self.value, "scale": self.scale}

    def has_size(self, rows: int, cols: int) -> bool:
        return self.value.shape == (rows, packing.packed_bytes(cols, 2))

    def description(self) -> dict[str, Any]:
        return {"kind": "ternary"}

    @classmethod
    def from_file(cls, stored: Any, rows: int, cols: int, take: Take, fail: Fail) -> TernaryCodes:
        json_fields(stored, ("kind",), "codes", fail)
        value = take("value", ("U8",), (rows, packing.packed_bytes(cols, 2)))
        if int(packing.unpack(value, 2, cols).max()) > 2:
            fail("value holds the code 3")
        return cls(value, take("scale", ("F16",), (rows,), finite=True))

    @classmethod
    def header_bound(cls, rows: int, cols: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        return {"kind": "ternary"}, {"value": (rows, packing.packed_bytes(cols, 2)), "scale": (rows,)}

    @classmethod
    def candidates(cls) -> Iterator[EncodeConfig]:
        yield TernaryConfig(2)


@dataclass(frozen=True)
class TernaryConfig(EncodeConfig):
    @property
    def name(self) -> str:
        return "ternary"

    def quantize(self, c: np.ndarray) -> TernaryCodes:
        q, scale = _ternary(c)
        return TernaryCodes(packing.pack(q + 1, 2), scale)

    def nbytes(self, rows: int, cols: int) -> int:
        return rows * (packing.packed_bytes(cols, 2) + 2)

    def squared_error(self, sample: Sample) -> float:
        q, scale = _ternary(sample.coefficients)
        return float(((sample.coefficients - q * scale[:, None].astype(np.float64)) ** 2).sum())


def _ternary(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers -1, 0, 1 and float16 row scales: zero below 0.7 of the mean magnitude (Li et al. 2016)."""
    magnitude = np.abs(c)
    large = magnitude > 0.7 * magnitude.mean(axis=1, keepdims=True)
    scale = (magnitude * large).sum(axis=1) / np.maximum(large.sum(axis=1), 1)
    return (np.sign(c) * large).astype(np.int64), scale.astype(np.float16)


# --- 2. and 3. the registration, and a kernel ---------------------------------------------------------


def _expand(weight: Any, codes: Any, rows: Any, first: int, out: np.ndarray, ws: Any) -> None:
    index = np.minimum(np.arange(first, first + len(out)) if rows is None else rows, weight.rows_pad - 1)
    q = packing.unpack(codes.value[index], 2, weight.cols_pad).astype(np.float32) - 1
    out[...] = np.float32(weight.gain) * codes.scale[index, None].astype(np.float32) * q


@pytest.fixture
def ternary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    codecs.register(TernaryCodes)
    monkeypatch.setitem(decode.EXPAND, TernaryCodes, _expand)
    yield
    del codecs.CODECS["ternary"]


@pytest.fixture
def weight() -> np.ndarray:
    return np.ascontiguousarray(real.layer(0, "attention.self.query.weight")[:130, :200])


def decoded(m: Any) -> np.ndarray:
    """W by the definition, in float64."""
    s = transforms.synthesis(m.transform, m.block)
    c = (packing.unpack(m.codes.value, 2, m.cols_pad).astype(float) - 1) * m.codes.scale[:, None].astype(
        float
    )
    blocks = c.reshape(m.rows_pad // m.block, m.block, m.cols_pad // m.block, m.block)
    w = m.gain * np.einsum("ri,aibj,cj->arbc", s, blocks, s).reshape(m.rows_pad, m.cols_pad)
    return w[: m.rows, : m.cols]


@pytest.mark.usefixtures("ternary")
def test_compress_save_load_decode(weight: np.ndarray, tmp_path: Path) -> None:
    m = rbe.compress(weight, codes="ternary", transform="dct", basis=False)
    assert isinstance(m.codes, TernaryCodes)
    assert m.nbytes == 192 * (64 + 2)
    rbe.save_file(tmp_path / "a", {"w": m})
    loaded = rbe.load_file(tmp_path / "a")[0]["w"]
    for name, array in m.arrays.items():
        assert loaded.arrays[name].tobytes() == array.tobytes()
    rbe.save_file(tmp_path / "b", {"w": loaded})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert describe(tmp_path / "a").tensors[0].codes == "ternary"
    np.testing.assert_allclose(loaded.decode(), decoded(m), atol=1e-6)
    np.testing.assert_array_equal(rbe.embedding(np.array([129, 0]), loaded), loaded.decode()[[129, 0]])


@pytest.mark.usefixtures("ternary")
def test_linear_multiplies_decoded_panels(weight: np.ndarray) -> None:
    """With a kernel for `decode` alone; what needs kernels of its own says so."""
    m = rbe.compress(weight, codes="ternary", basis=False)
    for tokens in (1, 3, 65):
        x = np.resize(real.activations(65), (tokens, 200))
        np.testing.assert_allclose(rbe.linear(x, m), x @ decoded(m).T, atol=1e-4)
        assert rbe.RBELinear(m).plan(tokens).algorithm == "decode"
        with pytest.raises(NotImplementedError, match=r"method='transform' cannot .*operand\.py"):
            rbe.linear(x, m, method="transform")
    with pytest.raises(NotImplementedError, match="no CUDA kernel decodes ternary codes"):
        launcher.launches(m, np.empty(m.shape, np.float32), rbe.Workspace())


def test_a_codec_without_a_kernel_is_an_error_that_says_so(weight: np.ndarray, monkeypatch: Any) -> None:
    m = rbe.compress(weight, codes="dense-int4")
    monkeypatch.setattr(decode, "EXPAND", {})
    with pytest.raises(NotImplementedError, match="no CPU kernel decodes dense codes"):
        m.decode()


@pytest.mark.usefixtures("ternary")
def test_the_search_knows_it(weight: np.ndarray) -> None:
    m = rbe.compress(weight, ratio=8, codes="ternary")
    assert m.codes.name == "ternary"
    assert m.ratio >= 8
    with pytest.raises(ValueError, match="out of reach of ternary"):
        rbe.compress(weight, grade="A", codes="ternary")
    with pytest.raises(ValueError, match="needs sparse codes"):
        rbe.compress(weight, density=0.5, codes="ternary")


@pytest.mark.usefixtures("ternary")
def test_the_reader_checks_it(weight: np.ndarray, tmp_path: Path) -> None:
    m = rbe.compress(weight, codes="ternary")
    m.codes.value[3, 5] = 0xFF
    with pytest.raises(FormatError, match="the code 3"):
        rbe.save_file(tmp_path / "a", {"w": m})


def test_without_it(weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match="unknown codes 'ternary'"):
        rbe.compress(weight, codes="ternary")


def test_registration_is_checked() -> None:
    class Unfinished(TernaryCodes):
        description = Codes.description

    with pytest.raises(TypeError, match="Unfinished does not define description"):
        codecs.register(Unfinished)
    with pytest.raises(ValueError, match="'dense' is registered already"):
        codecs.register(rbe.DenseCodes)
