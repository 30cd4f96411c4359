"""The quantisers of other people: their bytes counted again from their formats, their errors, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rbe_gpu.reports.quality import quantizers
from rbe_gpu.reports.quality.quantizers import (
    Baseline,
    Source,
    __main__,
    gguf_file,
    llama,
    onnx_runtime,
    torch_tools,
)
from rbe_gpu.reports.quality.quantizers.source import POSITIONS, WORDS

from rbe_gpu import reference

from . import real

DOWN = "encoder.layer.2.output.dense.weight"  # (384, 1536)
UP = "encoder.layer.2.intermediate.dense.weight"  # (1536, 384)
WEIGHTS = 6 * (4 * 384 * 384 + 2 * 1536 * 384)
TEXTS = list(real.texts()[:8])


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(real.MODEL_DIR)


@pytest.fixture(scope="module")
def dense(source: Source) -> np.ndarray:
    return source.encoder({}).embed(TEXTS)


def error(dense: np.ndarray, found: np.ndarray) -> float:
    assert found.shape == dense.shape
    assert found.dtype == np.float32
    return float(np.linalg.norm(found - dense) / np.linalg.norm(dense))


def worst_cosine(dense: np.ndarray, encoder: Any) -> float:
    return float((dense * encoder.embed(TEXTS)).sum(axis=1).min())


# --- the model, and which tools there are -------------------------------------------------------------------


def test_source_has_the_linear_layers(source):
    assert len(source.linears) == 36
    assert source.weights == sum(source.tensors[n].size for n in source.linears) == WEIGHTS == 10_616_832
    assert not [n for n in source.tensors if "pooler" in n]
    assert {n for n in source.tensors if source.tensors[n].ndim == 2} - set(source.linears) == {
        WORDS, POSITIONS, "embeddings.token_type_embeddings.weight",
    }  # fmt: skip


def test_only_what_is_replaced_differs(source, dense):
    noisy = {name: 0 * source.tensors[name] for name in (UP, WORDS)}
    lossy = source.only_linears({**{n: source.tensors[n] for n in source.linears}, **noisy})
    assert not np.allclose(lossy.embed(TEXTS), dense, atol=1e-3)
    assert np.allclose(source.encoder({UP: noisy[UP]}).embed(TEXTS), lossy.embed(TEXTS), atol=1e-6)


def test_a_name_that_the_model_does_not_have_is_refused(source):
    with pytest.raises(KeyError, match="the model has no pooler"):
        source.encoder({"pooler.dense.weight": source.tensors[UP]})


def test_a_tool_that_is_not_installed_is_named(monkeypatch):
    absent = quantizers.Tool("squeezer", "squeezer", ("numpy", "no_such_module"), "squeezer>=1", never)
    nested = quantizers.Tool("nested", "nested", ("no_such_parent.child",), "nested", never)
    here = quantizers.Tool(
        "here", "numpy", ("numpy", "numpy.linalg"), "numpy", lambda source, version: iter(())
    )
    monkeypatch.setattr(quantizers, "TOOLS", (absent, nested, here))
    assert quantizers.missing() == {"squeezer": "pip install squeezer>=1", "nested": "pip install nested"}
    assert quantizers.missing(["here"]) == {}
    assert list(quantizers.baselines(real.MODEL_DIR)) == []
    with pytest.raises(ValueError, match="no tool is called sqeezer; there are squeezer, nested, here"):
        quantizers.missing(["sqeezer"])


def never(source: Source, version: str) -> Any:
    raise AssertionError("a tool that is not installed was run")


# --- gguf ---------------------------------------------------------------------------------------------------

#: type -> (weights, bytes) of a block as ggml's format defines it, and the largest relative error that is sane
GGUF = {
    "F16": (1, 2, 5e-4),
    "BF16": (1, 2, 3e-3),
    "Q8_0": (32, 2 + 32, 0.01),  # float16 scale, int8
    "Q5_1": (32, 2 + 2 + 20, 0.05),  # scale, minimum, 5 bits each
    "Q5_0": (32, 2 + 20, 0.06),
    "Q4_1": (32, 2 + 2 + 16, 0.1),
    "Q4_0": (32, 2 + 16, 0.12),
    "MXFP4": (32, 1 + 16, 0.15),  # 8-bit exponent, float4
    "TQ2_0": (256, 2 + 64, 1.0),  # three values: made for weights that have three
    "TQ1_0": (256, 2 + 52, 1.0),
}


def test_every_type_that_the_package_quantises_is_a_baseline():
    gguf = gguf_file.package()
    able = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quants.quantize(real.layer(0, "output.dense.weight"), kind)
        except NotImplementedError:
            continue
        able.append(kind.name)
    assert set(able) - {"F32"} == set(gguf_file.TYPES_OF_PACKAGE) == set(GGUF)


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_types(kind):
    gguf, weight = gguf_file.package(), real.weight(DOWN)
    data = gguf_file._numpy_quantise(DOWN, weight, kind)
    block, size, bound = GGUF[kind]
    assert data.nbytes == weight.size // block * size
    decoded = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert bound / 20 < error(weight, decoded) < bound


@pytest.mark.parametrize(
    ("kind", "columns", "expected"),
    [
        ("Q4_K", 1536, "Q4_K"), ("Q4_0", 384, "Q4_0"), ("TQ1_0", 384, "Q4_0"), ("Q2_K", 384, "Q4_0"),
        ("Q3_K", 384, "Q4_0"), ("Q4_K", 384, "Q5_0"), ("Q5_K", 384, "Q5_1"), ("Q6_K", 384, "Q8_0"),
        ("IQ3_S", 384, "IQ4_NL"), ("IQ4_XS", 384, "IQ4_NL"), ("Q6_K", 100, "F16"), ("Q8_0", 100, "F16"),
    ],
)  # fmt: skip
def test_rows_that_are_not_whole_blocks_fall_back_as_in_llama_cpp(kind, columns, expected):
    assert gguf_file.type_for(gguf_file.package(), kind, columns) == expected


def test_joined_rows_are_the_same_weights():
    weight = real.weight(UP)
    both = gguf_file.joined(weight)
    assert both.shape == (768, 768)
    assert np.array_equal(both[0], np.concatenate([weight[0], weight[1]]))
    assert gguf_file.joined(real.weight(DOWN)).shape == (384, 1536)
    with pytest.raises(ValueError, match="3 rows of 384 do not join"):
        gguf_file.joined(weight[:3])


def test_ternary_types_fall_back_but_for_the_long_rows(source):
    types = gguf_file.plan(source, "TQ2_0")
    assert set(types) == {*source.linears, WORDS}
    down = {name for name in source.linears if source.tensors[name].shape[1] == 1536}
    assert {name for name in types if types[name] == "TQ2_0"} == down
    assert {types[name] for name in types if name not in down} == {"Q4_0"}


@pytest.fixture(scope="module")
def file(source, tmp_path_factory) -> Path:
    """Linear layers in Q8_0, words in Q4_0."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_file.write(path, source, {**gguf_file.plan(source, "Q8_0"), WORDS: "Q4_0"})
    return path


