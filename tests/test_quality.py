"""Quality per byte: what is measured, resumed and said of it; the page, its plots and the README's tables.

`ROWS` are written by hand, to see what becomes of rows. They are not measurements, and are in no report.
"""

from __future__ import annotations

import re
import shutil
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from rbe_gpu.reports import __main__ as command
from rbe_gpu.reports import run
from rbe_gpu.reports.harness import plots as style
from rbe_gpu.reports.harness.page import link
from rbe_gpu.reports.harness.rows import Results, Row, Session, append_rows, read_rows
from rbe_gpu.reports.harness.text import GONE, MISSING, RATINGS, UNKNOWN, Rating
from rbe_gpu.reports.quality import measure, page, plots, summary
from rbe_gpu.reports.quality import run as quality_run
from rbe_gpu.reports.quality.findings import basis_sentence, findings
from rbe_gpu.reports.quality.measure import LINEAR, WHOLE
from rbe_gpu.reports.quality.points import Comparison, Point, basis_trials, comparisons, points, tool_of
from rbe_gpu.reports.quality.quantizers import TOOLS
from rbe_gpu.reports.quality.readme import BLOCK
from rbe_gpu.reports.speed import page as speed_page
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from rbe_gpu.cli import app

from . import real
from .html_page import checked

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.ko.md")
SESSION = Session(
    2, "a processor (2 cores)", "python 3.11, numpy 2.0", "0123456789ab", "2030-01-02T03:04:05Z"
)
SHAPE = "512 texts, 400 queries, 1600 documents"
METRICS = ("bytes", "resident_bytes", "bits_per_weight", "cosine_mean", "cosine_p1", "overlap_at_10",
           "recall_at_1", "recall_at_10", "encode_time")  # fmt: skip


def made_up(op: str, case: str, provider: str, shape: str = SHAPE, **values: float) -> list[Row]:
    return [
        SESSION.row(op, case, provider, metric, "", float(v), shape=shape) for metric, v in values.items()
    ]


def file(
    provider: str, megabytes: float, cosine: float | None, recall: float | None, **more: float
) -> list[Row]:
    scores = (
        {} if cosine is None else {"cosine_mean": cosine, "cosine_p1": cosine - 0.01, "overlap_at_10": 0.9}
    )
    if recall is not None:
        scores |= {"recall_at_1": recall - 0.2, "recall_at_10": recall}
    return made_up("quality", WHOLE, provider, bytes=megabytes * 1e6, **more, **scores)


def layers(provider: str, bits: float, cosine: float, **more: float) -> list[Row]:
    scores = {"cosine_mean": cosine, "cosine_p1": cosine - 0.01, "overlap_at_10": 0.8}
    return made_up("quality", LINEAR, provider, bytes=bits * 1e6 / 8, bits_per_weight=bits, **scores, **more)


#: made by hand: see the head of this file
ROWS = [
    *file("dense", 90.0, 1.0, 0.8, resident_bytes=88e6),
    *file("rbe_gpu calibrated ratio 8", 11.25, 0.995, 0.79, resident_bytes=14e6, encode_time=40),
    *file("rbe_gpu plain ratio 8", 11.25, 0.9, None, resident_bytes=13e6, encode_time=9),
    *file("rbe_gpu calibrated ratio 16", 5.625, 0.7, 0.5),
    *file("rbe_gpu plain ratio 16", 5.625, 0.75, None),
    *file("rbe_gpu calibrated ratio 50", 1.8, 0.1, 0.02),
    *layers("rbe_gpu calibrated 2.2 bits", 2.2, 0.96, encode_time=20),
    *layers("rbe_gpu calibrated 4.25 bits", 4.25, 0.997, encode_time=21),
    *layers("gguf F16", 16.0, 0.9999999),
    *layers("gguf Q4_0", 4.5, 0.95),
    *layers("hqq 2 bits, groups of 64", 2.0, 0.2),
    *layers("hqq 4 bits, groups of 64", 4.5, 0.96),
    *layers("hqq 4 bits, groups of 32", 4.6, 0.97),
    *layers("bitsandbytes int8", 8.06, 0.9996),
    *file("gguf F16", 45.0, 0.9999999, 0.8),
    *file("gguf Q4_0", 14.0, 0.95, 0.795),
    *file("gguf TQ1_0", 1.0, 0.05, None),
    *file("bitsandbytes nf4 + words", 12.5, 0.97, 0.95),
    *file("hqq 4 bits, groups of 64", 30.0, 0.96, None),
    *file("onnxruntime 4 bits", 50.0, None, None),
    *made_up("quality", "calibration", "rbe_gpu calibrated", "700 texts", encode_time=60),
    *made_up("quality", "encoding", "gguf Q4_0", "linear: 36 Q4_0", encode_time=1.5, tokenizer_bytes=630000),
    *made_up("quality", "encoding", "bitsandbytes nf4 + words", "all else float16", encode_time=2, tokenizer_bytes=0),
    *made_up("ablation", "calibrated", "none, block 64", bits_per_weight=2.2, cosine_mean=0.957, cosine_p1=0.9,
             overlap_at_10=0.7),
    *made_up("ablation", "plain, attention", "dct, no basis", "", bits_per_weight=4, weight_error=0.10),
    *made_up("ablation", "plain, attention", "dct, basis", "", bits_per_weight=4, weight_error=0.11),
    *made_up("ablation", "plain, word embeddings", "dct, no basis", "", bits_per_weight=4, weight_error=0.20),
    *made_up("ablation", "plain, word embeddings", "dct, basis", "", bits_per_weight=4, weight_error=0.19),
    *made_up("ablation", "plain, whole file", "ratio 8", "", bits_per_weight=3.9, weight_error=0.15),
    *made_up("ablation", "plain, whole file", "ratio 16", "", bits_per_weight=1.9, weight_error=0.4),
]  # fmt: skip
RESULTS = Results(ROWS)


