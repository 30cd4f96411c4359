"""The pages of `rbe-gpu report` from rows: what a reader sees, in Chromium where there is one; and short forms."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rbe_gpu.reports import compare, targets
from rbe_gpu.reports.harness import plots
from rbe_gpu.reports.harness.page import Number, Table, columns
from rbe_gpu.reports.harness.rows import (
    COLUMNS,
    OLDER_COLUMNS,
    Results,
    Row,
    Session,
    append_rows,
    read_rows,
)
from rbe_gpu.reports.harness.significance import Interval, faster, interval, student
from rbe_gpu.reports.quality import page as quality_page
from rbe_gpu.reports.speed import compression, page, short, summary
from rbe_gpu.reports.speed.cases import DENSE, NUMPY, ONNX, TORCH
from rbe_gpu.reports.speed.plots import PLOTS, op_speed

from .browser import look, needs_browser
from .html_page import checked
from .test_tree import ROOT

COMMITTED = ROOT / "reports" / "results" / "amd-epyc-2-cores.csv"
COMMITTED_QUALITY = COMMITTED.with_name("quality-amd-epyc-2-cores.csv")
SESSION = Session(
    2, "a processor (2 cores)", "python 3.11, numpy 2.0", "0123456789ab", "2030-01-02T03:04:05Z"
)
MEGABYTE = 1_000_000
DRAWN = 10  # plots of the committed rows
QUALITY_DRAWN = 4  # of those of quality


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows(COMMITTED)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> Path:
    out = tmp_path_factory.mktemp("page")
    page.write(rows, out)
    return out


@pytest.fixture(scope="module")
def of_quality(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quality")
    quality_page.write(read_rows(COMMITTED_QUALITY), out)
    return out


@pytest.fixture(scope="module")
def of_a_quick_run(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> Path:
    """The committed rows without the settings that a quick run leaves out."""
    out = tmp_path_factory.mktemp("quick")
    left_out = [s.name for s in compression.ALL_SETTINGS if s not in compression.QUICK_SETTINGS]
    kept = [r for r in rows if r.case not in left_out and not r.provider.endswith(tuple(left_out))]
    assert len(kept) < len(rows)
    page.write(kept, out, quick=True)
    return out


def speed(case: str, values: Any, baseline: str = TORCH, op: str = "linear", provider: str = DENSE) -> Row:
    return SESSION.row(op, case, provider, f"speed_vs_{baseline}", "x", values)


# --- intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "exact"), [(3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)]
)
def test_quantiles_of_students_distribution(degrees: int, exact: float) -> None:
    assert student(degrees) == pytest.approx(exact, rel=0.008)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 30, 100])
def test_an_interval_holds_the_median_in_19_of_20_cases(count: int) -> None:
    draws = np.random.default_rng(count).normal(10, 1, (5000, count))
    inside = [10 in known for line in draws if (known := interval(speed("a", line))) is not None]
    assert len(inside) == 5000
    assert 0.942 < np.mean(inside) < 0.968


def test_equal_medians_seldom_differ() -> None:
    draws = np.random.default_rng(7).normal(10, 1, (2000, 2, 15))
    differ = 0
    for a, b in draws:
        first, second = (interval(speed("a", values)) for values in (a, b))
        assert first is not None
        assert second is not None
        differ += not first.overlaps(second)
    assert differ < 0.01 * 2000


def test_few_runs_have_no_interval() -> None:
    assert interval(speed("a", [1.0, 2.0])) is None
    assert faster(speed("a", [1.0, 2.0])) is None
    assert Interval(1, 2).overlaps(Interval(2, 3))
    assert not Interval(1, 2).overlaps(Interval(2.1, 3))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((1.0, 1.5, 2.0), None), ((1.45, 1.5, 1.55), True), ((0.8, 1.0, 1.3), None), ([0.5] * 3, False)],
)
def test_a_speedup_within_its_interval_is_no_difference(values: Any, verdict: bool | None) -> None:
    assert faster(speed("a", values)) is verdict


# --- the rows -----------------------------------------------------------------------------------------------


def test_older_files_are_read_and_converted(tmp_path: Path, rows: list[Row]) -> None:
    assert all(r.noise is None and r.others is None and not r.disturbed for r in rows)
    path = tmp_path / "results.csv"
    path.write_text(COMMITTED.read_text(encoding="utf-8"), encoding="utf-8")
    assert tuple(path.read_text().splitlines()[0].split(",")) == OLDER_COLUMNS
    more = replace(speed("a", [1.0, 2.0]), noise=0.25, others=0.5)
    append_rows(path, [more])
    assert read_rows(path) == [*rows, more]
    assert tuple(path.read_text().splitlines()[0].split(",")) == COLUMNS
    assert more.disturbed


@pytest.mark.parametrize("damage", ["1e", "", "x"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "results.csv"
    append_rows(path, [speed("a", [1.0, 2.0])])
    text = path.read_text().replace("2030-01-02T03:04:05Z", "").replace("1.5,", f"{damage},")
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.csv, line 2 is not a row of results"):
        read_rows(path)


# --- structure, without a browser ---------------------------------------------------------------------------


def test_the_page_is_whole_small_and_accessible(written: Path, rows: list[Row]) -> None:
    path = written / "index.html"
    source = path.read_text(encoding="utf-8")
    seen = checked(source, (plots.INK, plots.GRID, plots.PAPER))
    assert path.stat().st_size < MEGABYTE
    assert seen.plots == 2 * DRAWN  # each once for a phone
    assert [len(widths) - 1 for widths in seen.widths].count(len(rows)) == 1
    assert "http" not in re.sub(r'(xmlns(:xlink)?="|"-//W3C)[^"]*"', "", source)
    sections = (
        "summary",
        "quality",
        "plots",
        "memory",
        "ops",
        "original",
        "rows",
        "method",
        "machine",
        "targets",
    )
    places = [source.index(f'<section id="{name}">') for name in sections]
    assert places == sorted(places)
    assert all(f'<a href="#{name}">' in source for name in sections)


def test_every_point_says_its_value(written: Path, rows: list[Row]) -> None:
    source = (written / "index.html").read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", source, re.S)
    wide, phone = drawings[::2], drawings[1::2]
    for a, b in zip(wide, phone, strict=True):
        circles = a.count("<circle")
        assert circles == a.count("<title>") == b.count("<circle") > 1
        assert "<title>" not in b
    speeds = {
        r.p50 for r in rows if r.metric == f"speed_vs_{TORCH}" and r.op == "gelu" and r.provider == DENSE
    }
    assert len(speeds) == 2
    for value in speeds:
        assert f": {value:.2f}× as fast as PyTorch (20% to 80%: " in source


def test_words_of_a_drawing_keep_all_digits(rows: list[Row]) -> None:
    """Coordinates are rounded, labels are not."""
    drawn = {p.name: p.svg() for p in plots.draw_for_screens(PLOTS, Results(rows))}
    assert ">0.001</text>" in drawn["error_bits"]
    assert not re.search(r' (?:x|y|d)="[^"]*\d\.\d{3}', drawn["error_bits"])


def test_the_summary_has_five_findings_each_with_a_number(rows: list[Row]) -> None:
    findings = summary.findings(Results(rows))
    assert len(findings) == 5
    assert all(re.search(r"\d", f.number) and len(f.sentence) > 40 for f in findings)
    assert "no difference, 95% interval 0.75× to 1.56×" in findings[1].sentence
    losses = summary.losses(Results(rows))
    assert "embedding, 1227 tokens, 30522 words, dense-int4 0.081×" in losses[0].sentence
    assert "ratio 50 (0.0314)" in losses[-1].sentence


def test_losses_count_what_is_beyond_the_interval() -> None:
    rows = [speed("a", [0.5] * 4), speed("b", [0.7, 0.9, 1.2, 1.4]), speed("c", [2.0] * 4), speed("d", 0.1)]
    (loss,) = summary.losses(Results(rows))
    assert loss == ("1 of 4", "cases are slower than PyTorch; the worst: linear, a 0.50×.")


def test_the_head_says_how_quiet_the_machine_was() -> None:
    row = speed("a", [1.0, 1.0, 1.0])
    assert summary.quiet([row]).number == "unknown"
    calm, loud, slow = (
        replace(row, noise=0.01, others=0.02),
        replace(row, others=0.3),
        replace(row, noise=0.2),
    )
    assert summary.quiet([calm, calm]).number == "quiet"
    assert summary.quiet([calm, loud, slow, calm]).number == "50% disturbed"
    assert summary.quiet([row, loud]).number == "100% disturbed"  # of those that are known
    source = page.render([calm, loud], [])
    assert "<dt>50% disturbed</dt>" in source
    assert source.count("<td>disturbed</td>") == 1


ONE = {
    "time": SESSION.row("gelu", "64 x 64", DENSE, "time", "s", 1e-5),
    "speed": speed("768x768, 64 tokens", [0.2, 0.3, 0.4]),
    "outlier": speed("768x768, 64 tokens", 1e-7),
    "size": SESSION.row("model", "dense", "rbe_gpu", "file_bytes", "B", 9e7),
    "zero": SESSION.row("model", "ratio 4", "rbe_gpu", "weight_error", "", 0.0),
    "other machine": replace(speed("a", 2.0), device="Ampere Altra (aarch64, 80 cores, Linux)", threads=80),
    "GPU": replace(speed("a", 2.0), backend="cuda", device="NVIDIA H200"),
    "unknown op": replace(speed("a", 2.0), op="conv2d", metric="joules", unit="J"),
}


@pytest.mark.parametrize("name", ONE)
def test_one_row_gives_a_page(name: str, tmp_path: Path) -> None:
    page.write([ONE[name]], tmp_path)
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    seen = checked(source, (plots.INK, plots.GRID, plots.PAPER))
    assert [len(widths) - 1 for widths in seen.widths].count(1) >= 1
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "# rbe-gpu report" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert ONE[name].device in source


def test_rows_without_peers_give_a_page(tmp_path: Path, rows: list[Row]) -> None:
    alone = [r for r in rows if r.provider not in (TORCH, ONNX, NUMPY) and "speed_vs" not in r.metric]
    page.write(alone, tmp_path)
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    checked(source, (plots.INK, plots.GRID, plots.PAPER))
    assert "<dt>none</dt>" not in source  # quality is lost at some ratios, without peers too
    assert summary.findings(Results(alone))[0].number == "4.0× smaller"


# --- outliers -----------------------------------------------------------------------------------------------


def test_an_outlier_does_not_stretch_the_axis(tmp_path: Path) -> None:
    near = [speed(f"{n} x 64", [0.9 + n / 10] * 3, op="softmax") for n in range(12)]
    far = [speed("tortoise", [0.01] * 3, op="softmax"), speed("hare", [900.0] * 3, op="softmax")]
    (plot,) = plots.draw_for_screens([op_speed], Results([*near, *far]))
    (axes,) = plot.figure.axes
    low, high = axes.get_xlim()
    assert 0.1 < low < 0.9
    assert 2 < high < 20
    assert {"0.01×", "9e+02×"} <= {t.get_text() for t in axes.texts}
    words = [value for value in plot.values if "tortoise" in value.words or "hare" in value.words]
    assert len(words) == 2
    assert all(low <= value.x <= high for value in words)
    assert "0.01× as fast" in words[0].words


def test_fences_keep_values_that_lie_close() -> None:
    assert plots.fences([1.0, 1.01, 1.5]) == pytest.approx((1.0, 1.5))
    assert plots.fences([2.0]) == pytest.approx((2.0, 2.0))
    low, high = plots.fences([*np.linspace(1, 2, 20), 1e-3, 1e3])
    assert (low, high) == pytest.approx((1, 2))


# --- short forms --------------------------------------------------------------------------------------------


def test_markdown_can_be_pasted(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    assert text.count("<details>") == text.count("</details>") == 2
    assert "- **4.0× smaller** ratio 4" in text
    tables = re.findall(r"(?:^\|.*\|\n?)+", text, re.M)
    assert len(tables) == 2
    for table in tables:
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
        assert len(widths) == 1
    for target in targets.CPU_TARGETS:
        assert target.name in text
    assert Table("t", columns("a", "b"), []).markdown() == "| a | b |\n|---|---|"
    table = Table("t", columns("a"), [])
    table.add(Number("1|2", 1.0))
    assert r"| 1\|2 |" in table.markdown()


def test_the_pdf_has_a_page_for_the_summary_and_for_each_plot(written: Path) -> None:
    data = (written / "report.pdf").read_bytes()
    assert len(re.findall(rb"/Type /Page\b", data)) == 1 + DRAWN


@pytest.mark.parametrize("count", [1, 40])
def test_findings_fit_on_the_front_page(count: int, rows: list[Row]) -> None:
    figure = short._front(Results(rows), quick=True)
    assert min(t.get_position()[1] for t in figure.texts) > 0.05


# --- two files ----------------------------------------------------------------------------------------------


def changed(row: Row, factor: float) -> Row:
    return replace(row, p20=row.p20 * factor, p50=row.p50 * factor, p80=row.p80 * factor)


def test_a_file_does_not_differ_from_itself(rows: list[Row]) -> None:
    assert {d.change for d in compare.differences(rows, rows)} == {compare.NONE, compare.UNKNOWN}
    text = compare.compare(COMMITTED, COMMITTED)
    assert "0 worse in B, 0 better, 0 different" in text
    assert "|" not in text


@pytest.mark.parametrize(
    ("metric", "values", "factor", "verdict"),
    [
        ("time", [1.0, 1.01, 0.99], 2, compare.WORSE),
        ("time", [1.0, 1.01, 0.99], 0.5, compare.BETTER),
        ("time", [1.0, 1.5, 0.6], 1.05, compare.NONE),
        ("time", [1.0], 5, compare.UNKNOWN),
        ("speed_vs_PyTorch", [1.0, 1.01, 0.99], 2, compare.BETTER),
        ("sentences_per_second", [1.0, 1.01, 0.99], 0.5, compare.WORSE),
        ("file_bytes", [1e6], 1.001, compare.WORSE),
        ("file_bytes", [1e6], 1.0, compare.NONE),
        ("cosine_mean", [0.9], 0.99, compare.WORSE),
        ("relative_error", [1e-7], 1 + 1e-8, compare.NONE),
        ("unrelated_cosine", [0.1], 2, compare.DIFFERENT),
        ("peak_memory", [1e6], 2, compare.UNKNOWN),
    ],
)
def test_what_differs(metric: str, values: list[float], factor: float, verdict: str) -> None:
    row = SESSION.row("gelu", "a", DENSE, metric, "", values)
    assert compare.difference(row, changed(row, factor)).change == verdict


def test_two_files_beside_each_other(tmp_path: Path) -> None:
    before = [SESSION.row("gelu", f"{n}", DENSE, "time", "s", [1.0, 1.01, 0.99]) for n in range(4)]
    after = [
        changed(before[0], 1.5),
        changed(before[1], 3),
        changed(before[2], 0.5),
        replace(before[3], case="new"),
    ]
    other = [replace(r, device="another processor", others=0.5) for r in after]
    for name, written_rows in (("a", before), ("b", other)):
        append_rows(tmp_path / f"{name}.csv", written_rows)
    text = compare.compare(tmp_path / "a.csv", tmp_path / "b.csv")
    assert "3 figures in both: 2 worse in B, 1 better, 0 different, 0 without a difference" in text
    assert "Only in A: 1; only in B: 1." in text
    assert "The machines or their threads differ" in text
    assert "Measured on a disturbed machine: 0 rows of A, 4 of B." in text
    lines = [line for line in text.splitlines() if line.startswith("| gelu")]
    assert [line.split("|")[7].strip() for line in lines] == ["3.00×", "1.50×", "0.50×"]


def test_files_of_other_things_have_nothing_in_common(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no figure in common"):
        compare.compare(COMMITTED, COMMITTED_QUALITY)


def test_every_metric_of_the_committed_rows_is_judged(rows: list[Row]) -> None:
    """What is measured anew each time is not compared as if it were exact."""
    exact = {r.metric for r in rows if not compare._NOISY.fullmatch(r.metric)}
    assert exact == {
        "file_bytes", "unrelated_cosine", "relative_error", "cosine_mean", "cosine_min", "nearest_same",
        "bits_per_weight", "weight_error", "weights_held", "stored_beyond_part", "dense_beyond_part",
    }  # fmt: skip
    assert asdict(rows[0])["noise"] is None


# --- as a user sees it, in Chromium -------------------------------------------------------------------------


#: fixture of a folder, its page, and the plots on it
PAGES = [("written", "index.html", DRAWN), ("of_quality", "quality.html", QUALITY_DRAWN)]


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
@pytest.mark.parametrize(("folder", "name", "drawn"), PAGES)
def test_no_error_no_sideways_scrolling_and_every_text_legible(
    folder: str, name: str, drawn: int, tmp_path: Path, width: int, dark: bool, request: pytest.FixtureRequest
) -> None:
    script = """
    const d = page.document;
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const linear = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const parts = [0.2126, 0.7152, 0.0722];
    const light = ([r, g, b]) => [r, g, b].map(linear).reduce((sum, c, i) => sum + c * parts[i], 0);
    const behind = (e) => {
      for (; e; e = e.parentElement) {
        const c = rgb(page.getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] > 0) return c;
      }
      return [255, 255, 255];
    };
    let least = 99, worst = "", texts = 0;
    for (const e of d.querySelectorAll("h1,h2,h3,p,dt,dd,li,th,td,summary,figcaption,a,label,output,svg text")) {
      if (!e.textContent.trim() || !e.getClientRects().length || e.matches("#rows tr:nth-child(n+20) *")) continue;
      const style = page.getComputedStyle(e);
      const ink = light(rgb(e.tagName === "text" ? style.fill : style.color)), paper = light(behind(e));
      const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
      texts += 1;
      if (contrast < least) { least = contrast; worst = e.tagName + ": " + e.textContent.slice(0, 60); }
    }
    const drawn = [...d.querySelectorAll(".plot svg")].filter((s) => s.getBoundingClientRect().width > 0);
    const small = Math.min(...drawn.map((s) => {
      const scale = s.getBoundingClientRect().width / s.viewBox.baseVal.width;
      const sizes = [...s.querySelectorAll("text")].map((t) => parseFloat(page.getComputedStyle(t).fontSize));
      return scale * Math.min(...sizes);
    }));
    const root = d.documentElement;
    return { wide: root.scrollWidth, window: root.clientWidth, least, worst, texts, drawn: drawn.length, small,
             shares: drawn.map((s) => s.getBoundingClientRect().width / root.clientWidth),
             paper: light(behind(d.body)) };
    """
    seen = look(request.getfixturevalue(folder) / name, script, tmp_path, width, dark)
    results = seen.value
    assert seen.console == []
    assert "error" not in results
    assert results["wide"] <= results["window"]
    assert results["texts"] > 500
    assert results["least"] >= 4.5, results["worst"]
    assert (results["paper"] < 0.1) is dark
    assert results["drawn"] == drawn
    assert min(results["shares"]) > 0.84  # of the width of the page
    assert results["small"] >= 7.5  # pixels


@needs_browser
@pytest.mark.parametrize(
    ("folder", "name"),
    [("written", "index.html"), ("of_a_quick_run", "index.html"), ("of_quality", "quality.html")],
)
def test_tables_are_no_wider_than_the_page(
    folder: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """At 1280 pixels; details open."""
    script = """
    for (const details of document.querySelectorAll("details")) details.open = true;
    return [...document.querySelectorAll("section:not(#rows) .scroll")].map(
      (box) => [box.querySelector("caption").textContent, box.scrollWidth - box.clientWidth]);
    """
    seen = look(request.getfixturevalue(folder) / name, script, tmp_path)
    assert seen.console == []
    assert len(seen.value) >= 8
    assert [box for box in seen.value if box[1] > 0] == []


@needs_browser
@pytest.mark.parametrize(("folder", "name", "drawn"), PAGES)
@pytest.mark.parametrize("width", [1280, 390])
def test_every_link_leads_to_something_that_is_shown(
    folder: str, name: str, drawn: int, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Links into closed details open them."""
    script = """
    const d = page.document;
    return [...d.querySelectorAll('nav a[href^="#"]')].map((link) => {
      d.querySelectorAll("details").forEach((details) => { details.open = false; });
      page.location.hash = link.hash;
      const place = d.getElementById(link.hash.slice(1));
      const texts = place.matches("ul") ? [...place.children] : [place];
      return [link.hash, texts.every((e) => e.getBoundingClientRect().height > 0 && e.checkVisibility())
        && !place.matches("details:not([open])")];
    });
    """
    seen = look(request.getfixturevalue(folder) / name, script, tmp_path, width)
    assert seen.console == []
    assert len(seen.value) >= 9
    assert [link for link, shown in seen.value if not shown] == []