@pytest.fixture(scope="module")
def reader(file) -> Any:
    return gguf_file.package().GGUFReader(file)


def test_the_file_of_a_type(source, dense, file, reader):
    baseline = gguf_file.baseline_of(file, source, "gguf", "0", "Q8_0", 1.5)
    linear, words = WEIGHTS // 32 * 34, 30522 * 384 // 32 * 18
    assert baseline.linear_bytes == linear
    assert baseline.bits_per_weight == 8.5
    assert baseline.note == "linear: 36 Q8_0; words: Q4_0; positions: F32"
    rest = {n: t for n, t in source.tensors.items() if n not in (*source.linears, WORDS)}
    padding = 16  # of the word table, to a multiple of 32 bytes; all other sizes are multiples
    assert baseline.file_bytes == file.stat().st_size
    assert baseline.file_bytes == reader.data_offset + linear + words + padding + 4 * sum(
        t.size for t in rest.values()
    )
    stored = {t.name: t for t in reader.tensors}
    assert len(stored) == len(source.tensors)
    assert stored["token_embd.weight"].tensor_type.name == "Q4_0"
    assert stored["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    for name, tensor in rest.items():  # all else is there bit by bit, as llama.cpp calls it
        entry = stored[gguf_file.name_of(gguf_file.package(), source, name)]
        assert entry.tensor_type.name == "F32"
        assert np.array_equal(entry.data, tensor)
    assert baseline.linear is not None
    assert 0.9995 < worst_cosine(dense, baseline.linear) < 1 - 1e-6
    assert 0.98 < worst_cosine(dense, baseline.whole) < 0.9995


def test_the_vocabulary_of_a_file(source, reader):
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    by_id = [source.folder.tokenizer.id_to_token(i) for i in range(30522)]
    assert len(tokens) == len(kinds) == 30522
    assert tokens[by_id.index("##ing")] == "ing"
    assert tokens[by_id.index("house")] == "\u2581house"
    assert (tokens[101], kinds[101], kinds[by_id.index("house")]) == ("[CLS]", 3, 1)
    assert reader.get_field("tokenizer.ggml.bos_token_id").contents() == 101
    strings = sum(8 + len(t.encode()) for t in tokens)
    found = gguf_file.vocabulary_bytes(source)
    assert 0 < found - strings - 4 * len(kinds) < 600  # keys, and the ids of five special tokens


# --- llama.cpp ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def importance(source) -> dict[str, np.ndarray]:
    return llama.importance(source, TEXTS)


def test_importance_is_the_mean_square_of_what_a_layer_reads(source, importance):
    assert set(importance) == set(source.linears)
    states, lengths = real.hidden_states(8), real.batch(8)[1]
    for i in range(6):
        rows = np.concatenate([s[:n] for s, n in zip(states[i], lengths, strict=True)])
        for name in ("query", "key", "value"):
            columns = importance[f"encoder.layer.{i}.attention.self.{name}.weight"]
            np.testing.assert_allclose(columns, np.square(rows).mean(axis=0), rtol=1e-4)


def test_importance_of_the_feed_forward_layers(source, importance):
    """From the outputs: LayerNorm(down(gelu(up(a))) + a) of the float64 reference is the next hidden state."""
    i = 3
    states, lengths = real.hidden_states(8), real.batch(8)[1]
    seen: dict[str, np.ndarray] = {}
    llama.NumpyBert(source.folder).hidden(*real.batch(8), activations=seen)
    inputs = {n.split(".", 3)[3]: v for n, v in llama._inputs(source, seen, i).items()}
    a, middle = inputs["intermediate.dense.weight"], inputs["output.dense.weight"]
    y = reference.linear(middle, real.layer(i, "output.dense.weight"), real.layer(i, "output.dense.bias"))
    gain, shift = (real.layer(i, f"output.LayerNorm.{part}") for part in ("weight", "bias"))
    after, _ = reference.layer_norm(y, gain, shift, real.config()["layer_norm_eps"], a)
    kept = np.arange(a.shape[1]) < lengths[:, None]
    np.testing.assert_allclose(after[kept], states[i + 1][kept], atol=1e-4)
    for name, rows in (("intermediate.dense.weight", a), ("output.dense.weight", middle)):
        expected = np.square(rows[kept].astype(np.float64)).mean(axis=0)
        np.testing.assert_allclose(importance[f"encoder.layer.{i}.{name}"], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_c_and_numpy_write_the_same_bytes(kind):
    pytest.importorskip("llama_cpp")
    weight = real.weight(UP)
    ours = gguf_file._numpy_quantise(UP, weight, kind)
    assert np.array_equal(llama.quantise(weight, kind, None), ours)


@pytest.mark.parametrize(
    ("kind", "size", "bound"),
    [("Q6_K", 210, 0.03), ("Q4_K", 144, 0.1), ("Q3_K", 110, 0.2), ("Q2_K", 84, 0.4), ("IQ3_S", 110, 0.2)],
)
def test_types_of_llama_cpp(kind, size, bound):
    pytest.importorskip("llama_cpp")
    gguf, weight = gguf_file.package(), gguf_file.joined(real.weight(UP))
    data = llama.quantise(weight, kind, None)
    assert data.nbytes == weight.size // 256 * size
    assert bound / 20 < error(weight, gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])) < bound


