"""The choice of the matmul algorithm: what it costs, what is chosen, and that `linear` runs it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rbe_gpu.cpu_fallback import linear as cpu
from rbe_gpu.cpu_fallback import matmul_algorithms, matmul_costs
from rbe_gpu.cpu_fallback.matmul_costs import MatmulCosts
from typer.testing import CliRunner

import rbe_gpu as rbe
from rbe_gpu import tuning
from rbe_gpu.cli import app
from rbe_gpu.gpu import linear as gpu
from rbe_gpu.matmul import METHODS, MatmulAlgorithms

from . import real
from .compressed import FORMS, compressed, gridded, relative

F32 = np.dtype(np.float32)
DTYPES = {"float32": F32, "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture
def own_costs(tmp_path, monkeypatch):
    """A costs file of the test's own; costs read before are forgotten, before and after the test."""
    file = tmp_path / "deep" / "costs.json"
    monkeypatch.setenv("RBE_GPU_COSTS", str(file))
    matmul_costs.costs.cache_clear()
    yield file
    matmul_costs.costs.cache_clear()


def _store(file, costs, machine=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine or matmul_costs.machine(), **asdict(costs)}))
    matmul_costs.costs.cache_clear()


def _threads(monkeypatch, count):
    monkeypatch.setattr(matmul_algorithms, "num_threads", lambda: count)


# --- the choice ---------------------------------------------------------------------------------------

#: Algorithms by weight, tokens, threads, cache, method and dtype: one letter per number of tokens.
RECORDED = json.loads((Path(__file__).parent / "matmul_choices.json").read_text())
CPU_NAMES = {"v": "transform_matvec", "t": "transform_tiles", "d": "decode", "c": "cache"}
GPU_NAMES = {
    **{"q": "codes_dot", "s": "sparse_dot", "f": "codes_mma_few", "m": "codes_mma", "t": "transform_tiles"},
    **{"d": "decode", "c": "cache", "w": "dense_dot", "D": "dense_tiles"},
}


def _rows(choices: dict[str, list[str]]) -> Iterator[tuple[Any, str]]:
    for algorithms, forms in choices.items():
        for form in forms:
            dense = form.startswith("dense")
            yield np.zeros((96, 128), DTYPES[form[6:]]) if dense else compressed(form), algorithms


@pytest.mark.parametrize("setting", RECORDED["cpu"])
def test_choices_of_the_cpu(setting, monkeypatch):
    options = dict(o.split("=") for o in setting.split(", ") if "=" in o)
    method = options.get("method")
    _threads(monkeypatch, int(options.get("threads", 1)))
    for m, expected in _rows(RECORDED["cpu"][setting]):
        cache = None
        if "cache of" in setting:
            cache = rbe.PanelCache(int(float(setting.split()[-1]) * m.dense_nbytes))
        elif method == "cache":
            cache = rbe.PanelCache(1 << 20)
        chosen = [cpu.ALGORITHMS.choose(m, n, F32, cache, method).name for n in RECORDED["tokens"]]
        assert chosen == [CPU_NAMES[letter] for letter in expected], m


def test_choices_of_the_cpu_for_dense_weights():
    w = np.zeros((96, 128), np.float32)
    for n in RECORDED["tokens"]:
        assert cpu.ALGORITHMS.choose(w, n, F32).name == ("dense_matvec" if n <= 4 else "dense_tiles")
    assert cpu.ALGORITHMS.choose(w[:, :0], 100, F32).name == "dense_matvec"


@pytest.mark.parametrize("setting", RECORDED["gpu"])
def test_choices_of_a_gpu(setting):
    dtype, method, cached = setting.split(", ")
    method = None if method == "method=None" else method[len("method=") :]
    cache = rbe.PanelCache(1 << 30) if cached == "cache" else None
    for m, expected in _rows(RECORDED["gpu"][setting]):
        chosen = [gpu.ALGORITHMS.choose(m, n, DTYPES[dtype], cache, method).name for n in RECORDED["tokens"]]
        assert chosen == [GPU_NAMES[letter] for letter in expected], m


@pytest.mark.parametrize("algorithms", [cpu.ALGORITHMS, gpu.ALGORITHMS], ids=["cpu", "gpu"])
def test_every_algorithm_runs_or_gives_a_reason(algorithms: MatmulAlgorithms):
    names = [a.name for a in algorithms]
    assert len(set(names)) == len(names)
    cache = rbe.PanelCache(1 << 20)
    used = set()
    grid = gridded(np.ones((64, 64), np.float32), 4, shrink=0.0, transform="none")
    for m in (np.zeros((64, 64), np.float32), grid, *map(compressed, FORMS)):
        for tokens in (1, 4, 5, 16, 17, 33, 500):
            for dtype in DTYPES.values():
                supported = algorithms.supported(m, tokens, dtype, cache)
                assert supported
                rounded = algorithms.supported(m, tokens, dtype, activation_bits=8)
                for algorithm in algorithms:
                    runs, reason = algorithm.supports(m, tokens, dtype)
                    assert runs == (
                        algorithm in (supported if algorithm.activation_bits is None else rounded)
                    )
                    assert runs == (not reason)
                    if runs:
                        used.add(algorithm.name)
                        assert algorithm.cost(m, tokens, dtype, cache) >= 0
    assert used == set(names)