def without(*providers: str) -> Results:
    return Results(r for r in ROWS if r.provider not in providers)


# --- points ---------------------------------------------------------------------------------------------------


def test_tools_of_providers():
    assert tool_of("rbe_gpu plain ratio 8") == tool_of("rbe_gpu calibrated 2.2 bits") == "rbe_gpu"
    assert tool_of("llama.cpp Q4_K_M") == "llama.cpp"
    assert tool_of("unheard-of 4 bits") == "unheard-of"
    assert all(tool_of(f"{tool.name} some setting, 4") == tool.name for tool in TOOLS)


def test_noise_is_the_standard_error_of_a_difference():
    def at(recall: float) -> Point:
        return Point("x", WHOLE, 400, 1, cosine_mean=0.5, recall_at_10=recall)

    comparison = Comparison(at(0.8), at(0.79))
    assert comparison.noise == pytest.approx(((0.8 * 0.2 + 0.79 * 0.21) / 400) ** 0.5)
    assert comparison.recall == pytest.approx(-0.01)
    assert comparison.recall_holds
    assert not Comparison(at(0.95), at(0.79)).recall_holds
    assert Comparison(at(0.8), None).noise is None


def test_a_baseline_is_compared_with_our_largest_point_of_no_more_bytes():
    found = {c.baseline.provider: c for c in comparisons(RESULTS, LINEAR)}
    assert list(found) == [p.provider for p in points(RESULTS, LINEAR) if p.tool != "rbe_gpu"]
    assert found["hqq 2 bits, groups of 64"].ours is None
    assert found["hqq 2 bits, groups of 64"].better is None
    assert found["gguf Q4_0"].ours.provider == "rbe_gpu calibrated 4.25 bits"
    assert found["gguf Q4_0"].cosine == pytest.approx(0.047)
    assert found["gguf Q4_0"].better is True  # by cosine: recall was not measured
    assert found["gguf F16"].better is False
    whole = {c.baseline.provider: c for c in comparisons(RESULTS, WHOLE)}
    assert whole["bitsandbytes nf4 + words"].ours.provider == "rbe_gpu calibrated ratio 8"
    assert whole["bitsandbytes nf4 + words"].closer is True
    assert whole["bitsandbytes nf4 + words"].better is False
    assert whole["gguf Q4_0"].better is True
    assert whole["onnxruntime 4 bits"].better is None


# --- tables ---------------------------------------------------------------------------------------------------


def test_what_a_ratio_costs():
    found = page.cost_table(RESULTS).records()
    ratios = [f"rbe_gpu {kind} ratio {r}" for r in measure.RATIOS for kind in ("calibrated", "plain")]
    assert list(found) == ["dense", *ratios]
    eight = found["rbe_gpu calibrated ratio 8"]
    assert (eight["on disk"], eight["in memory"], eight["times smaller"]) == ("11.2 MB", "14.0 MB", "8.00×")
    assert [eight[h] for h in ("mean cosine", "1st percentile", "top-10 overlap", "recall@1", "recall@10")] == [
        "0.9950", "0.9850", "90%", "0.590", "0.790",
    ]  # fmt: skip
    assert eight["rating"].words == "very close to dense"
    plain = found["rbe_gpu plain ratio 8"]
    assert plain["recall@10"] == MISSING
    assert plain["rating"].words == "noticeable loss; test it on your task"
    assert found["rbe_gpu calibrated ratio 50"]["rating"].level == "gone"
    assert found["rbe_gpu calibrated ratio 200"]["on disk"] == MISSING
    assert found["rbe_gpu plain ratio 4"]["mean cosine"] == MISSING
    assert found["rbe_gpu plain ratio 4"]["rating"] == UNKNOWN
    dense = found["dense"]
    assert (dense["on disk"], dense["times smaller"], dense["rating"].words) == (
        "90.0 MB",
        "1",
        "the baseline",
    )