def test_a_mixture_of_llama_cpp(source, dense, tmp_path):
    pytest.importorskip("llama_cpp")
    before, after = tmp_path / "float.gguf", tmp_path / "q.gguf"
    gguf_file.write(before, source, {})
    ones = {
        gguf_file.name_of(gguf_file.package(), source, name): np.ones(
            source.tensors[name].shape[1], np.float32
        )
        for name in source.linears
    }
    llama.mixture(before, after, "Q4_K_M", ones)
    baseline = gguf_file.baseline_of(after, source, "llama.cpp", "0", "Q4_K_M", 0.0)
    assert baseline.file_bytes == after.stat().st_size
    assert "Q4_K" in baseline.note
    assert "words: Q8_0" in baseline.note
    assert 5.4 < baseline.bits_per_weight < 5.6  # Q5_0 in most of its places
    assert worst_cosine(dense, baseline.whole) > 0.95
    with pytest.raises(RuntimeError, match="did not make a Q4_K_M file"):
        llama.mixture(tmp_path / "absent.gguf", after, "Q4_K_M", None)


def test_llama_cpp_runs_the_file_of_the_gguf_package(source, file):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(file), embedding=True, verbose=False, n_ctx=512, n_threads=1)
    theirs = np.array([model.embed(t, normalize=True) for t in TEXTS])
    ours = gguf_file.baseline_of(file, source, "gguf", "0", "Q8_0", 0.0).whole.embed(TEXTS)
    assert (theirs * ours).sum(axis=1).min() > 0.999  # theirs quantises activations to 8 bits