# --- costs --------------------------------------------------------------------------------------------


def _costs(m, tokens, cache=None):
    return cpu.ALGORITHMS.plan(m, tokens, F32, cache).costs


def test_costs_grow_with_the_batch(monkeypatch):
    m = compressed("dct int4 b128")
    cache = rbe.PanelCache(m.dense_nbytes)
    for threads in (1, 8):
        _threads(monkeypatch, threads)
        small, large = _costs(m, 5, cache), _costs(m, 4096, cache)
        assert set(small) == set(large) == {"transform_tiles", "decode", "cache"}
        assert all(0 < small[name] < large[name] < 60 for name in small)
        assert 0 < _costs(m, 1)["transform_matvec"] < small["transform_tiles"]
    assert set(_costs(m, 5)) == {"transform_tiles", "decode"}


def test_fewer_entries_cost_less():
    w = real.layer(0, "intermediate.dense.weight")
    few, many = (rbe.compress(w, density=density) for density in (0.05, 0.5))
    assert _costs(few, 128)["transform_tiles"] < _costs(many, 128)["transform_tiles"]


def test_a_cache_that_holds_everything_beats_decoding():
    m = compressed("dct int4 b128")
    whole, half = (_costs(m, 64, rbe.PanelCache(int(share * m.dense_nbytes))) for share in (1.0, 0.5))
    assert whole["cache"] < half["cache"] < whole["decode"]


# --- method= ------------------------------------------------------------------------------------------


def test_a_method_and_its_errors():
    m = compressed("dct int4 b128")
    for algorithms in (cpu.ALGORITHMS, gpu.ALGORITHMS):
        assert algorithms.plan(m, 64, F32, method="decode").method == "decode"
        with pytest.raises(ValueError, match="unknown method 'fast'"):
            algorithms.plan(m, 64, F32, method="fast")
        with pytest.raises(ValueError, match="needs a cache"):
            algorithms.plan(m, 64, F32, method="cache")
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        rbe.RBELinear(m, method="fast")
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        rbe.linear(np.ones((2, m.shape[1]), np.float32), m, method="fast")
    for rows, weight in (
        (0, m),
        (2, np.ones((4, m.shape[1]), np.float32)),
    ):  # also where there is nothing to choose
        x = np.ones((rows, m.shape[1]), np.float32)
        with pytest.raises(ValueError, match="unknown method 'fast'"):
            rbe.linear(x, weight, method="fast")
        with pytest.raises(ValueError, match="needs a cache"):
            rbe.linear(x, weight, method="cache")


def test_the_plan_of_a_layer():
    m = compressed("dct int4 b128")
    layer = rbe.RBELinear(m)
    assert layer.plan(64) == cpu.ALGORITHMS.plan(m, 64, F32)
    assert (layer.plan(64).algorithm, layer.plan(64).method) == ("transform_tiles", "transform")
    decoding = rbe.RBELinear(m, method="decode").plan(64)
    assert decoding.method == "decode"
    assert decoding.costs == layer.plan(64).costs
    assert "cache" in rbe.RBELinear(m, cache=1 << 20).plan(64).costs
    with pytest.raises(TypeError, match="dense"):
        rbe.RBELinear(np.ones((4, 4), np.float32)).plan(1)


@pytest.mark.parametrize(
    "form", ["dct int4 b128", "none int4 delta", "grid int4 dwt basis", "vectors int4 b64"]
)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_every_method_gives_the_same(form, tokens):
    m = compressed(form)
    x = np.ascontiguousarray(np.tile(real.activations(tokens), (1, 4))[:, : m.shape[1]])
    expected = rbe.reference.linear(x, m)
    cache = rbe.PanelCache(m.dense_nbytes)
    for method in METHODS:
        for _ in range(2):  # the second time from the cache
            y = rbe.linear(x, m, method=method, cache=cache)
            assert relative(y, expected) < 1e-5, method


def _input_transforms(monkeypatch):
    """A list that grows by the transform of every input that is computed."""
    computed = []
    matmul_tiles = cpu.matmul_tiles

    def counted(call, a, threads):
        if a.pending:
            computed.append(a)
        matmul_tiles(call, a, threads)

    monkeypatch.setattr(cpu, "matmul_tiles", counted)
    return computed


