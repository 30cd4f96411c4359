"""The page "Small, good, fast": what is measured of a small model, and what becomes of rows.

`ROWS` are written by hand, to see what becomes of rows. They are not measurements, and are in no report.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
from rbe_gpu.reports import __main__ as command
from rbe_gpu.reports.harness import plots as style
from rbe_gpu.reports.harness.baselines import Folder, NumpyBert
from rbe_gpu.reports.harness.rows import Results, Row, Session, append_rows, read_rows
from rbe_gpu.reports.harness.text import MISSING
from rbe_gpu.reports.quality.measure import WHOLE
from rbe_gpu.reports.quality.quantizers import Source
from rbe_gpu.reports.quality.small_good_fast import __main__ as measuring
from rbe_gpu.reports.quality.small_good_fast import measure, page, peers, plots
from rbe_gpu.reports.quality.small_good_fast.measure import BATCHES, ONE, OP, provider_of

from rbe_gpu.container import load_file, save_file
from rbe_gpu.models.compress import compress_model

from . import real
from .html_page import checked

SESSION = Session(
    2, "a processor (2 cores)", "python 3.11, numpy 2.0", "0123456789ab", "2030-01-02T03:04:05Z"
)
SHAPE = "976 texts of kind.txt, 400 queries, 1600 documents"


def made_up(op: str, case: str, provider: str, shape: str = SHAPE, **values: float) -> list[Row]:
    return [
        SESSION.row(op, case, provider, metric, "", float(v), shape=shape) for metric, v in values.items()
    ]


def encoder(
    provider: str, megabytes: float, cosine: float | None, recall: float | None, rate: float | None = None
) -> list[Row]:
    """Rows of a file; with `rate`, sentences per second, those of speed too, dense at 100 and ONNX Runtime at 80."""
    scores = (
        {} if cosine is None else {"cosine_mean": cosine, "cosine_p1": cosine - 0.01, "overlap_at_10": 0.9}
    )
    scores |= {} if recall is None else {"recall_at_1": recall - 0.2, "recall_at_10": recall}
    scores |= {"resident_bytes": megabytes * 2e6} if provider.startswith(("dense", "rbe_gpu")) else {}
    rows = made_up("quality", WHOLE, provider, bytes=megabytes * 1e6, **scores)
    for case, shape in ((BATCHES, "976 texts, 50000 tokens"), (ONE, "17 tokens")):
        if rate is not None:
            values = {"time": 1 / rate, "sentences_per_second": rate}
            for baseline, base in (("dense", 100.0), (peers.ONNX, 80.0)):
                values |= {} if baseline == provider else {f"speed_vs_{baseline}": rate / base}
            rows += made_up(OP, case, provider, shape, **values)
    return rows


#: made by hand: see the head of this file
ROWS = [
    *encoder("dense", 91.0, 1.0, 0.8, 100.0),
    *encoder("rbe_gpu distilled small-r16", 5.6, 0.96, 0.77, 220.0),
    *encoder("rbe_gpu distilled small-r32", 2.8, 0.93, 0.76, 260.0),
    *encoder("rbe_gpu calibrated r8", 11.3, 0.995, 0.79, 180.0),
    *encoder("rbe_gpu plain r8", 11.3, 0.9, 0.7, 110.0),
    *encoder(peers.ONNX, 91.2, 1 - 1e-13, 0.8, 80.0),
    *encoder(peers.ONNX_INT8, 23.2, 0.992, 0.79, 190.0),
    *encoder("gguf Q4_0", 14.1, 0.97, None),
    *encoder("model2vec int8, 70 dimensions", 2.7, None, 0.5, 9000.0),
    *made_up(
        "quality", "encoding", "rbe_gpu distilled small-r16", "the last run: 9 steps on 70 texts", training_steps=9
    ),
]  # fmt: skip
RESULTS = Results(ROWS)


# --- the page from rows ---------------------------------------------------------------------------------------


def test_the_table_has_every_encoder_ours_before_others_and_smallest_first() -> None:
    records = page.choice_table(RESULTS).records()
    assert list(records) == [
        "dense", "rbe_gpu distilled small-r32", "rbe_gpu distilled small-r16", "rbe_gpu calibrated r8",
        "rbe_gpu plain r8", "model2vec int8, 70 dimensions", "gguf Q4_0", peers.ONNX_INT8, peers.ONNX,
    ]  # fmt: skip
    small = records["rbe_gpu distilled small-r16"]
    assert [small[h] for h in ("mean cosine", "1st percentile", "top-10 overlap", "recall@10")] == [
        "0.9600", "0.950", "90%", "0.770",
    ]  # fmt: skip
    assert (small["on disk"], small["times smaller"], small["in memory"]) == ("5.60 MB", "16.25×", "11.2 MB")
    assert (small["sentences per second"], small["vs dense"], small["vs ONNX Runtime float32"]) == (
        "220",
        "2.20×",
        "2.75×",
    )
    assert (small["a short text"], small["a short text vs dense"]) == ("4.55 ms", "2.20×")
    assert (records["dense"]["vs dense"], records["dense"]["vs ONNX Runtime float32"]) == ("1", "1.25×")
    assert (records[peers.ONNX]["vs dense"], records[peers.ONNX]["vs ONNX Runtime float32"]) == ("0.80×", "1")
    assert records[peers.ONNX]["in memory"] == ""
    weights = records["gguf Q4_0"]
    assert (weights["sentences per second"], weights["vs dense"]) == (page.NOT_ITS_OWN, "")
    assert weights["recall@10"] == MISSING
    static = records["model2vec int8, 70 dimensions"]
    assert (static["rating"], static["mean cosine"], static["recall@10"]) == (page.OTHER_SPACE, "", "0.500")


def test_what_was_not_timed_is_said() -> None:
    records = page.choice_table(Results(r for r in ROWS if r.op != OP)).records()
    small = records["rbe_gpu distilled small-r16"]
    assert (small["sentences per second"], small["vs dense"], small["a short text"]) == (MISSING, "", "")


def test_findings() -> None:
    words = "\n".join(page.findings(RESULTS))
    assert (
        "The smallest of our files with a mean cosine of 0.99 or more is rbe_gpu calibrated r8: 11.3 MB (8.1 times "
        "smaller), mean cosine 0.9950, recall@10 0.790 (dense 0.800); 1.80× the speed of dense and 2.25× the speed "
        f"of ONNX Runtime float32. Of the other tools' files it is {peers.ONNX_INT8}: 23.2 MB"
    ) in words
    assert "0.95 or more is rbe_gpu distilled small-r16: 5.60 MB" in words
    assert (
        "Of the other tools' files it is gguf Q4_0: 14.1 MB (6.5 times smaller), mean cosine 0.9700." in words
    )
    assert "0.9 or more is rbe_gpu distilled small-r32: 2.80 MB" in words
    assert (
        "Static embeddings of as many bytes as small-r32 (model2vec int8, 70 dimensions) have a recall@10 of 0.500 "
        "against 0.760; 90.00× the speed of dense"
    ) in words
    bad = Results(encoder("rbe_gpu plain r50", 1.8, 0.2, 0.1))
    assert page.findings(bad) == ["None of our files has a mean cosine of 0.9 or more."]
    assert page.findings(Results([])) == []


def test_both_plots_show_the_dense_model_and_all_that_can_be_shown() -> None:
    with matplotlib.rc_context(style.STYLE):
        by_size, by_speed = (make(RESULTS) for make in plots.PLOTS)
        assert [make(Results([])) for make in plots.PLOTS] == [None, None]
    own = {f"rbe_gpu, {kind}" for kind in ("distilled", "calibrated", "plain")}
    for plot, labels in (
        (by_size, {*own, "onnxruntime", "model2vec", "gguf"}),
        (by_speed, {*own, "onnxruntime", "model2vec"}),
    ):
        above, below = plot.figure.axes
        assert labels == {t.get_text() for t in above.get_legend().get_texts()}
        for axes in (above, below):
            names = {t.get_text() for t in axes.texts}
            assert any(name.startswith("dense") for name in names)
            assert {"small-r16", "small-r32", "r8"} <= names
    assert "model2vec" not in by_size.alt.split("Of recall@10")[0]
    assert "gguf" not in by_speed.alt


def test_the_page_is_complete_accessible_and_needs_nothing_else(tmp_path: Path) -> None:
    rows_path = tmp_path / "rows.csv"
    append_rows(rows_path, ROWS)
    out = tmp_path / "out"
    assert command.main([str(rows_path), "--out", str(out)]) == 0
    assert read_rows(out / measure.FILE) == ROWS
    source = (out / "small-good-fast.html").read_text(encoding="utf-8")
    seen = checked(source, (style.INK, style.GRID, style.PAPER))
    assert (seen.tables, seen.plots) == (1, 2)
    assert {p.name for p in (out / "plots").iterdir()} == {
        "small-good-fast-bytes.png",
        "small-good-fast-speed.png",
    }
    for words in (
        SHAPE,
        "standard error is 0.020 for the dense model",
        "the last run: 9 steps on 70 texts",
        "pytorch, llama.cpp, bitsandbytes, hqq: not measured.",
    ):
        assert words in source
    assert "Few texts" not in source
    readme = tmp_path / "README.md"
    readme.write_text("")
    assert command.main([str(rows_path), "--readme", str(readme)]) == 1, "there are no tables of a README"


def test_pages_of_a_folder_link_to_each_other_and_keep_their_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PLOTS", ())
    (tmp_path / "plots").mkdir()
    others = ("quality-linear.png", "speed.png")
    for name in (*others, "small-good-fast-old.png"):
        (tmp_path / "plots" / name).write_bytes(b"")
    (tmp_path / "quality.html").write_text("<nav><!-- pages --><!-- /pages --></nav>", encoding="utf-8")
    written = page.write(ROWS, tmp_path)
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {*others}
    assert '<a href="quality.html">Quality per byte</a>' in written.read_text(encoding="utf-8")
    link = '<a href="small-good-fast.html">Small, good, fast</a>'
    assert link in (tmp_path / "quality.html").read_text(encoding="utf-8")


# --- measuring ------------------------------------------------------------------------------------------------

TEXTS = [f"{text[:80]}" for text in real.texts()[:24]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real.one_layer(tmp_path_factory.mktemp("model") / "one-layer")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as three files that say that they were made in three ways."""
    at = tmp_path_factory.mktemp("files")
    made = {kind: at / f"{kind}-8.rbe.safetensors" for kind in ("plain", "calibrated", "distilled")}
    compress_model(folder, made["plain"], codes="dense-int8", transform="none")
    tensors, config = load_file(made["plain"])
    config = {**config, "int8_activations": []}
    save_file(made["calibrated"], tensors, config)
    facts = {"steps": 1500, "texts": 63005, "seed": 0}
    save_file(made["distilled"], tensors, {**config, "source": {**config["source"], "distilled": facts}})
    return made


