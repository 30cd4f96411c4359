"""ONNX Runtime's quantisers, run in ONNX Runtime.

The graph is the encoder as exporters write it: three `Gather`s, `LayerNormalization`, `MatMul` + `Add` with weights
(in, out), attention in plain operators, `Gelu`. Two tools work on it:

- `quantize_dynamic`: int8 weights, and activations quantised to 8 bits as they come, with one range per tensor;
  `MatMul` alone or the tables' `Gather` too; one scale per matrix or per output ("per channel"). Texts run one by
  one, so that no padding and no other text widens a range, which is kinder than batches. x86 processors without VNNI
  may saturate the int16 sums of such products; there the tool wants `reduce_range`.
- `MatMulNBitsQuantizer`: weights in 8, 4 or 2 bits in blocks along the input, activations float32.

The file has no vocabulary. What is not quantised is float32, as these tools leave it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from ...harness.baselines import F32
from .source import POSITIONS, TYPES, WORDS, Baseline, Source

_OPSET = 20  # Gelu
_MASKED = -1e9  # added to scores of padding


class _Graph:
    """Nodes and initialisers of a graph in the making."""

    def __init__(self) -> None:
        self.onnx = import_module("onnx")
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """Store an array."""
        self.weights.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator; the name of its result."""
        out = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out


def _layer(g: _Graph, source: Source, at: str, x: str, bias: str, shapes: tuple[str, str]) -> str:
    """x -> the next layer's input, as the equations of rbe_gpu.models.bert. `bias` is added to scores."""
    w = source.tensors
    split, join = shapes
    head_dim = source.config["hidden_size"] // source.config["num_attention_heads"]

    def dense(y: str, name: str) -> str:
        product = g.node("MatMul", y, g.weight(f"{at}{name}.weight", w[f"{at}{name}.weight"].T))
        return g.node("Add", product, g.weight(f"{at}{name}.bias", w[f"{at}{name}.bias"]))

    def norm(y: str, name: str) -> str:
        gain, shift = (g.weight(f"{at}{name}.{p}", w[f"{at}{name}.{p}"]) for p in ("weight", "bias"))
        return g.node("LayerNormalization", y, gain, shift, epsilon=float(source.config["layer_norm_eps"]))

    def heads(name: str, order: tuple[int, ...]) -> str:
        return g.node("Transpose", g.node("Reshape", dense(x, f"attention.self.{name}"), split), perm=order)

    scale = g.weight(f"{at}scale", np.array(1 / sqrt(head_dim), np.float32))
    scores = g.node("MatMul", heads("query", (0, 2, 1, 3)), heads("key", (0, 2, 3, 1)))
    scores = g.node("Add", g.node("Mul", scores, scale), bias)
    mixed = g.node("MatMul", g.node("Softmax", scores, axis=-1), heads("value", (0, 2, 1, 3)))
    mixed = g.node("Reshape", g.node("Transpose", mixed, perm=(0, 2, 1, 3)), join)
    a = norm(g.node("Add", dense(mixed, "attention.output.dense"), x), "attention.output.LayerNorm")
    y = dense(g.node("Gelu", dense(a, "intermediate.dense")), "output.dense")
    return norm(g.node("Add", y, a), "output.LayerNorm")