@pytest.mark.parametrize("method", ["transform", "decode"])
def test_matmuls_share_a_prepared_input(method, monkeypatch):
    names = [f"attention.self.{n}.weight" for n in ("query", "key", "value")]
    weights = [
        rbe.compress(real.layer(0, n), codes="dense-int4", transform="dct", basis=False) for n in names
    ]
    x = real.activations(20)
    expected = [rbe.linear(x, w, method=method) for w in weights]
    computed = _input_transforms(monkeypatch)
    for workspace in (None, rbe.Workspace()):
        computed.clear()
        inputs = rbe.prepare_input(x, workspace)
        for w, y in zip(weights, expected, strict=True):
            np.testing.assert_array_equal(rbe.linear(inputs, w, method=method, workspace=workspace), y)
        assert len(computed) == 1


def test_other_matmuls_between_those_of_a_prepared_input(monkeypatch):
    """They overwrite the scratch memory, so that what was in it is computed again."""
    m, other = compressed("dct int4 b128"), compressed("dct f16 bitmap")
    x, y = real.activations(20)[:, : m.cols].copy(), real.activations(30)[:, : other.cols].copy()
    expected = rbe.linear(x, m)
    workspace = rbe.Workspace()
    inputs, others = rbe.prepare_input(x, workspace), rbe.prepare_input(y, workspace)
    computed = _input_transforms(monkeypatch)
    for between in (y, y[:20].copy(), others):
        for _ in range(2):
            np.testing.assert_array_equal(rbe.linear(inputs, m, workspace=workspace), expected)
        rbe.linear(between, other, workspace=workspace)
    np.testing.assert_array_equal(rbe.linear(inputs, m), expected)
    assert len(computed) == 3 + 3 + 1


def test_a_workspace_keeps_no_prepared_input_alive():
    m, workspace = compressed("dct int4 b128"), rbe.Workspace()
    x = real.activations(20)[:, : m.cols].copy()
    rbe.linear(rbe.prepare_input(x, workspace), m, workspace=workspace)
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_prepared_input_is_checked():
    w = np.ones((2, 4), np.float32)
    with pytest.raises(TypeError, match="numpy or cupy array"):
        rbe.prepare_input([1.0])
    with pytest.raises(TypeError, match="use float32"):
        rbe.linear(rbe.prepare_input(np.zeros((3, 4), np.int32)), w)
    with pytest.raises(ValueError, match="ascontiguousarray"):
        rbe.linear(rbe.prepare_input(np.zeros((3, 8), np.float32)[:, ::2]), w)


def test_linear_follows_the_plan(own_costs, monkeypatch):
    """Where transforms are expensive, panels are decoded; where they are cheap, nothing is."""
    decoded = []
    decode_rows = cpu.decode_rows
    monkeypatch.setattr(cpu, "decode_rows", lambda *args: decoded.append(1) or decode_rows(*args))
    x = real.activations(20)
    w = real.layer(0, "attention.self.query.weight")
    _store(own_costs, replace(MatmulCosts(), transform=1e6))
    rbe.linear(x, rbe.compress(w, codes="dense-int4"))
    assert decoded
    decoded.clear()
    _store(own_costs, replace(MatmulCosts(), transform=1e-3))
    m = rbe.compress(w, codes="dense-int4")
    rbe.linear(x, m)
    assert not decoded
    _store(own_costs, replace(MatmulCosts(), transform=1e6))  # as `tune` does
    assert rbe.RBELinear(m).plan(20).method == "decode"
    rbe.linear(x, m)
    assert decoded


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "{", '{"machine": 3}', '"text"', "null"],
)
def test_a_broken_costs_file_is_ignored(own_costs, text):
    own_costs.parent.mkdir()
    own_costs.write_text(text)
    matmul_costs.costs.cache_clear()
    assert matmul_costs.costs() == MatmulCosts()


def test_costs_of_another_machine_are_ignored(own_costs):
    other = replace(MatmulCosts(), dense=9.0)
    _store(own_costs, other, machine="another one")
    assert matmul_costs.costs() == MatmulCosts()
    _store(own_costs, other)
    assert matmul_costs.costs() == other
    _store(own_costs, replace(other, dense=-1.0))
    assert matmul_costs.costs() == MatmulCosts()


def test_tune_stores_what_it_measured(own_costs, monkeypatch):
    """The measurement, on small matrices; then the command."""
    monkeypatch.setattr(tuning, "SIZE", 128)
    monkeypatch.setattr(tuning, "_ROUNDS", 1)
    seen = []
    measured = tuning.tune(lambda name, value: seen.append(name))
    assert sorted(seen) == sorted(asdict(measured))
    assert all(value > 0 for value in asdict(measured).values())
    assert matmul_costs.costs() == measured
    result = CliRunner().invoke(app, ["tune", "--json"])
    assert result.exit_code == 0, result.output
    stored = json.loads(result.stdout)
    assert stored["file"] == str(own_costs)
    assert matmul_costs.costs().dense == stored["dense"]
    assert "entry_vector" in CliRunner().invoke(app, ["tune"]).output