def test_a_ratio_that_cannot_be_made_is_not_called_unmeasured():
    why = "the weights take 7 bytes more than the target leaves; use a lower ratio"
    results = Results([*ROWS, *made_up("quality", WHOLE, "rbe_gpu calibrated ratio 200", why, refused=1)])
    found = page.cost_table(results).records()["rbe_gpu calibrated ratio 200"]
    assert (found["on disk"], found["mean cosine"], found["rating"].words) == ("", "", "cannot be made")
    assert f"No file can be made at calibrated ratio 200: {why}." in said(results)
    line = "| calibrated, ratio 200 |  |  |  |  |  |  |  |  | cannot be made |"
    assert line in BLOCK.tables(results.rows, "q.csv").splitlines()
    assert "cannot be made" in page.render(results.rows, [])


def test_a_refused_ratio_is_a_row_and_other_errors_end_the_run(measured, folder, tmp_path, monkeypatch):
    path = copy(measured, tmp_path / "quality.csv")
    errors = [ValueError("too small;\n use a lower ratio"), ValueError("a defect")]

    def refuse(*_, **__):
        raise errors.pop(0)

    monkeypatch.setattr(measure.rbe, "compress_model", refuse)
    more = {**POINTS, "ratios": (8, 900)}
    with pytest.raises(ValueError, match="a defect"):
        measure.measure(folder, path, SESSION, texts=measure.Texts.here(FEW), resume=True, **more)
    (row,) = (r for r in read_rows(path) if r.metric == measure.REFUSED)
    assert (row.provider, row.shape) == ("rbe_gpu calibrated ratio 900", "too small; use a lower ratio")


def test_a_ratio_that_was_measured_beyond_those_of_the_report_has_its_line():
    more = file("rbe_gpu calibrated ratio 6.5", 13.8, 0.999, 0.8)
    names = list(page.cost_table(Results([*ROWS, *more])).records())
    assert names.index("rbe_gpu plain ratio 4") < names.index("rbe_gpu calibrated ratio 6.5")
    assert names.index("rbe_gpu plain ratio 6.5") < names.index("rbe_gpu calibrated ratio 8")


def test_linear_layers_are_sorted_by_bits_and_end_with_the_dense_model():
    table = page.linear_table(RESULTS)
    lines = list(table.records().values())
    assert [q["bits per weight"] for q in lines] == [
        "2",
        "2.2",
        "4.25",
        "4.5",
        "4.5",
        "4.6",
        "8.06",
        "16",
        "32",
    ]
    assert [line.css for line in table.lines] == ["", "ours", "ours", *[""] * 5, "base"]
    assert lines[-2]["mean cosine"] == "1.0000"  # it differs by rounding alone
    assert page.linear_table(Results([])).lines == []


def test_whole_files_are_sorted_by_size():
    found = page.whole_table(RESULTS).records()
    sizes = [float(q["on disk"].removesuffix(" MB")) for q in found.values()]
    assert sizes == sorted(sizes)
    assert len(found) == 12
    assert found["onnxruntime 4 bits"]["mean cosine"] == MISSING


def test_a_comparison_in_words():
    lines = page.comparison_table(RESULTS, WHOLE, "whole").records()
    cosine, recall = "difference of cosines", "difference of recalls"
    lost = lines["bitsandbytes nf4 + words"]
    assert (lost["ours, calibrated"], lost["our size"], lost["size"]) == ("ratio 8", "11.2 MB", "12.5 MB")
    assert (lost[cosine], lost["ours is"]) == (Rating("good", "+0.0250"), Rating("lost", "not better"))
    assert lost[recall] == Rating("lost", "-0.160 ± 0.023")
    within = lines["gguf Q4_0"]
    assert within[recall] == Rating("fair", "-0.005 ± 0.029")
    assert within["ours is"] == Rating("good", "better")
    assert lines["gguf F16"][cosine] == Rating("lost", "-0.0050")
    small = lines["gguf TQ1_0"]
    assert (small["ours, calibrated"], small["our cosine"], small["ours is"]) == ("", "", page.TOO_SMALL)
    unknown = lines["onnxruntime 4 bits"]
    assert (unknown[cosine], unknown[recall], unknown["ours is"]) == (UNKNOWN,) * 3
    linear = page.comparison_table(RESULTS, LINEAR, "linear").records()["gguf Q4_0"]
    assert (linear["size"], linear["our size"]) == ("4.50 bits", "4.25 bits")
    assert recall not in linear


def test_ablations():
    found = page.trial_table(RESULTS).records()
    none, unmeasured = found["none, block 64"], found["dct, block 128"]
    assert (none["mean cosine"], none["top-10 overlap"]) == ("0.9570", "70%")
    assert {unmeasured["mean cosine"], unmeasured["bits per weight"]} == {MISSING}
    assert [line.cells for line in page.basis_table(RESULTS).lines] == [
        ("attention", "dct", "4", "0.1000", "0.1100", "+10.00%", Rating("lost", "does not pay")),
        ("word embeddings", "dct", "4", "0.2000", "0.1900", "-5.00%", Rating("good", "pays")),
    ]
    half = [r for r in ROWS if r.provider != "dct, basis"]
    assert page.basis_table(Results(half)).lines[0].cells[4:] == (MISSING, MISSING, UNKNOWN)