def graph(source: Source) -> Any:
    """The encoder as an ONNX model: input_ids, attention_mask, token_type_ids (batch, seq) int64 -> hidden states."""
    g = _Graph()
    onnx, helper, c, w = g.onnx, g.onnx.helper, source.config, source.tensors
    if c.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"the graph has Gelu; the model has {c['hidden_act']!r}")
    zero, one = g.weight("zero", np.array([0])), g.weight("one", np.array([1]))
    length = g.node("Shape", "input_ids", start=1, end=2)
    places = g.weight("positions", np.arange(c["max_position_embeddings"])[None])
    places = g.node("Slice", places, zero, length, one)
    x = g.node("Gather", g.weight(WORDS, w[WORDS]), "input_ids")
    x = g.node("Add", x, g.node("Gather", g.weight(TYPES, w[TYPES]), "token_type_ids"))
    x = g.node("Add", x, g.node("Gather", g.weight(POSITIONS, w[POSITIONS]), places))
    gain, shift = (g.weight(n, w[n]) for n in ("embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"))
    x = g.node("LayerNormalization", x, gain, shift, epsilon=float(c["layer_norm_eps"]))
    mask = g.node("Cast", "attention_mask", to=onnx.TensorProto.FLOAT)
    mask = g.node(
        "Mul",
        g.node("Sub", g.weight("kept", np.array([1], np.float32)), mask),
        g.weight("masked", np.array([_MASKED], np.float32)),
    )
    bias = g.node("Unsqueeze", mask, g.weight("axes", np.array([1, 2])))
    heads = c["num_attention_heads"]
    shapes = (
        g.weight("split", np.array([0, 0, heads, c["hidden_size"] // heads])),
        g.weight("join", np.array([0, 0, c["hidden_size"]])),
    )
    for i in range(c["num_hidden_layers"]):
        x = _layer(g, source, f"encoder.layer.{i}.", x, bias, shapes)
    g.nodes.append(helper.make_node("Identity", [x], ["last_hidden_state"], name="last"))
    ids = [
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch", "seq"])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    result = helper.make_tensor_value_info(
        "last_hidden_state", onnx.TensorProto.FLOAT, ["batch", "seq", c["hidden_size"]]
    )
    made = helper.make_graph(g.nodes, "bert", ids, [result], g.weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    return model


class GraphEncoder:
    """The graph in a runtime, with mean pooling and normalised vectors.

    run : its inputs by name -> hidden states (batch, seq, hidden_size) float32
    batch_size : texts computed together, longest first
    """

    def __init__(self, run: Callable[[dict[str, Any]], F32], source: Source, batch_size: int = 1) -> None:
        self._run = run
        self._batch = source.folder.batch
        self._batch_size = batch_size

    def embed(self, texts: list[str]) -> F32:
        """Unit sentence vectors, (len(texts), hidden_size) float32."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors: dict[int, F32] = {}
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            ids, lengths = self._batch([texts[i] for i in rows])
            mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
            states = self._run(
                {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            )
            sums = (states * mask[..., None].astype(np.float32)).sum(axis=1)
            vectors.update(zip(rows, sums / np.linalg.norm(sums, axis=1, keepdims=True), strict=True))
        return np.stack([vectors[i] for i in range(len(texts))])


class Session(GraphEncoder):
    """An ONNX model in ONNX Runtime.

    model : a file, or its bytes
    threads : of ONNX Runtime's own pool; 0: one per core
    """

    def __init__(self, model: Path | bytes, source: Source, batch_size: int = 1, threads: int = 0) -> None:
        runtime = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # its threads wait for work by spinning; not on after a batch, where they would slow whatever runs next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3  # errors: it warns of every initialiser that it folds
        session = runtime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
        super().__init__(lambda inputs: session.run(["last_hidden_state"], inputs)[0], source, batch_size)


def linear_bytes(model: Any, source: Source) -> int:
    """Bytes of the initialisers that a quantised file has in the linear weights' places: codes, scales, zero points.

    Raises
    ------
    ValueError : a linear weight is still there as it was
    """
    total = 0
    for tensor in model.graph.initializer:
        if tensor.name in source.linears:
            raise ValueError(f"{tensor.name} is not quantised")
        if tensor.name.startswith(source.linears):
            total += len(tensor.raw_data) or import_module("onnx").numpy_helper.to_array(tensor).nbytes
    return total


def dynamic(tables: bool, per_channel: bool) -> Callable[[Path, Path], None]:
    """`quantize_dynamic` of all `MatMul`s with a weight, and of the tables' `Gather`s."""

    def quantise(dense: Path, out: Path) -> None:
        tool = import_module("onnxruntime.quantization")
        op_types = ["MatMul", "Gather"] if tables else ["MatMul"]
        tool.quantize_dynamic(dense, out, op_types_to_quantize=op_types, per_channel=per_channel)

    return quantise


def blocks(
    bits: int, block: int, symmetric: bool, tables: bool, algorithm: str = ""
) -> Callable[[Path, Path], None]:
    """`MatMulNBitsQuantizer`, in blocks of `block` inputs; the algorithm "" is round to nearest."""

    def quantise(dense: Path, out: Path) -> None:
        tool = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        op_types = ("MatMul", "Gather") if tables else ("MatMul",)
        config = None
        if algorithm == "hqq":
            config = tool.HQQWeightOnlyQuantConfig(block_size=block, bits=bits, op_types_to_quantize=op_types)
        made = tool.MatMulNBitsQuantizer(
            import_module("onnx").load(dense), bits=bits, block_size=block, is_symmetric=symmetric,
            op_types_to_quantize=op_types, algo_config=config,
        )  # fmt: skip
        made.process()
        made.model.save_model_to_file(str(out), False)

    return quantise


def settings() -> dict[str, tuple[Callable[[Path, Path], None], bool]]:
    """Setting -> (what makes its file, whether the tables are quantised too)."""
    settings: dict[str, tuple[Callable[[Path, Path], None], bool]] = {}
    for tables in (False, True):
        suffix = " + words" * tables
        settings["dynamic int8" + suffix] = dynamic(tables, False), tables
        settings["dynamic int8 per channel" + suffix] = dynamic(tables, True), tables
        for block in (128, 64, 32):
            settings[f"4 bits, blocks of {block}{suffix}"] = blocks(4, block, False, tables), tables
    settings["4 bits symmetric, blocks of 32"] = blocks(4, 32, True, False), False
    settings["4 bits hqq, blocks of 64"] = blocks(4, 64, False, False, "hqq"), False
    settings["8 bits, blocks of 128"] = blocks(8, 128, True, False), False
    settings["2 bits, blocks of 32"] = blocks(2, 32, False, False), False
    return settings


def baselines(source: Source, version: str) -> Iterator[Baseline]:
    """Every setting, run in ONNX Runtime from its own file."""
    onnx = import_module("onnx")
    with tempfile.TemporaryDirectory() as folder:
        dense, out = Path(folder) / "dense.onnx", Path(folder) / "quantised.onnx"
        onnx.save(graph(source), dense)
        for setting, (quantise, tables) in settings().items():
            start = time.perf_counter()
            quantise(dense, out)
            seconds = time.perf_counter() - start
            session = Session(out, source)
            yield Baseline(
                "onnxruntime",
                version,
                setting,
                linear_bytes(onnx.load(out), source),
                source.weights,
                out.stat().st_size,
                session,
                None if tables else session,
                seconds=seconds,
                note="run in ONNX Runtime" + ", activations 8 bits" * setting.startswith("dynamic"),
            )
