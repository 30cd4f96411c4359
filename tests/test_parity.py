"""MiniLM in this package, in Candle and in PyTorch: the same weights, texts and hidden states.

Candle's Python model (`candle.models.bert`) runs in float32, and in float64 as a second reference, independent of
`tests.real`. The PyTorch test is skipped only if PyTorch is not installed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import candle
import numpy as np
import pytest
from candle.models.bert import BertModel, Config
from candle.utils import load_safetensors

from rbe_gpu.models import BertEncoder, load

from . import real

TOLERANCE = 1e-5  # relative Frobenius, float32 against float32 through all layers; measured 1e-6
ORACLES = 1e-9  # float64 against float64: Candle's erf is a rational approximation


@cache
def minilm() -> BertEncoder:
    return load(real.MODEL_DIR)


@cache
def candle_model(double: bool = False) -> Any:
    known = Config.__dataclass_fields__
    model = BertModel(Config(**{k: v for k, v in real.config().items() if k in known}))
    model.load_state_dict(load_safetensors(str(real.WEIGHTS)))
    return model.to(candle.f64) if double else model


def candle_states(ids: np.ndarray, mask: np.ndarray | None = None, double: bool = False) -> list[np.ndarray]:
    """Candle's hidden states, (batch, seq, 384): after the embeddings and after each layer."""
    model = candle_model(double)
    x = model.embeddings.forward(_u32(ids), _u32(np.zeros_like(ids)))
    added = None
    if mask is not None:
        added = candle.Tensor(np.where(mask, 0.0, -np.inf).tolist()).to_dtype(x.dtype)
    states = [x]
    for layer in model.encoder.layer:
        states.append(layer.forward(states[-1], attention_mask=added))
    return [np.array(s.values()) for s in states]


def _u32(ids: np.ndarray) -> Any:
    return candle.Tensor(ids.tolist()).to_dtype(candle.u32)


def relative(result: Any, expected: Any) -> float:
    difference = np.asarray(result, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.mark.parametrize("index", range(4))
def test_candle_on_single_texts(index: int) -> None:
    ids, lengths = real.batch(8)
    one = ids[index : index + 1, : lengths[index]]
    theirs = candle_states(one)
    mine = minilm().forward(one, all_hidden_states=True)
    assert len(mine) == len(theirs) == 7
    for a, b in zip(mine, theirs, strict=True):
        assert relative(a, b) <= TOLERANCE


def test_candle_on_a_padded_batch() -> None:
    ids, lengths = real.batch(8)
    text = np.arange(ids.shape[1]) < lengths[:, None]
    theirs = candle_states(ids, text)
    mine = minilm().forward(ids, lengths, all_hidden_states=True)
    for a, b in zip(mine, theirs, strict=True):
        assert relative(a[text], b[text]) <= TOLERANCE


def test_candle_s_whole_forward() -> None:
    """`BertModel.forward`, with its own attention mask."""
    ids, lengths = real.batch(8)
    text = np.arange(ids.shape[1]) < lengths[:, None]
    mask = candle.Tensor(text.astype(int).tolist()).to_dtype(candle.u8)
    theirs, _ = candle_model().forward(_u32(ids), _u32(np.zeros_like(ids)), mask)
    assert relative(minilm().forward(ids, lengths)[text], np.array(theirs.values())[text]) <= TOLERANCE


def test_candle_in_float64_agrees_with_the_oracle() -> None:
    """The float64 hidden states that other tests compare with."""
    ids, lengths = real.batch(8)
    text = np.arange(ids.shape[1]) < lengths[:, None]
    for a, b in zip(real.hidden_states(8), candle_states(ids, text, double=True), strict=True):
        assert relative(a[text], b[text]) <= ORACLES


def test_pytorch() -> None:
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    ids, lengths = real.batch(8)
    text = np.arange(ids.shape[1]) < lengths[:, None]
    w = {n: torch.from_numpy(real.weight(n).copy()) for n in real.weight_names()}
    config = real.config()
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def dense(x: Any, name: str) -> Any:
        return f.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x: Any, name: str) -> Any:
        return f.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    with torch.inference_mode():
        e = "embeddings."
        x = f.embedding(torch.from_numpy(ids), w[e + "word_embeddings.weight"])
        x = x + w[e + "position_embeddings.weight"][: ids.shape[1]] + w[e + "token_type_embeddings.weight"][0]
        x = norm(x, e + "LayerNorm")
        theirs = [x]
        keep = torch.from_numpy(text)[:, None, None, :]
        for i in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{i}."
            q, k, v = (
                dense(x, f"{at}attention.self.{n}").unflatten(-1, (heads, -1)).transpose(1, 2)
                for n in ("query", "key", "value")
            )
            o = f.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)
            x = norm(dense(o, at + "attention.output.dense") + x, at + "attention.output.LayerNorm")
            hidden = f.gelu(dense(x, at + "intermediate.dense"))
            x = norm(dense(hidden, at + "output.dense") + x, at + "output.LayerNorm")
            theirs.append(x)
    mine = minilm().forward(ids, lengths, all_hidden_states=True)
    for a, b in zip(mine, theirs, strict=True):
        assert relative(a[text], b.numpy()[text]) <= TOLERANCE