def test_encoding_and_what_the_tokenizer_takes():
    found = page.encoding_table(RESULTS).records()
    assert found["calibration, once for all ratios"]["seconds"] == "60 s"
    assert found["rbe_gpu calibrated ratio 8, whole file"]["seconds"] == "40 s"
    q4 = found["gguf Q4_0"]
    assert (q4["tokenizer in the file"], q4["what"]) == ("0.63 MB", "linear: 36 Q4_0")
    assert found["bitsandbytes nf4 + words"]["tokenizer in the file"] == "none"
    assert found["gguf F16"]["seconds"] == MISSING


# --- findings -------------------------------------------------------------------------------------------------


def said(results: Results) -> str:
    return "\n".join(findings(results))


def test_the_summary_has_a_number_for_each_finding():
    assert summary.findings(RESULTS) == [
        ("8.0× smaller", "calibrated ratio 8 is our smallest file very close to the dense model: 11.2 MB instead of "
         "90.0 MB, mean cosine 0.9950."),
        ("4.00×", "gguf F16 is the smallest file of another tool that is as close (45.0 MB, mean cosine "
         "1.0000): 4.00 times our size."),
        ("4.25 bits", "per weight of the linear layers are enough for a mean cosine of 0.99 (calibrated); the other "
         "tools take 8.06 bits (bitsandbytes int8)."),
        ("3 of 5", "settings of bitsandbytes, gguf and hqq are worse than ours at their own bytes, in the linear "
         "layers alone."),
        ("2 of 4", "settings of bitsandbytes, gguf and hqq are worse than ours at their own bytes, in whole files."),
    ]  # fmt: skip
    assert summary.findings(Results([])) == summary.losses(Results([])) == []


def test_the_summary_names_losses():
    losses = summary.losses(RESULTS)
    assert losses[0] == (
        "2 of 5",
        "settings of other tools are not worse than ours at their own bytes, in the linear layers alone: gguf F16; "
        "bitsandbytes int8.",
    )
    assert losses[1].number == "2 of 4"
    assert losses[2] == (
        "3 of 5 files",
        "lose the model's quality (mean cosine): calibrated ratio 16 (0.7000), plain ratio 16 (0.7500) and "
        "calibrated ratio 50 (0.1000).",
    )


def test_findings_of_the_smallest_file():
    words = said(RESULTS)
    assert (
        "The smallest of our files with a mean cosine of 0.99 or more is calibrated ratio 8: 11.2 MB instead of 90.0 "
        "MB (8.0 times smaller), mean cosine 0.9950, recall@10 0.790 (dense 0.800)."
    ) in words
    assert (
        "Of the other tools' files the smallest that reaches it is gguf F16: 45.0 MB, 4.00 times as large"
        in words
    )
    smaller = Results([*ROWS, *file("hqq tiny", 5.0, 0.991, 0.8)])
    assert "reaches it is hqq tiny: 5.00 MB, smaller than ours (2.25 times), mean cosine 0.9910" in said(
        smaller
    )
    none = said(without("rbe_gpu calibrated ratio 8", "gguf F16"))
    assert "None of our files stays very close to the dense model (mean cosine 0.99 or more)." in none
    assert "None of the other tools' files reaches it." in none


def test_findings_of_bits():
    assert (
        "a mean cosine of 0.99 takes the fewest bits per weight with rbe_gpu calibrated 4.25 bits at 4.25 (cosine "
        "0.9970); of the other tools, with bitsandbytes int8 at 8.06 (cosine 0.9996)."
    ) in said(RESULTS)
    assert "with no point of ours; of the other tools, with bitsandbytes int8" in said(
        without("rbe_gpu calibrated 4.25 bits")
    )


def test_findings_count_those_that_ours_is_better_than_and_name_all_others():
    words = said(RESULTS)
    assert (
        "In the linear layers alone, 6 settings of 3 other tools were measured; 5 of them have a calibrated point of "
        "ours of no more bytes to compare with. Ours is closer to the dense model in 3 of 5. Recall was not measured "
        "there. So ours is better than 3 of 5."
    ) in words
    assert (
        "In the linear layers alone, ours is not better than: bitsandbytes int8 (its cosine is higher, 0.999600 "
        "against 0.997000); gguf F16 (its cosine is higher, 1.000000 against 0.997000)."
    ) in words
    assert "not compared, because every point of ours has more bytes: hqq 2 bits, groups of 64." in words
    assert (
        "Ours is closer to the dense model in 3 of 4. Recall@10, measured for 3 of them, is not lower by more than "
        "noise in 2. So ours is better than 2 of 4."
    ) in words
    assert "bitsandbytes nf4 + words (our recall@10 lower by 0.160, noise 0.023)" in words
    assert "ours is better although its recall@10 is lower, by less than noise: gguf Q4_0" in words
    assert "In whole files, not measured well enough to tell which is better: onnxruntime 4 bits." in words
    for c in (*comparisons(RESULTS, LINEAR), *comparisons(RESULTS, WHOLE)):
        assert c.better or c.baseline.provider in words, (
            "every baseline that ours is not better than is named"
        )


