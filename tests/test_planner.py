"""The planner: what it estimates, what it picks, and that products follow it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from typer.testing import CliRunner

import rbe_gpu as rbe
from rbe_gpu import planner, tuning
from rbe_gpu.cli import app

from . import real
from .compressed import compressed, relative


@pytest.fixture
def own_costs(tmp_path, monkeypatch):
    """A place of its own for the numbers; what was read before is forgotten, before and after."""
    file = tmp_path / "deep" / "costs.json"
    monkeypatch.setenv("RBE_GPU_COSTS", str(file))
    planner.costs.cache_clear()
    yield file
    planner.costs.cache_clear()


def _store(file, costs, machine=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine or planner.machine(), **asdict(costs)}))
    planner.costs.cache_clear()


def test_every_way_has_an_estimate_that_grows_with_the_batch():
    m = compressed("dct int4 b128")
    cache = rbe.PanelCache(m.dense_nbytes)
    for threads in (1, 8):
        small, large = (planner.plan(m, n, threads, cache).seconds for n in (1, 4096))
        assert set(small) == set(planner.METHODS)
        assert all(0 < small[name] < large[name] < 60 for name in small)
    assert set(planner.plan(m, 5, 1).seconds) == {"transform", "decode"}


def test_fewer_entries_cost_less():
    w = real.layer(0, "intermediate.dense.weight")
    few, many = (rbe.compress(w, kept=kept) for kept in (0.05, 0.5))
    assert planner.seconds(few, 128, 1)["transform"] < planner.seconds(many, 128, 1)["transform"]


def test_a_cache_that_holds_everything_beats_decoding():
    m = compressed("dct int4 b128")
    held, half = (planner.seconds(m, 64, 2, share) for share in (1.0, 0.5))
    assert held["cache"] < half["cache"] < held["decode"]


def test_the_override_and_its_errors():
    m = compressed("dct int4 b128")
    assert planner.plan(m, 64, 1, method="decode").method == "decode"
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        planner.plan(m, 64, 1, method="fast")
    with pytest.raises(ValueError, match="needs a cache"):
        planner.plan(m, 64, 1, method="cache")
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        rbe.RBELinear(m, method="fast")
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        rbe.linear(np.ones((2, m.shape[1]), np.float32), m, method="fast")
    for rows, weight in (
        (0, m),
        (2, np.ones((4, m.shape[1]), np.float32)),
    ):  # also where nothing is to choose
        x = np.ones((rows, m.shape[1]), np.float32)
        with pytest.raises(ValueError, match="unknown method 'fast'"):
            rbe.linear(x, weight, method="fast")
        with pytest.raises(ValueError, match="needs a cache"):
            rbe.linear(x, weight, method="cache")


def test_the_plan_of_a_layer():
    m = compressed("dct int4 b128")
    layer = rbe.RBELinear(m)
    assert layer.plan(64) == planner.plan(m, 64, rbe.get_num_threads())
    assert rbe.RBELinear(m, method="decode").plan(64).method == "decode"
    assert "cache" in rbe.RBELinear(m, cache=1 << 20).plan(64).seconds
    with pytest.raises(TypeError, match="dense"):
        rbe.RBELinear(np.ones((4, 4), np.float32)).plan(1)


@pytest.mark.parametrize(
    "form", ["dct int4 b128", "none int4 delta", "grid int4 dwt basis", "vectors int4 b64"]
)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_every_way_gives_the_same(form, tokens):
    m = compressed(form)
    x = np.ascontiguousarray(np.tile(real.activations(tokens), (1, 4))[:, : m.shape[1]])
    expected = rbe.reference.linear(x, m)
    cache = rbe.PanelCache(m.dense_nbytes)
    for method in planner.METHODS:
        for _ in range(2):  # the second time from the cache
            y = rbe.linear(x, m, method=method, cache=cache)
            assert relative(y, expected) < 1e-5, method


def test_products_follow_the_plan(own_costs, monkeypatch):
    """Where transforms are dear, panels are decoded; where they are not, nothing is."""
    from rbe_gpu.cpu_fallback import linear

    decoded = []
    decode_rows = linear.decode_rows
    monkeypatch.setattr(linear, "decode_rows", lambda *args: decoded.append(1) or decode_rows(*args))
    x = real.activations(20)
    w = real.layer(0, "attention.self.query.weight")
    _store(own_costs, replace(planner.Costs(), transform=1e6))
    rbe.linear(x, rbe.compress(w, codes="dense-int4"))
    assert decoded
    decoded.clear()
    _store(own_costs, replace(planner.Costs(), transform=1e-3))
    m = rbe.compress(w, codes="dense-int4")
    rbe.linear(x, m)
    assert not decoded
    _store(own_costs, replace(planner.Costs(), transform=1e6))  # as `tune` does, in the middle of a process
    assert rbe.RBELinear(m).plan(20).method == "decode"
    rbe.linear(x, m)
    assert decoded


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "{", '{"machine": 3}', '"text"', "null"],
)
def test_a_broken_file_of_costs_is_as_none(own_costs, text):
    own_costs.parent.mkdir()
    own_costs.write_text(text)
    planner.costs.cache_clear()
    assert planner.costs() == planner.Costs()


def test_costs_of_another_machine_do_not_count(own_costs):
    other = replace(planner.Costs(), dense=9.0)
    _store(own_costs, other, machine="another one")
    assert planner.costs() == planner.Costs()
    _store(own_costs, other)
    assert planner.costs() == other
    _store(own_costs, replace(other, dense=-1.0))
    assert planner.costs() == planner.Costs()


def test_tune_keeps_what_it_measured(own_costs, monkeypatch):
    """The measuring itself, on matrices so small that it takes a moment; then the command."""
    monkeypatch.setattr(tuning, "SIZE", 128)
    monkeypatch.setattr(tuning, "_ROUNDS", 1)
    seen = []
    found = planner.tune(lambda name, value: seen.append(name))
    assert sorted(seen) == sorted(asdict(found))
    assert all(value > 0 for value in asdict(found).values())
    assert planner.costs() == found
    result = CliRunner().invoke(app, ["tune", "--json"])
    assert result.exit_code == 0, result.output
    stored = json.loads(result.stdout)
    assert stored["file"] == str(own_costs)
    assert planner.costs().dense == stored["dense"]
    assert "entry_vector" in CliRunner().invoke(app, ["tune"]).output
