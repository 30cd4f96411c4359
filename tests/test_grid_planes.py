"""Grid codes as nested bit planes: the same bits as of packed codes, in less memory."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from rbe_gpu.cpu_fallback import bit_planes, grid_planes, isa

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.codecs import GridCodes
from rbe_gpu.codecs.grid import GridPlanes
from rbe_gpu.container import to_bytes
from rbe_gpu.layers import RBEFFN

from . import real
from .compressed import few_integers, with_integers

MODELS = Path(__file__).parents[1] / "reports" / "models"
pytestmark = pytest.mark.skipif(
    not bit_planes.moves_bits(isa.active(), isa.host()),
    reason="the processor does not deposit bits in a few cycles",
)


def _special(cols: int) -> np.ndarray:
    """Integers of which a mistake at the end of a mask, a chunk or a byte would show."""
    q = np.zeros((19, cols), np.int8)
    q[0, 0], q[1, -1] = -1, 1
    for row, lane in enumerate((31, 32, 63, 64, 255, 256)):
        q[2 + row, min(lane, cols - 1)] = 1 if row % 2 else -1
    q[8, :64] = 1  # all 64 bits of a mask
    q[9, :64] = -1
    q[10] = np.where(np.arange(cols) % 2, 2, -2)
    q[11, ::5] = np.resize([-128, 127, 3, -4, 5], len(q[11, ::5]))
    q[12] = 1
    return q


INTEGERS = {
    "a tenth": few_integers((130, 384), 0.1),
    "a fifth, of one size": few_integers((70, 1536), 0.2, -1, 1),
    "a third, with exceptions": few_integers((65, 1536), 0.3),
    "a half": few_integers((128, 384), 0.5, -3, 3),
    "32 columns": few_integers((33, 32), 0.2),
    "96 columns": few_integers((33, 96), 0.3, -2, 2),
    "ends": _special(384),
    "ends of 288 columns": _special(288),
    "zeros": np.zeros((9, 96), np.int8),
}
FORMS = {
    "matrix": {},
    "block 32": {"block": 32},
    "dct": {"transform": "dct"},
    "vectors": {"kind": "vectors", "block": 32},
}


def _planes(q: np.ndarray, **form: Any) -> tuple[Any, Any]:
    packed = with_integers(q, **form)
    with mock.patch.object(grid_planes, "_WORTH", 9):  # whatever it saves
        planes = packed.for_int8()
    assert type(planes.codes) is GridPlanes
    return packed, planes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", INTEGERS)
def test_results_are_those_of_packed_codes(name: str, form: str) -> None:
    """Bit for bit with int8 activations, of a few tokens and of many; decoded too."""
    packed, planes = _planes(INTEGERS[name], **FORMS[form])
    assert planes.resident_nbytes < packed.resident_nbytes
    np.testing.assert_array_equal(planes.codes.integers(), packed.codes.integers())
    np.testing.assert_array_equal(planes.decode(), packed.decode())
    for tokens in (1, 3, 4, 8, 9, 70):
        x = np.resize(real.activations(tokens), (tokens, packed.cols))
        y = rbe.linear(x, planes, activation_bits=8)
        np.testing.assert_array_equal(y, rbe.linear(x, packed, activation_bits=8))
    expected = reference.linear(x, planes)
    assert np.abs(rbe.linear(x, planes) - expected).max() <= 1e-5 * max(1e-30, np.abs(expected).max())


def test_all_forms_are_there() -> None:
    """Several numbers of planes, with zeros marked one and four at a time, with exceptions and without."""
    made = [_planes(q)[1].codes for q in INTEGERS.values()]
    assert {c.planes for c in made} >= {1, 2, 3}
    assert {c.fours for c in made} == {False, True}
    assert {c.exceptions is None for c in made} == {False, True}


@pytest.mark.parametrize("planes", range(1, bit_planes.MOST_PLANES + 1))
def test_every_number_of_planes(planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced, with exceptions of all sizes."""
    monkeypatch.setattr(grid_planes, "range", lambda *_: [planes], raising=False)
    q = few_integers((70, 384), 0.6)
    packed, held = _planes(q)
    assert held.codes.planes == planes
    np.testing.assert_array_equal(held.codes.integers(), packed.codes.integers())
    for tokens in (1, 9):
        x = real.activations(tokens)
        y = rbe.linear(x, held, activation_bits=8)
        np.testing.assert_array_equal(y, rbe.linear(x, packed, activation_bits=8))