def test_findings_where_ours_is_better_than_all_or_none():
    wins = said(without("gguf F16", "bitsandbytes int8", "hqq 2 bits, groups of 64"))
    assert "In the linear layers alone, ours is not better than" not in wins
    assert "So ours is better than 3 of 3." in wins
    losses = Results([*file("dense", 90.0, 1.0, 0.8), *file("rbe_gpu calibrated ratio 8", 11.25, 0.5, 0.3),
                      *file("gguf Q4_0", 14.0, 0.95, 0.795)])  # fmt: skip
    words = said(losses)
    assert "Ours is closer to the dense model in 0 of 1." in words
    assert "So ours is better than 0 of 1." in words
    assert (
        "In whole files, ours is not better than: gguf Q4_0 (its cosine is higher, 0.950000 against 0.500000; our "
        "recall@10 lower by 0.495, noise 0.031)."
    ) in words
    ours = [p.provider for p in points(RESULTS, WHOLE) if p.tool == "rbe_gpu"]
    assert (
        "In whole files, 6 settings of other tools were measured, and no calibrated point of ours."
        in said(without(*ours))
    )


def test_findings_of_ratios_calibration_basis_and_tools():
    words = said(RESULTS)
    assert (
        "Quality is lost (mean cosine 0.5 to 0.9) at calibrated ratio 16 (0.7000) and plain ratio 16 (0.7500)."
        in words
    )
    assert "Quality is gone (mean cosine below 0.5) at calibrated ratio 50 (0.1000)." in words
    assert "Calibration raises the mean cosine at ratio 8 from 0.9000 to 0.9950." in words
    assert "Calibration does not raise it at ratio 16 (0.7500 to 0.7000)." in words
    assert "Not measured here: llama.cpp, optimum-quanto and torchao." in words
    assert findings(Results([])) == [
        f"Not measured here: {', '.join(t.name for t in TOOLS[:-1])} and {TOOLS[-1].name}."
    ]


def test_where_the_basis_pays():
    assert basis_sentence(RESULTS) == (
        "Basis parameters, at equal bytes and without calibration, lower the weight error in 1 of 2 pairs of weights "
        "and transform: word embeddings (dct -5.00%). They do not pay in attention (dct +10.00%)."
    )
    worse = [r for r in ROWS if r.case != "plain, word embeddings"]
    assert "pay nowhere: in all 1 pairs" in basis_sentence(Results(worse))
    assert "up to 10.00% higher" in basis_sentence(Results(worse))
    better = [r for r in ROWS if r.case != "plain, attention"]
    assert "lower the weight error in all 1 pairs tried: word embeddings" in basis_sentence(Results(better))
    assert basis_sentence(Results([])) == ""


# --- the page and its plots -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quality") / "report"
    (out / "plots").mkdir(parents=True)
    for name in ("quality-old.png", "speed.png"):
        (out / "plots" / name).write_bytes(b"")
    page.write(ROWS, out)
    return out


def test_page_is_complete_accessible_and_needs_nothing_else(written):
    source = (written / "quality.html").read_text(encoding="utf-8")
    seen = checked(source, (style.INK, style.GRID, style.PAPER))
    assert seen.tables == 9
    assert seen.plots == 2 * len(plots.PLOTS)  # each once for a phone
    assert [len(widths) - 1 for widths in seen.widths].count(len(ROWS)) == 1
    assert (written / "quality.html").stat().st_size < 1_000_000
    headings = [re.search(rf'id="{name}"', source).start() for name in (
        "summary", "findings", "costs", "linear", "against-linear", "whole", "against-whole", "ablation", "rows",
        "method",
    )]  # fmt: skip
    assert headings == sorted(headings)
    for sentence in findings(RESULTS):
        assert sentence.replace("'", "&#39;") in source
    assert "llama.cpp: not measured." in source
    assert "pip install gguf llama-cpp-python" in source
    assert "fitted on 700 texts" in source
    assert SHAPE in source
    assert "Few texts" not in source