def test_a_file_says_how_it_was_made(folder: Path, files: dict[str, Path]) -> None:
    for kind, file in files.items():
        assert provider_of(file, folder) == f"rbe_gpu {kind} {kind}-8"
    with pytest.raises(ValueError, match="name the model that it was made from"):
        provider_of(files["plain"], real.MODEL_DIR)


def test_batches_keep_the_order_of_the_texts(folder: Path) -> None:
    class Counting(NumpyBert):
        sizes: list[int] = []  # noqa: RUF012

        def embed(self, texts: list[str]) -> Any:
            self.sizes.append(len(texts))
            return super().embed(texts)

    encoder = Counting(Folder(folder))
    texts = [text[: 20 + 7 * i % 60] for i, text in enumerate(TEXTS)]
    whole = encoder.embed(texts)
    batched = peers.InBatches(encoder, Source(folder), 10).embed(texts)
    assert encoder.sizes == [24, 10, 10, 4]
    np.testing.assert_allclose(batched, whole, atol=1e-5)


def test_static_embeddings_are_cut_to_the_bytes_of_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a stand-in for model2vec, whose files hold a byte for every value, and 1,000 more."""

    class StaticModel:
        def __init__(self, dimensions: int) -> None:
            self.embedding = np.zeros((500, dimensions), np.int8)

        @classmethod
        def from_pretrained(cls, path: Path, dimensionality: int = 384, quantize_to: str = "") -> StaticModel:
            assert path == tmp_path
            return cls(dimensionality)

        def save_pretrained(self, path: str) -> None:
            (Path(path) / "model.safetensors").write_bytes(bytes(self.embedding.size + 900))
            (Path(path) / "config.json").write_bytes(bytes(100))
            (Path(path) / "README.md").write_bytes(bytes(5000))

    monkeypatch.setitem(sys.modules, "model2vec", SimpleNamespace(StaticModel=StaticModel))
    monkeypatch.setattr(peers, "version", lambda name: "1.0")
    for nbytes, dimensions in ((26_100, 48), (24_900, 40), (10**7, 384)):
        peer = peers.static(tmp_path, nbytes)
        assert peer is not None
        assert peer.name == f"model2vec int8, {dimensions} dimensions"
        assert peer.nbytes == 1000 + 500 * dimensions <= nbytes
        assert not peer.same_space
    assert peers.static(tmp_path, 4000) is None


def test_openvino_runs_the_same_graph(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """With stand-ins for OpenVINO, which computes with ONNX Runtime, and for NNCF."""
    pytest.importorskip("onnxruntime")
    asked: list[dict[str, Any]] = []
    calibrated: list[Any] = []

    class Core:
        def read_model(self, path: str) -> bytes:
            return Path(path).read_bytes()

        def compile_model(self, model: bytes, device: str, settings: dict[str, Any]) -> Any:
            import onnxruntime

            asked.append(settings)
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            return lambda inputs: session.run(None, inputs)

    def save_model(model: bytes, path: str, compress_to_fp16: bool) -> None:
        assert not compress_to_fp16
        Path(path).write_bytes(bytes(100))
        Path(path).with_suffix(".bin").write_bytes(bytes(2000))

    def quantize(model: bytes, inputs: list[Any], **options: Any) -> bytes:
        calibrated.extend(inputs)
        return model

    nncf = SimpleNamespace(
        quantize=quantize, Dataset=list, ModelType=SimpleNamespace(TRANSFORMER="transformer")
    )
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core, save_model=save_model))
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    monkeypatch.setattr(peers, "absent", lambda: ["onnxruntime", "pytorch", peers.STATIC])
    monkeypatch.setattr(peers, "version", lambda name: "1.0")
    source = Source(folder)
    vectors = NumpyBert(Folder(folder)).embed(TEXTS)
    float32, int8 = peers.transformers(source, 3)
    assert (float32.name, int8.name) == ("openvino float32", "openvino int8 (nncf)")
    assert len(calibrated) == 300
    assert all(set(inputs) == {"input_ids", "attention_mask", "token_type_ids"} for inputs in calibrated)
    for peer, settings in zip((float32, int8), asked, strict=True):
        assert peer.nbytes == 2100 + peers.tokenizer_bytes(source)
        assert settings["INFERENCE_NUM_THREADS"] == 3
        assert settings["INFERENCE_PRECISION_HINT"] == "f32"
        np.testing.assert_allclose(peer.encoder.embed(TEXTS), vectors, atol=1e-5)


def test_command_measures_and_goes_on(
    folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kind.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    out = tmp_path / "out"
    options: list[object] = ["--texts", tmp_path / "kind.txt", "--out", out, "--documents", 24]
    options += ["--rounds", 1, "--threads", 2]
    options += ["--tool", "hqq"]  # it is not installed with what the tests need, and named

    def run(*further: object) -> int:
        return measuring.main(list(map(str, (folder, *further, *options))))

    assert run(files["distilled"], files["plain"]) == 0
    said = capsys.readouterr()
    assert f"{out / 'small-good-fast.html'} written" in said.out
    rows = read_rows(out / measure.FILE)
    results = Results(rows)
    ours = ["rbe_gpu distilled distilled-8", "rbe_gpu plain plain-8"]
    measured = results.providers("quality", WHOLE, "bytes")
    assert measured[:3] == ["dense", *ours]
    for provider in (*ours, *(p for p in (peers.ONNX, peers.TORCH) if p in measured)):
        cosine = results.value("quality", WHOLE, provider, "cosine_mean")
        assert cosine is not None
        assert cosine > 0.999
        assert results.value("quality", WHOLE, provider, "recall_at_10") is not None
        for case in (BATCHES, ONE):
            assert (results.value(OP, case, provider, "speed_vs_dense") or 0) > 0
            time = results.one(OP, case, provider, "time")
            rate = results.value(OP, case, provider, "sentences_per_second")
            count = len(TEXTS) if case == BATCHES else 1
            assert count / time.p80 <= rate * (1 + 1e-9)
            assert rate <= count / time.p20 * (1 + 1e-9)
    assert results.value("quality", WHOLE, ours[0], "bytes") == files["distilled"].stat().st_size
    dense = sum((folder / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    assert results.value("quality", WHOLE, "dense", "bytes") == dense
    assert results.one("quality", "encoding", ours[0], "training_steps").shape == (
        "the last run: 1,500 steps on 63,005 texts"
    )

    # one file more: what is there stays, and all are timed again
    options.append("--resume")
    assert run(files["distilled"], files["plain"], files["calibrated"]) == 0
    more = read_rows(out / measure.FILE)
    assert more[: len(rows)] == rows
    assert {r.provider for r in more[len(rows) :] if r.op == "quality"} == {"rbe_gpu calibrated calibrated-8"}
    assert {r.provider for r in more[len(rows) :] if r.op == OP} == {
        *measured,
        "rbe_gpu calibrated calibrated-8",
    }
    assert run(files["distilled"], files["plain"], files["calibrated"]) == 0
    assert read_rows(out / measure.FILE) == more, "nothing is left to measure"

    capsys.readouterr()
    (tmp_path / "kind.txt").write_text("\n".join(TEXTS[:20]), encoding="utf-8")
    assert run(files["plain"]) == 1
    assert "start anew" in capsys.readouterr().err
    twice = shutil.copy(files["plain"], tmp_path / files["plain"].name)
    assert run(files["plain"], twice) == 1
    assert "the same name" in capsys.readouterr().err
    tensors, config = load_file(files["plain"])
    save_file(twice, tensors, {**config, "further": "bytes" * 9})
    (tmp_path / "kind.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    assert run(twice) == 1
    assert "another file called plain-8" in capsys.readouterr().err
    assert run(tmp_path / "none.rbe.safetensors") == 1