@needs_browser
def test_the_rows_of_quality_sort_and_filter(of_quality: Path, tmp_path: Path) -> None:
    script = """
    const table = document.querySelector("table.rows"), form = document.getElementById("filter");
    const shown = () => [...table.tBodies[0].rows].filter((r) => !r.hidden);
    form.elements.metric.value = "cosine_mean";
    form.elements.words.value = "hqq";
    form.dispatchEvent(new Event("input"));
    table.tHead.rows[0].cells[4].querySelector("button").click();
    return shown().map((r) => [r.cells[2].textContent, r.cells[3].textContent, Number(r.cells[4].dataset.v)]);
    """
    seen = look(of_quality / "quality.html", script, tmp_path)
    expected = [
        r.p50 for r in read_rows(COMMITTED_QUALITY) if r.metric == "cosine_mean" and "hqq" in r.provider
    ]
    assert seen.console == []
    assert len(seen.value) == len(expected) > 20
    assert all("hqq" in provider and metric == "cosine_mean" for provider, metric, _ in seen.value)
    np.testing.assert_allclose([value for *_, value in seen.value], sorted(expected), rtol=1e-5)


@needs_browser
def test_the_table_sorts_and_filters(written: Path, tmp_path: Path, rows: list[Row]) -> None:
    script = """
    const table = document.querySelector("table.rows"), form = document.getElementById("filter");
    const shown = () => [...table.tBodies[0].rows].filter((r) => !r.hidden);
    const type = (name, value) => { form.elements[name].value = value; form.dispatchEvent(new Event("input")); };
    const results = { all: shown().length, visible: !form.hidden };
    type("op", "gelu");
    results.gelu = shown().length;
    type("words", "2048 numpy speed");
    results.words = shown().map((r) => r.cells[1].textContent + r.cells[3].textContent);
    results.count = document.getElementById("shown").textContent;
    type("words", ""); type("op", ""); type("metric", "time");
    const head = table.tHead.rows[0].cells[4].querySelector("button");
    head.click();
    results.up = shown().map((r) => Number(r.cells[4].dataset.v));
    head.click();
    results.down = shown().map((r) => Number(r.cells[4].dataset.v));
    results.sorted = table.tHead.rows[0].cells[4].getAttribute("aria-sort");
    table.tHead.rows[0].cells[1].querySelector("button").click();
    results.cases = shown().map((r) => r.cells[1].textContent);
    type("words", "no such row at all");
    results.none = shown().length;
    return results;
    """
    seen = look(written / "index.html", script, tmp_path)
    results = seen.value
    assert seen.console == []
    assert results["visible"]
    assert results["all"] == len(rows)
    assert results["gelu"] == sum(r.op == "gelu" for r in rows)
    assert results["words"] == ["2048 x 1536speed_vs_NumPy"] * 2
    assert results["count"] == f"2 of {len(rows)} rows"
    assert len(results["up"]) == sum(r.metric == "time" for r in rows)
    assert results["up"] == sorted(results["up"])
    assert results["down"] == sorted(results["up"], reverse=True)
    assert results["sorted"] == "descending"
    numbers = [int(m[0]) for case in results["cases"] if (m := re.match(r"\d+(?= x )", case))]
    assert numbers == sorted(numbers)
    assert results["none"] == 0


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("folder", "name", "drawn"), PAGES)
def test_points_show_their_values(
    folder: str, name: str, drawn: int, tmp_path: Path, width: int, request: pytest.FixtureRequest
) -> None:
    script = """
    const tip = page.document.getElementById("tip"), points = [];
    for (const plot of page.document.querySelectorAll(".plot")) {
      if (!plot.getBoundingClientRect().width) continue;
      plot.scrollIntoView();
      const circle = plot.querySelector(".values circle"), box = circle.getBoundingClientRect();
      const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
      plot.dispatchEvent(new page.PointerEvent("pointermove", at));
      const said = tip.getBoundingClientRect();
      points.push({ words: tip.textContent, hidden: tip.hidden, left: said.left, right: said.right });
      plot.dispatchEvent(new page.PointerEvent("pointerleave"));
      points[points.length - 1].after = tip.hidden;
    }
    const plot = [...page.document.querySelectorAll(".plot")].find((p) => p.getBoundingClientRect().width);
    plot.dispatchEvent(new page.KeyboardEvent("keydown", { key: "ArrowRight", cancelable: true }));
    return { points, key: tip.textContent, titles: page.document.querySelectorAll(".values title").length };
    """
    seen = look(request.getfixturevalue(folder) / name, script, tmp_path, width)
    assert seen.console == []
    points = seen.value["points"]
    assert len(points) == drawn
    for point in points:
        assert re.search(r"\d", point["words"])
        assert not point["hidden"]
        assert point["after"]
        assert 0 <= point["left"] < point["right"] <= width
    assert seen.value["key"] == points[0]["words"]
    assert seen.value["titles"] == 0


@needs_browser
@pytest.mark.parametrize("name", ["time", "outlier", "other machine"])
def test_one_row_in_a_browser(name: str, tmp_path: Path) -> None:
    page.write([ONE[name]], tmp_path)
    script = "return [document.documentElement.scrollWidth, document.querySelector('table.rows tbody').rows.length]"
    seen = look(tmp_path / "index.html", script, tmp_path)
    assert seen.console == []
    assert seen.value[0] <= 1280
    assert seen.value[1] == 1