def test_plots_are_pictures_and_the_other_page_keeps_its_own(written):
    names = {p.name for p in (written / "plots").iterdir()}
    assert names == {
        "speed.png",
        *(f"quality-{n}.png" for n in ("linear", "file-loss", "file-recall", "weight-error")),
    }
    for name in names - {"speed.png"}:
        assert (written / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_what_was_not_measured_is_said_and_not_made_up():
    source = page.render(made_up("quality", WHOLE, "dense", "64 texts", bytes=9e7, cosine_mean=1), [])
    assert source.count(MISSING) > 100
    assert "No plot" in source
    assert "Few texts:" in source
    checked(source, ())
    with pytest.raises(ValueError, match="no rows"):
        page.render([], [])


def test_text_in_rows_cannot_become_markup():
    rows = file("gguf <script>alert(1)</script>", 3.0, 0.5, 0.5)
    source = page.render(rows, style.draw(plots.PLOTS, Results(rows)))
    checked(source, (style.INK, style.GRID, style.PAPER))
    assert "<script>alert" not in source
    assert source.count("<script") == 1  # the page's own


def texts_in(figure):
    """(words, box in pixels) of all names beside points, and of the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    found = [(t.get_text(), t.get_window_extent(renderer)) for t in axes.texts]
    return [*found, ("legend", axes.get_legend().get_window_extent(renderer))]


@pytest.fixture(scope="module")
def crowded() -> Results:
    """Forty baselines close together: where names have little room."""
    turns = np.random.default_rng(3)
    rows = list(ROWS)
    for i in range(40):
        megabytes, cosine = 10 + 0.3 * i, 1 - 0.05 * 0.9**i * float(turns.uniform(0.9, 1.1))
        rows += file(f"hqq {i} bits, groups of 64 + words", megabytes, cosine, 0.7 + 0.002 * i)
        rows += layers(f"hqq {i} bits, groups of 64", 3 + 0.1 * i, cosine)
    return Results(rows)


@pytest.mark.parametrize("make", plots.PLOTS, ids=lambda make: make.__name__)
def test_names_in_plots_do_not_overlap(make, crowded):
    for results in (RESULTS, crowded):
        (wide,) = style.draw_for_screens([make], results)
        for drawn in (wide, wide.phone):
            with matplotlib.rc_context(style.STYLE):
                boxes = texts_in(drawn.figure)
            assert len(boxes) > 2
            for (a, box), (b, other) in combinations(boxes, 2):
                assert not box.overlaps(other), f"{drawn.name}: {a} covers {b}"


def test_every_point_says_what_it_is():
    drawn = {p.name: p for p in style.draw(plots.PLOTS, RESULTS)}
    words = [v.words for v in drawn["quality-file-loss"].values]
    assert "rbe_gpu calibrated ratio 8: 11.2 MB, mean cosine 0.9950, recall@10 0.790" in words
    assert any(w.startswith("hqq 4 bits") or w.startswith("gguf Q4_0") for w in words)
    assert all("bits per weight" in v.words for v in drawn["quality-linear"].values)
    assert any(v.words.startswith("dense: ") for v in drawn["quality-file-recall"].values)
    assert len(drawn["quality-weight-error"].values) > 1


def test_plots_show_the_dense_model_and_every_tool():
    with matplotlib.rc_context(style.STYLE):
        for make in (plots.linear_loss, plots.file_loss, plots.file_recall):
            (axes,) = make(RESULTS).figure.axes
            assert any(t.get_text().startswith("dense") for t in axes.texts)
            legend = {t.get_text() for t in axes.get_legend().get_texts()}
            assert {
                "rbe_gpu, calibrated",
                "gguf",
                "bitsandbytes" if make is not plots.linear_loss else "hqq",
            } <= legend
        assert [make(Results([])) for make in plots.PLOTS] == [None] * 4
    assert plots.short("4 bits, groups of 64 + words") == "4 bits g64 +w"


def test_the_two_pages_link_to_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PLOTS", ())
    page.write(ROWS, tmp_path)
    (tmp_path / "plots" / "quality-linear.png").write_bytes(b"")
    assert 'href="index.html"' not in (tmp_path / "quality.html").read_text()
    speed_page.write(
        [SESSION.row("model", "grade B", "rbe_gpu", "cosine_mean", "", 0.4, shape="9 texts")], tmp_path
    )
    for name, other in (("index.html", "quality.html"), ("quality.html", "index.html")):
        assert (tmp_path / name).read_text().count(f'href="{other}"') == 1
    assert (tmp_path / "plots" / "quality-linear.png").exists(), "the other page's plots stay"
    page.write(ROWS, tmp_path)
    (tmp_path / "index.html").unlink()
    link(tmp_path)
    assert 'href="index.html"' not in (tmp_path / "quality.html").read_text()


# --- the command and the README -------------------------------------------------------------------------------


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "quality-by-hand.csv"
    append_rows(path, ROWS)
    return path


def test_command_writes_page_rows_and_readme(rows_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page, "PLOTS", ())
    out, readme = tmp_path / "out", tmp_path / "README.md"
    readme.write_text("before\n<!-- quality:begin -->\n<!-- quality:end -->\nafter\n", encoding="utf-8")
    arguments = [str(rows_file), "--out", str(out), "--readme", str(readme)]
    assert command.main(arguments) == 0
    assert (out / "quality.html").is_file()
    assert read_rows(out / "quality.csv") == ROWS
    once = readme.read_text(encoding="utf-8")
    assert "tables updated" in capsys.readouterr().out
    assert command.main([str(rows_file), "--readme", str(readme)]) == 0
    assert readme.read_text(encoding="utf-8") == once
    assert "up to date" in capsys.readouterr().out
    assert command.main([str(tmp_path / "none.csv"), "--out", str(out)]) == 1
    with pytest.raises(SystemExit):
        command.main([str(rows_file)])


def test_readme_tables(rows_file):
    made = BLOCK.tables(ROWS, rows_file.name)
    lines = made.splitlines()
    assert "| dense float32 | 90.0 MB | 1 | 88.0 MB | 1.0000 | 0.990 | 90% | 0.600 | 0.800 |  |" in lines
    assert (
        "| calibrated, ratio 8 | 11.2 MB | 8.00× | 14.0 MB | 0.9950 | 0.985 | 90% | 0.590 | 0.790 "
        "| very close to dense |"
    ) in lines
    for ratio in measure.RATIOS:
        assert sum(line.startswith(f"| calibrated, ratio {ratio} |") for line in lines) == 1
    absent = "not measured | " * 8
    assert f"| plain, ratio 200 | {absent} |" in lines
    assert "| rbe_gpu calibrated | 4.25 | 0.9970 | 0.987 | 80% |  |" in lines
    assert "| hqq 4 bits, groups of 32 | 4.60 | 0.9700 | 0.960 | 80% | not measured |" not in lines
    assert (
        "| hqq 4 bits, groups of 32 | 4.60 | 0.9700 | 0.960 | 80% |  |" in lines
    )  # its best; without a file
    assert "| gguf Q4_0 | 4.50 | 0.9500 | 0.940 | 80% | 14.0 MB |" in lines
    assert not [line for line in lines if line.startswith("| hqq 4 bits, groups of 64")]
    assert "| no setting of bitsandbytes lies there |  |  |  |  |  |" in lines
    assert lines[-1] == f"{SHAPE}. Rows: [quality-by-hand.csv](reports/results/quality-by-hand.csv)."
    for table in re.findall(r"(?:^\|.*\n)+", made + "\n", re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_readme_tables_in_korean_hold_the_same_figures():
    english, korean = (BLOCK.tables(ROWS, "q.csv", w) for w in (BLOCK.english, BLOCK.korean))
    figure = re.compile(r"\d[\d.]*(?: MB|%|×)?")

    def figures(text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| |")]
        return [figure.findall(line) for line in lines]

    assert figures(english) == figures(korean)
    assert MISSING not in korean
    assert {r.words for _, r in RATINGS} | {GONE.words} <= set(BLOCK.korean)
    assert BLOCK.words(Path("README.ko.md")) is BLOCK.korean


@pytest.mark.parametrize(
    "text",
    ["no marks", "<!-- quality:begin -->\n", "<!-- quality:end -->\n<!-- quality:begin -->\n",
     "<!-- quality:begin -->\n<!-- quality:end -->\n<!-- quality:begin -->\n<!-- quality:end -->\n"],
    ids=["none", "no end", "wrong order", "twice"],
)  # fmt: skip
def test_a_readme_without_marks_is_refused(text, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: the tables belong between"):
        BLOCK.update(readme, ROWS, Path("q.csv"))
    assert readme.read_text() == text
    with pytest.raises(ValueError, match="no tables between"):
        BLOCK.source_of(readme)


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_tables_are_those_of_the_committed_rows(name):
    """The rows are a file in reports/results; the README names it."""
    readme = ROOT / name
    rows_path = ROOT / "reports" / "results" / BLOCK.source_of(readme)
    assert rows_path.is_file(), f"{name} names rows that are not there: {rows_path.name}"
    text = readme.read_text(encoding="utf-8")
    made = BLOCK.tables(read_rows(rows_path), rows_path.name, BLOCK.words(readme))
    assert BLOCK.updated(text, made) == text


# --- measuring and going on -----------------------------------------------------------------------------------

FEW = 24  # texts, and documents
POINTS = {"bits": (3.25,), "ratios": (8,), "ablation": (("dct", 64),), "tools": ()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return real.one_layer(tmp_path_factory.mktemp("model") / "one-layer")


@pytest.fixture(scope="module", autouse=True)
def _few_transforms():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PLAIN_TRANSFORMS", ("dct",))
        yield


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "quality.csv"
    path.write_text("rows of an earlier run\n")
    measure.measure(folder, path, SESSION, texts=measure.Texts.here(FEW), **POINTS)
    return path


def test_a_run_measures_every_point(measured, folder):
    results = Results(read_rows(measured))
    dense = results.value("quality", WHOLE, "dense", "bytes")
    assert dense == (folder / "model.safetensors").stat().st_size
    assert results.value("quality", WHOLE, "dense", "cosine_mean") == pytest.approx(1)
    for provider in ("rbe_gpu calibrated ratio 8", "rbe_gpu plain ratio 8"):
        assert dense / results.value("quality", WHOLE, provider, "bytes") >= 8
    assert results.value("quality", LINEAR, "rbe_gpu calibrated 3.25 bits", "bits_per_weight") <= 3.25
    assert results.value("ablation", "calibrated", "dct, block 64", "cosine_mean") > 0.9
    assert 0 < results.value("ablation", "plain, whole file", "ratio 8", "weight_error") < 0.3
    assert {t.group for t in basis_trials(results)} == {
        "word embeddings", "position embeddings", "attention", "feed-forward",
    }  # fmt: skip
    lines = page.cost_table(results).records()
    assert MISSING not in (lines["rbe_gpu calibrated ratio 8"]["recall@10"], lines["dense"]["in memory"])
    assert all(np.isfinite(r.p50) for r in results.rows)


def copy(path: Path, to: Path, drop: str | None = None) -> Path:
    """The rows in another file, without those of a provider."""
    append_rows(to, [r for r in read_rows(path) if r.provider != drop])
    return to


def test_going_on_measures_what_is_missing_and_nothing_else(measured, folder, tmp_path):
    path = copy(measured, tmp_path / "quality.csv", drop="rbe_gpu plain ratio 8")
    before = path.read_bytes()
    told: list[str] = []
    texts = measure.Texts.here(FEW)
    measure.measure(folder, path, SESSION, texts=texts, resume=True, say=told.append, **POINTS)
    assert told == ["whole file: rbe_gpu plain ratio 8"]
    assert path.read_bytes().startswith(before)
    key = lambda r: (r.op, r.case, r.provider, r.metric)  # noqa: E731
    timed = {"encode_time"}
    assert {key(r): r.p50 for r in read_rows(path) if r.metric not in timed} == {
        key(r): r.p50 for r in read_rows(measured) if r.metric not in timed
    }


def test_rows_of_other_texts_or_another_model_are_not_gone_on_with(measured, folder, tmp_path):
    path = copy(measured, tmp_path / "quality.csv")
    with pytest.raises(ValueError, match=rf"has rows of {FEW} texts, .* not of {FEW + 1} texts"):
        measure.measure(folder, path, SESSION, texts=measure.Texts.here(FEW + 1), resume=True, **POINTS)
    longer = tmp_path / "longer"
    shutil.copytree(folder, longer)
    tensors = {**load_file(folder / "model.safetensors"), "more": np.ones(1, np.float32)}
    save_file(tensors, longer / "model.safetensors")
    with pytest.raises(ValueError, match="has rows of a model of"):
        measure.measure(longer, path, SESSION, texts=measure.Texts.here(FEW), resume=True, **POINTS)
    assert read_rows(path) == read_rows(measured)


def test_a_run_goes_on_and_writes_its_page(measured, folder, tmp_path, monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setattr(quality_run, "QUICK_TEXTS", FEW)
    copy(measured, tmp_path / "quality.csv", drop="rbe_gpu plain ratio 8")
    quality_run.measure(tmp_path, folder, 2, True, True, Console(stderr=True))
    shown = capsys.readouterr()
    assert re.search(r"0:\d\d +1  whole file: rbe_gpu plain ratio 8", shown.err)
    assert "quality.html written" in shown.out
    source = (tmp_path / "quality.html").read_text(encoding="utf-8")
    assert f"{FEW} texts" in source
    assert "Few texts:" in source
    assert len(read_rows(tmp_path / "quality.csv")) == len(read_rows(measured))


def test_a_run_that_fails_keeps_its_rows_and_says_how_to_go_on(measured, folder, tmp_path, capfd):
    """In a process of its own; the rows here are of fewer texts than a run's."""
    copy(measured, tmp_path / "quality.csv")
    with pytest.raises(run.AlreadyReported, match="no page of quality was written"):
        run.quality(tmp_path, quick=True, model=folder, resume=True)
    said = capfd.readouterr().err
    assert re.search("start anew.*continue with rbe-gpu report --quality --resume\n$", said)
    assert read_rows(tmp_path / "quality.csv") == read_rows(measured)
    assert not (tmp_path / "quality.html").exists()


def test_a_run_that_is_not_quick_measures_all(folder, tmp_path, monkeypatch):
    from rich.console import Console

    seen = {}

    def fake(folder, path, session, **options):
        seen.update(options)
        append_rows(path, ROWS)
        return ROWS

    monkeypatch.setattr(measure, "measure", fake)
    monkeypatch.setattr(page, "write", lambda rows, out: out)
    quality_run.measure(tmp_path, folder, 2, False, False, Console(stderr=True))
    assert (seen["resume"], "texts" in seen) == (False, False)


def test_a_run_moves_the_rows_of_an_earlier_one(measured, tmp_path):
    path, words = copy(measured, tmp_path / "quality.csv"), []
    assert measure.Run(path, SESSION, SHAPE, True).rows == read_rows(measured)
    assert path.exists()
    assert measure.Run(path, SESSION, SHAPE, False, words.append).rows == []
    assert not path.exists()
    assert read_rows(tmp_path / "quality.csv.old") == read_rows(measured)
    assert words == [f"the rows of an earlier run are now in {tmp_path / 'quality.csv.old'}"]


def test_flags_of_the_command(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run, "quality", lambda **options: calls.append(options))
    monkeypatch.setattr(run, "main", lambda **options: calls.append("main"))

    def report(*arguments: str):
        return CliRunner().invoke(app, ["report", "--out", str(tmp_path), *arguments])

    assert report("--quality").exit_code == 0
    assert report("--quality", "--resume", "--quick", "--model", str(real.MODEL_DIR)).exit_code == 0
    assert report().exit_code == 0
    assert calls == [
        {"out": tmp_path, "quick": False, "model": None, "resume": False},
        {"out": tmp_path, "quick": True, "model": real.MODEL_DIR, "resume": True},
        "main",
    ]
    refused = report("--resume")
    assert refused.exit_code == 2
    assert "--quality" in refused.stderr