# --- PyTorch's ----------------------------------------------------------------------------------------------

ROWS, COLUMNS = 1536, 384
N = ROWS * COLUMNS
#: tool -> setting -> (bytes counted from the format, largest sane relative error)
TORCH: dict[str, dict[str, tuple[float, float]]] = {
    "bitsandbytes": {
        "int8": (N + 4 * ROWS, 0.01),
        "nf4": (N / 2 + 4 * N / 64 + 4 * 16, 0.1),
        "nf4 double": (N / 2 + N / 64 + 4 * N / 64 / 256 + 4 * 256 + 4 * 16, 0.1),
        "fp4": (N / 2 + 4 * N / 64 + 4 * 16, 0.15),
        "fp4 double": (N / 2 + N / 64 + 4 * N / 64 / 256 + 4 * 256 + 4 * 16, 0.15),
    },
    "hqq": {
        "4 bits, groups of 64": (N / 2 + 4 * N / 64, 0.1),
        "4 bits, groups of 64, axis 0": (N / 2 + 4 * N / 64, 0.1),
        "3 bits, groups of 64": (
            64 * 4 * -(-N // 640) + 4 * N / 64,
            0.22,
        ),  # words of ten codes, along groups
        "3 bits, groups of 64, axis 0": (N / 64 * 4 * 7 + 4 * N / 64, 0.22),  # seven words a group
        "2 bits, groups of 16": (N / 4 + 4 * N / 16, 0.35),
    },
    "optimum-quanto": {
        "qint8": (N + 2 * ROWS, 0.01),
        "qfloat8": (N + 2 * ROWS, 0.04),
        "qint4": (N / 2 + 4 * N / 128, 0.12),
        "qint4 hqq": (N / 2 + 4 * N / 128, 0.11),
        "qint2 hqq": (N / 4 + 4 * N / 128, 0.55),
    },
    "torchao": {
        "int8": (N + ROWS * (4 + 1), 0.01),
        "int4, groups of 64": (N / 2 + 4 * N / 64, 0.1),
        "int4 hqq, groups of 32": (N / 2 + 4 * N / 32, 0.08),
    },
}
SETTINGS = {
    "bitsandbytes": torch_tools.bitsandbytes_settings,
    "hqq": torch_tools.hqq_settings,
    "optimum-quanto": torch_tools.quanto_settings,
    "torchao": torch_tools.torchao_settings,
}


@pytest.mark.parametrize("tool", TORCH)
def test_torch_tools(tool, source):
    for module in next(t for t in quantizers.TOOLS if t.name == tool).modules:
        pytest.importorskip(module)
    for setting, (nbytes, bound) in TORCH[tool].items():
        stored = SETTINGS[tool]()[setting](source.tensors[UP])
        assert stored.nbytes == nbytes, setting
        assert bound / 20 < error(source.tensors[UP], stored.weight) < bound, setting


def test_the_file_of_a_torch_tool(source, tmp_path):
    pytest.importorskip("bitsandbytes")
    stored = {UP: torch_tools.bitsandbytes_4bit("nf4", False)(source.tensors[UP])}
    path = tmp_path / "model.safetensors"
    torch_tools.save(path, source, stored)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = {n: e for n, e in header.items() if n != "__metadata__"}
    sizes = {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in entries.items()}
    assert len(data) == 8 + length + sum(sizes.values()) == torch_tools._file_bytes(source, stored, "float16")
    mine = {n.removeprefix(UP.removesuffix("weight")): size for n, size in sizes.items() if n.startswith(UP)}
    description = mine.pop("weight.quant_state.bitsandbytes__nf4")
    assert sum(mine.values()) == stored[UP].nbytes
    rest = sum(t.size for n, t in source.tensors.items() if n != UP)
    assert sum(sizes.values()) == stored[UP].nbytes + description + 2 * rest
    assert {e["dtype"] for n, e in entries.items() if not n.startswith(UP)} == {"F16"}
    words = entries[WORDS]["data_offsets"]
    assert (
        data[8 + length + words[0] : 8 + length + words[1]] == source.tensors[WORDS].astype("<f2").tobytes()
    )


# --- ONNX Runtime -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(source, tmp_path_factory) -> Path:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("onnx") / "dense.onnx"
    onnx.save(onnx_runtime.graph(source), path)
    return path


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_graph_is_the_model(graph, source, dense, batch_size):
    found = onnx_runtime.Session(graph, source, batch_size).embed(TEXTS)
    assert found.shape == dense.shape
    np.testing.assert_allclose(found, dense, atol=2e-6)


@pytest.mark.parametrize(("tables", "per_channel"), [(False, True), (True, False)])
def test_dynamic_int8(graph, source, dense, tables, per_channel, tmp_path):
    import onnx

    out = tmp_path / "quantised.onnx"
    onnx_runtime.dynamic(tables, per_channel)(graph, out)
    scales = sum(source.tensors[n].shape[0] if per_channel else 1 for n in source.linears)
    found = onnx_runtime.linear_bytes(onnx.load(out), source)
    assert found == WEIGHTS + scales * (4 + 1)  # float32 scale, int8 zero point
    all_tables = sum(t.size for n, t in source.tensors.items() if n.startswith("embeddings.") and t.ndim == 2)
    rest = 4 * sum(t.size for t in source.tensors.values() if t.ndim == 1)
    expected = found + rest + all_tables * (1 if tables else 4)
    assert 0 < out.stat().st_size - expected < 100_000  # nodes and names
    session = onnx_runtime.Session(out, source)
    assert worst_cosine(dense, session) > (0.97 if per_channel else 0.9)
    with pytest.raises(ValueError, match="is not quantised"):
        onnx_runtime.linear_bytes(onnx.load(graph), source)


def test_weights_in_blocks(graph, source, dense, tmp_path):
    import onnx

    pytest.importorskip("onnx_ir")
    out = tmp_path / "quantised.onnx"
    onnx_runtime.blocks(4, 32, False, False)(graph, out)
    assert onnx_runtime.linear_bytes(onnx.load(out), source) == WEIGHTS * (4 + 32 / 32 + 4 / 32) / 8
    assert worst_cosine(dense, onnx_runtime.Session(out, source)) > 0.93


# --- the table ----------------------------------------------------------------------------------------------


class Turned:
    """Unit vectors at known cosines to the dense ones."""

    def __init__(self, dense: np.ndarray, cosines: np.ndarray) -> None:
        other = np.roll(dense, 1, axis=1)
        other -= (other * dense).sum(axis=1, keepdims=True) * dense
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        c = cosines[:, None].astype(np.float32)
        self.vectors = c * dense + np.sqrt(1 - c * c) * other

    def embed(self, texts: list[str]) -> np.ndarray:
        return self.vectors[: len(texts)]


def test_the_table(monkeypatch, capsys, tmp_path, source, dense):
    monkeypatch.setattr(__main__.corpus, "held_out", lambda count: TEXTS[:count])
    cosines = np.linspace(0.3, 1.0, 8)
    baseline = Baseline(
        "squeezer", "1.0", "2 bits", WEIGHTS // 4, WEIGHTS, 12_345_678, Turned(dense, cosines)
    )
    monkeypatch.setattr(__main__, "baselines", lambda folder, tools: iter([baseline]))
    monkeypatch.setattr(__main__, "missing", lambda tools: {"other": "pip install other"})
    out = tmp_path / "rows.csv"
    assert __main__.main(["--model", str(real.MODEL_DIR), "--texts", "8", "--csv", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "other is not installed: pip install other" in printed
    line = next(x for x in printed.splitlines() if x.startswith("squeezer 2 bits"))
    assert line.split()[3:] == ["2.000", "12,345,678", "-", "-", "0.6500", "0.3070", "0.0"]
    assert out.read_text().splitlines()[1].startswith(f"squeezer,1.0,2 bits,2.0,{WEIGHTS // 4},12345678,")