def test_without_the_instruction(tmp_path: Path) -> None:
    """Codes that another processor made: `deposit` is a loop."""
    packed, planes = _planes(INTEGERS["a third, with exceptions"])
    x = real.activations(9)
    x = np.resize(x, (9, packed.cols))
    expected = rbe.linear(x, packed, activation_bits=8)
    (tmp_path / "codes").write_bytes(pickle.dumps((planes, packed.codes.integers(), x, expected)))
    script = f"""
import pickle
import numpy as np
import rbe_gpu as rbe
from rbe_gpu.cpu_fallback import isa
assert not isa.active().has("bmi2")
with open({str(tmp_path / "codes")!r}, "rb") as f:
    planes, integers, x, expected = pickle.load(f)
np.testing.assert_array_equal(planes.codes.integers(), integers)
y = rbe.linear(x, planes, activation_bits=8)
assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
"""
    env = os.environ | {"RBE_ISA": "sse2"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1], env=env)


@pytest.mark.parametrize(("cpu", "features", "moves"), [
    ("znver3", {"bmi2"}, True), ("znver2", {"bmi2"}, False), ("x86-64", set(), False),
])  # fmt: skip
def test_processors(cpu: str, features: set[str], moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the instructions are slow or missing codes stay packed, whatever kernels are compiled for."""
    here = isa.Isa("host", "x86_64-unknown-linux-gnu", cpu, frozenset(features))
    target = here if "bmi2" not in features else isa.ISAS["avx2"]
    assert bit_planes.moves_bits(target, here) == moves
    assert not bit_planes.moves_bits(isa.ISAS["neon"], here)
    if not moves:
        monkeypatch.setattr(isa, "active", lambda: target)
        monkeypatch.setattr(isa, "host", lambda: here)
        packed = with_integers(INTEGERS["a tenth"])
        assert packed.for_int8() is packed


def test_what_would_gain_little_stays() -> None:
    for weight in (
        with_integers(few_integers((130, 384), 0.9)),
        with_integers(INTEGERS["a tenth"], shrink=0.125),  # takes no int8 activations
        rbe.compress(real.layer(0, "output.dense.weight"), codes="dense-int4"),
    ):
        assert weight.for_int8() is weight
    packed, planes = _planes(INTEGERS["a tenth"])
    assert planes.for_int8() is planes
    for name in ("_MOST_BYTES", "_MOST_COLUMNS"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grid_planes, name, 383)
            assert packed.for_int8() is packed


def test_a_file_of_them_is_that_of_packed_codes() -> None:
    packed, planes = _planes(INTEGERS["a tenth"])
    assert to_bytes({"w": planes}) == to_bytes({"w": packed})


def test_gpus_and_tables_get_their_own_codes() -> None:
    packed, planes = _planes(INTEGERS["a third, with exceptions"])
    codes = planes.codes.for_gpu()
    assert type(codes) is GridCodes
    assert codes.exceptions is None
    np.testing.assert_array_equal(codes.value, packed.codes.for_gpu().value)
    assert planes.for_lookup().resident_nbytes == packed.for_lookup().resident_nbytes


def test_copies() -> None:
    _, planes = _planes(INTEGERS["a third, with exceptions"])
    copied = replace(planes, codes=planes.codes.map_arrays(np.copy))
    assert type(copied.codes) is GridPlanes
    assert copied.codes.chunk_bytes is not planes.codes.chunk_bytes
    np.testing.assert_array_equal(copied.decode(), planes.decode())


def test_a_layer_converts_when_it_multiplies() -> None:
    packed = with_integers(INTEGERS["a tenth"])
    x = real.activations(3)
    assert rbe.RBELinear(packed, activation_bits=8).weight is packed
    assert rbe.RBELinear(packed, for_int8=True).weight is packed
    layer = rbe.RBELinear(packed, activation_bits=8, for_int8=True)
    expected = rbe.RBELinear(packed, activation_bits=8)(x)
    np.testing.assert_array_equal(layer(x), expected)
    assert type(layer.weight.codes) is GridPlanes
    assert layer.nbytes < packed.resident_nbytes
    planes = layer.weight
    layer.activation_bits = None  # and back, where x is not rounded
    assert type(layer.weight.codes) is GridCodes
    np.testing.assert_array_equal(layer.weight.codes.value, packed.codes.value)
    assert layer.weight.resident_nbytes == packed.resident_nbytes
    np.testing.assert_array_equal(rbe.RBELinear(planes, for_int8=True)(x), rbe.RBELinear(packed)(x))
    layer.weight = packed
    assert layer.weight is packed
    layer = rbe.RBELinear(packed, activation_bits=8, for_int8=True)
    layer.keep_codes()
    assert layer.weight is packed
    up = with_integers(few_integers((1536, 384), 0.1))
    down = with_integers(few_integers((384, 1536), 0.1))
    ffn = RBEFFN(*(rbe.RBELinear(w, activation_bits=8, for_int8=True) for w in (up, down)), activation="gelu")
    ffn(x)
    assert {type(part.weight.codes) for part in (ffn.up, ffn.down)} == {GridPlanes}


def test_printing_a_layer_converts_nothing() -> None:
    packed = with_integers(INTEGERS["a tenth"])
    layer = rbe.RBELinear(packed, activation_bits=8, for_int8=True)
    assert repr(packed) in repr(layer)
    assert layer._weight is packed


def test_threads_convert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    convert = GridCodes.for_int8

    def slow(codes: GridCodes) -> GridCodes:
        made.append(codes)
        time.sleep(0.05)
        return convert(codes)

    monkeypatch.setattr(GridCodes, "for_int8", slow)
    layer = rbe.RBELinear(with_integers(INTEGERS["a tenth"]), activation_bits=8, for_int8=True)
    with ThreadPoolExecutor(4) as pool:
        weights = list(pool.map(lambda _: layer.weight, range(8)))
    assert len(made) == 1
    assert all(weight is weights[0] for weight in weights)


def test_models_share_what_both_round() -> None:
    model = rbe.load(MODELS / "minilm-r50.rbe.safetensors")
    some = model.with_int8_activations(sorted(model.int8_activations)[:5])
    shared = [
        a.query.weight is b.query.weight for (a, *_), (b, *_) in zip(model.layers, some.layers, strict=True)
    ]
    assert any(shared)
    assert not all(shared)
    plain = some.with_int8_activations(())
    assert {type(layer[2].up.weight.codes) for layer in plain.layers} == {GridCodes}


@pytest.mark.parametrize(("ratio", "most"), [(16, 1.28), (24, 1.25), (32, 1.25), (50, 1.25)])
def test_a_small_encoder_takes_little_more_memory_than_its_file(
    ratio: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most `most` times the bytes, and packed codes of linear layers take more. The vectors have the same bits."""
    path, texts = MODELS / f"minilm-r{ratio}.rbe.safetensors", real.texts()[:8]
    model = rbe.load(path)
    vectors = model.embed(texts)
    assert model.nbytes <= most * path.stat().st_size
    monkeypatch.setattr(GridCodes, "for_int8", lambda self: self)
    packed = rbe.load(path)
    np.testing.assert_array_equal(packed.embed(texts), vectors)
    assert packed.nbytes > most * path.stat().st_size


def test_loading_converts_nothing() -> None:
    script = f"""
import rbe_gpu as rbe
from rbe_gpu.codecs.grid import GridPlanes
model = rbe.load({str(MODELS / "minilm-r32.rbe.safetensors")!r})
parts = [part for layer in model.layers for part in (layer[0].query, layer[2].up, layer[2].down)]
assert not any(type(part._weight.codes) is GridPlanes for part in parts)
model.embed(["a text"])
assert any(type(part._weight.codes) is GridPlanes for part in parts)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
