"""Costs beside the time: allocated and moved bytes, operations, the roof of the machine, cores and memory over time,
and what a cache of panels saves.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rbe_gpu.reports.harness import plots
from rbe_gpu.reports.harness.inputs import Inputs
from rbe_gpu.reports.harness.measure import NUMPY, OURS, TORCH, Case, Provider
from rbe_gpu.reports.harness.row_names import DENSE, MODEL, PEAK
from rbe_gpu.reports.harness.rows import Results, Row, Session
from rbe_gpu.reports.speed import costs, page, panel_cache, roofline, utilisation
from rbe_gpu.reports.speed import machine_plots as machine
from rbe_gpu.reports.speed.cases import model

import rbe_gpu as rbe
from rbe_gpu import registry

from . import real
from .html_page import checked
from .test_tree import ROOT

SESSION = Session(
    2, "a processor (2 cores)", "python 3.11, numpy 2.0", "0123456789ab", "2030-01-02T03:04:05Z"
)
X = np.ascontiguousarray(real.weight("embeddings.word_embeddings.weight")[:64])


@pytest.mark.parametrize(
    ("op", "shape", "case", "expected"),
    [
        ("linear", "(64, 768) x (3072, 768)", "3072x768, 64 tokens", 2 * 64 * 768 * 3072),
        ("attention", "(1, 512, 12, 32)", "512 tokens, 12 x 32", 4 * 512 * 512 * 12 * 32),
        ("attention", "(1, 512, 12, 32)", "512 tokens, 12 x 32, causal", 2 * 512 * 512 * 12 * 32),
        ("attention", "(32, 83, 12, 32)", "32 texts, padded to 83 tokens", None),
        ("add", "(64, 384)", "64 x 384", 64 * 384),
        ("decode", "(3072, 768)", "3072x768, dense-int4", None),
        ("embedding", "1227 of (30522, 384)", "1227 tokens, 30522 words", None),
        ("conv2d", "(1, 2)", "", None),
    ],
)
def test_operations(op: str, shape: str, case: str, expected: float | None) -> None:
    assert costs.operations(op, shape, case) == expected


def test_every_op_has_operations_or_none_to_count() -> None:
    assert {"linear", "attention", *costs._PER_ELEMENT} | {"decode", "embedding"} == set(registry.OPS)


def test_allocated_is_what_a_call_makes() -> None:
    out = np.empty_like(X)
    assert costs.allocated(Provider([lambda: rbe.softmax(X, out=out)])) < 10_000
    assert costs.allocated(Provider([lambda: rbe.softmax(X)])) == pytest.approx(X.nbytes, rel=0.05)
    assert costs.allocated(Provider([lambda: X + X + X])) >= X.nbytes
    kept: dict[int, Any] = {}
    assert (
        costs.allocated(Provider([lambda: kept.setdefault(0, np.empty(10**6))])) < 9e6
    )  # made by the first call


def test_rows_of_a_case() -> None:
    out = np.empty_like(X)
    ours = Provider([lambda: rbe.silu(X, out=out)])
    case = Case(
        "silu",
        "a",
        "(64, 384)",
        {NUMPY: Provider([lambda: X * 2]), TORCH: Provider([lambda: 0]), DENSE: ours},
    )
    rows = {(r.provider, r.metric): r.p50 for r in costs.rows(case, SESSION)}
    assert set(rows) == {(NUMPY, costs.ALLOCATED), (DENSE, costs.ALLOCATED), (DENSE, costs.MOVED)}
    assert rows[DENSE, costs.MOVED] == 2 * X.nbytes
    assert rows[NUMPY, costs.ALLOCATED] == pytest.approx(X.nbytes, rel=0.05)


def test_the_roof_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "COPIED", 1 << 22)
    rows = {(r.case, r.metric): r for r in roofline.measure(Inputs(real.MODEL_DIR), SESSION, quick=True)}
    assert set(rows) == {
        (roofline.COPY, "bandwidth"), (roofline.FLOAT32, "rate"), (roofline.INT8, "rate"),
    }  # fmt: skip
    assert all(r.runs == 3 and r.p50 > 1e6 for r in rows.values())
    assert rows[roofline.INT8, "rate"].provider == OURS


# --- over time ----------------------------------------------------------------------------------------------


def test_samples_until_the_work_is_done() -> None:
    left = iter([False, False, True])

    def done(seconds: float) -> bool:
        assert seconds == utilisation.STEP
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        return next(left)

    taken = [*utilisation.samples(done, os.getpid(), utilisation.own_cores())]
    assert len(taken) == 2
    assert 0 < taken[0][0] < taken[1][0]
    for _, shares, resident in taken:
        assert len(shares) == len(utilisation.own_cores())
        assert all(-0.05 <= share <= 1.05 for share in shares)
        assert sum(shares) > 0.05  # this process worked
        assert 10e6 < resident < 100e9


class FakeLibrary:
    """Answers after three waits."""

    pid = os.getpid()

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.waits = 0

    def send(self, *message: Any) -> None:
        self.sent.append(message)

    def ready(self, seconds: float) -> bool:
        time.sleep(0.03)
        self.waits += 1
        return self.waits > 3

    def receive(self) -> int:
        return 7


@pytest.mark.parametrize("cores", [2, 64])
def test_rows_of_cores_and_memory(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rbe_gpu.reports.speed.processes import RemoteEncoder

    monkeypatch.setattr(utilisation, "own_cores", lambda: list(range(cores)))

    def half_busy(which: list[int]) -> list[tuple[float, float]]:
        now = time.perf_counter()
        return [(now, 2 * now)] * len(which)

    monkeypatch.setattr(utilisation, "_times", half_busy)
    library: Any = FakeLibrary()
    rows = [*utilisation.measure(RemoteEncoder(library, DENSE), ["a", "b"], 1.0, SESSION)]
    assert library.sent == [("embed_for", DENSE, ["a", "b"], 1.0)]
    names = ["core 0", "core 1"] if cores == 2 else ["busiest core", "mean", "idlest core"]
    assert [r.provider for r in rows[: len(names) + 1]] == [*names, OURS]
    assert len(rows) == 3 * (len(names) + 1)
    assert all(r.p50 == pytest.approx(50) for r in rows if r.metric == utilisation.BUSY)
    assert rows[0].shape == "7 batches of 2 texts"


def test_the_peak_of_a_process_with_each_library(tmp_path: Path) -> None:
    rows = [*model.process_peaks(Inputs(real.MODEL_DIR), SESSION, [NUMPY], tmp_path)]
    assert [(r.provider, r.metric) for r in rows] == [(NUMPY, PEAK)]
    assert real.WEIGHTS.stat().st_size < rows[0].p50 < 3e9


# --- the cache of panels ------------------------------------------------------------------------------------


def test_a_cache_hits_as_often_as_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel_cache, "QUICK_SHARES", (0.0, 0.25, 0.5, 1.0))
    file = ROOT / "reports" / "models" / "minilm-r16.rbe.safetensors"
    rows = [*panel_cache.measure(file, "ratio 16", Inputs(real.MODEL_DIR), SESSION, 0.0, 3, quick=True)]
    dense = 4 * 6 * 12 * 384**2
    assert {r.shape for r in rows} == {f"36 weights, 64 tokens, {dense} B decoded"}
    swept = panel_cache.budgets(Results(rows))
    assert [share for share, *_ in swept] == [0, 0.25, 0.5, 1]
    for share, took, rate, held in swept:
        assert took.runs >= 3
        assert rate.p50 == pytest.approx(
            share, abs=0.1
        )  # panels have 0.3 to 2.1 MB: a share of them is not one of bytes
        panel = 1344 * 384 * 4
        assert share * dense - panel < held.p50 <= share * dense
    assert [entry[2].p50 for entry in swept] == sorted(entry[2].p50 for entry in swept)
    assert (swept[0][2].p50, swept[-1][2].p50) == (0, 1)
    assert swept[-1][3].p50 == dense
    assert {r.case for r in rows} > {panel_cache.DECODED, panel_cache.NO_CACHE}
    said = panel_cache.sentence(Results(rows))
    assert said is not None
    assert "36 weights of ratio 16 (64 tokens)" in said
    assert "42.5 MB, where 100% of the lookups hit" in said
    (plot,) = plots.draw([machine.cache_sweep], Results(rows))
    assert len(plot.values) == 2 * 4 + 2


def test_a_sweep_of_one_budget_says_nothing() -> None:
    row = SESSION.row(panel_cache.OP, panel_cache.case(0.5), OURS, "time", "s", 1.0)
    assert panel_cache.sentence(Results([row])) is None
    assert machine.cache_sweep(Results([row])) is None


# --- plots --------------------------------------------------------------------------------------------------


def made_up() -> list[Row]:
    row = SESSION.row
    rows = [
        row("machine", "copy", NUMPY, "bandwidth", "B/s", [1e10] * 3),
        row("machine", "matmul float32", NUMPY, "rate", "FLOP/s", [1e11] * 3),
        row("machine", "matmul int8", OURS, "rate", "FLOP/s", [3e11] * 3),
    ]
    for op, shape, seconds, moved in (
        ("linear", "(64, 768) x (768, 768)", 1e-3, 2.8e6),
        ("attention", "(1, 512, 12, 32)", 8e-3, 3.1e6),
        ("softmax", "(64, 64)", 1e-5, 3.2e4),
        ("add", "(64, 384)", 1e-4, 3e5),
    ):
        rows.append(row(op, shape[1:-1], DENSE, "time", "s", [seconds] * 3, shape=shape))
        rows.append(row(op, shape[1:-1], DENSE, costs.MOVED, "B", moved, shape=shape))
    for at in (0.2, 0.4):
        rows += [
            row("utilisation", f"{at:.2f} s", f"core {n}", "busy", "%", 90.0 + n, shape="2 batches")
            for n in (0, 1)
        ]
        rows.append(row("utilisation", f"{at:.2f} s", OURS, "resident", "B", 3e8, shape="2 batches"))
    return [*rows, *(row("model", MODEL, name, PEAK, "B", 3e8) for name in (NUMPY, DENSE))]


def test_points_below_the_roof() -> None:
    plot = next(p for p in plots.draw(machine.PLOTS, Results(made_up())) if p.name == "roof")
    words = {v.words.split(":")[0]: v for v in plot.values}
    linear = words["linear 64, 768) x (768, 768"]
    assert (linear.x, linear.y) == pytest.approx(
        (2 * 64 * 768 * 768 / 2.8e6, 2 * 64 * 768 * 768 / 1e-3 / 1e9)
    )
    assert "75% of the limit there" in linear.words  # 75.5 of 100 GFLOP/s
    assert "30% of the limit there" in words["add 64, 384"].words  # a slope: 24,576 / 3e5 per byte at 10 GB/s
    assert len(words) == 4


def test_the_page_of_these_rows(tmp_path: Path) -> None:
    rows = made_up()
    assert [p.name for p in plots.draw(machine.PLOTS, Results(rows))] == ["roof", "cores", "process_peaks"]
    page.write(rows, tmp_path)
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    checked(source, (plots.INK, plots.GRID, plots.PAPER))
    for words in ("core 1 at 0.4 s: 91% busy", "300 MB resident", "10 GB/s", "100 GFLOP/s"):
        assert words in source


@pytest.mark.parametrize("missing", ["machine", "utilisation", "model"])
def test_what_was_not_measured_is_not_drawn(missing: str) -> None:
    names = {p.name for p in plots.draw(machine.PLOTS, Results(r for r in made_up() if r.op != missing))}
    gone = {"machine": "roof", "utilisation": "cores", "model": "process_peaks"}[missing]
    assert names == {"roof", "cores", "process_peaks"} - {gone}
