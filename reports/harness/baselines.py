"""What rbe_gpu is measured against: NumPy as a careful user writes it, and PyTorch where it is installed.

Both run the same ops on the same arrays and threads, and both have a BERT encoder of their own, so that a report
compares complete models. Neither uses anything of rbe_gpu.
"""

from __future__ import annotations

import json
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from . import token_ids
from .measure import TORCH, builds

F32 = NDArray[np.float32]


@cache
def torch_or_none() -> Any:
    """The module `torch`, or None when it is not installed, or this process builds nothing that needs it."""
    if not builds(TORCH):
        return None
    try:
        import torch
    except ImportError:
        return None
    return torch


def as_torch(*arrays: F32) -> tuple[Any, ...]:
    """The arrays as tensors over the same memory; as they are when PyTorch is not installed."""
    torch = torch_or_none()
    return arrays if torch is None else tuple(torch.from_numpy(a) for a in arrays)


# --- ops in NumPy, in place where a user would work in place ------------------------------------------------


def erf(x: F32) -> F32:
    """erf(x) to 1.5e-7 in a polynomial (Abramowitz and Stegun 1964, formula 7.1.26): NumPy has none."""
    z = np.abs(x)
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z)
    p: F32 = np.full_like(t, 1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p *= t
        p += np.float32(c)
    p *= t
    z *= z
    np.negative(z, out=z)
    p *= np.exp(z, out=z)
    np.subtract(np.float32(1), p, out=p)
    np.copysign(p, x, out=p)
    return p


def gelu(x: F32, out: F32 | None = None) -> F32:
    """y = x/2 (1 + erf(x / sqrt 2))."""
    y = erf(x * np.float32(1 / sqrt(2)))
    y += np.float32(1)
    y *= np.float32(0.5)
    return np.multiply(x, y, out=out)


def silu(x: F32, out: F32 | None = None) -> F32:
    """y = x / (1 + exp(-x))."""
    e = np.exp(-x)
    e += np.float32(1)
    return np.divide(x, e, out=out)


def softmax(x: F32, out: F32 | None = None) -> F32:
    """y = exp(x - max) / sum exp(x - max) over the last axis."""
    out = np.subtract(x, x.max(axis=-1, keepdims=True), out=out)
    np.exp(out, out=out)
    out /= out.sum(axis=-1, keepdims=True)
    return out


def layer_norm(x: F32, weight: F32, bias: F32, eps: float, out: F32 | None = None) -> F32:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis."""
    out = np.subtract(x, x.mean(axis=-1, keepdims=True), out=out)
    var = np.einsum("...c,...c->...", out, out)[..., None] / np.float32(x.shape[-1])
    out *= np.float32(1) / np.sqrt(var + np.float32(eps))
    out *= weight
    out += bias
    return out


def rms_norm(x: F32, weight: F32, eps: float, out: F32 | None = None) -> F32:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    mean = np.einsum("...c,...c->...", x, x)[..., None] / np.float32(x.shape[-1])
    out = np.multiply(x, np.float32(1) / np.sqrt(mean + np.float32(eps)), out=out)
    out *= weight
    return out


def attention(q: F32, k: F32, v: F32, lengths: NDArray[np.int64] | None = None, causal: bool = False) -> F32:
    """o = softmax(q k^T / sqrt(head_dim)) v, a sequence and head at a time, each with its full score matrix.

    q, k, v : (batch, seq, heads, head_dim)
    """
    batch, seq, heads, head_dim = q.shape
    out = np.zeros_like(q)
    scale = np.float32(1 / sqrt(head_dim))
    for b in range(batch):
        n = seq if lengths is None else int(lengths[b])
        for h in range(heads):
            scores = (q[b, :, h] * scale) @ k[b, :n, h].T
            if causal:
                scores[~np.tri(seq, n, dtype=bool)] = -np.inf
            out[b, :, h] = softmax(scores, out=scores) @ v[b, :n, h]
    return out


# --- whole models -------------------------------------------------------------------------------------------


class Folder:
    """A model folder: configuration, tokenizer (None where it holds token ids), pooling, and weights by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.weights_file = path / "model.safetensors"
        self._stored = token_ids.stored(path)
        self.tokenizer: Any = self._read_tokenizer() if self._stored is None else None
        pooling = path / "1_Pooling" / "config.json"
        chosen = json.loads(pooling.read_text()) if pooling.exists() else {"pooling_mode_mean_tokens": True}
        if not chosen.get("pooling_mode_mean_tokens"):
            raise ValueError(
                f"{path} does not pool by the mean of its tokens; the report's baselines do only that"
            )

    def _read_tokenizer(self) -> Any:
        from tokenizers import Tokenizer  # a folder that holds token ids does without it

        try:
            tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{self.path / 'tokenizer.json'} is not a tokenizer: {error}") from None
        tokenizer.no_padding()
        tokenizer.enable_truncation(self._longest())
        return tokenizer

    def _longest(self) -> int:
        sentence = self.path / "sentence_bert_config.json"
        longest = json.loads(sentence.read_text()).get("max_seq_length") if sentence.exists() else None
        positions = int(self.config["max_position_embeddings"])
        return min(int(longest or positions), positions)

    @cache  # noqa: B019 - one folder lives as long as the report
    def tensor(self, name: str) -> F32:
        """A tensor as float32."""
        with safe_open(self.weights_file, framework="numpy") as f:
            return np.asarray(f.get_tensor(name), np.float32)

    def names(self) -> list[str]:
        """The tensors of the encoder."""
        with safe_open(self.weights_file, framework="numpy") as f:
            names = [n for n in f.keys() if n.startswith(("embeddings.", "encoder."))]  # noqa: SIM118
        return [n for n in names if not n.endswith("position_ids")]

    def batch(self, texts: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids (count, seq), padded with zeros to the longest, and lengths (count,)."""
        return padded(self.encode(texts))

    def encode(self, texts: list[str]) -> token_ids.Ids:
        """The ids of each text by the folder's tokenizer, special tokens included."""
        return [e.ids for e in self.tokenizer.encode_batch(texts)]

    def text_ids(self, kind: str, count: int) -> token_ids.Ids:
        """The ids of the first `count` "calibration" or "held_out" texts of the corpus, stored or encoded here."""
        if self._stored is not None:
            return self._stored[kind][:count]
        return self.encode(token_ids.TEXTS[kind](count))


def padded(encoded: token_ids.Ids) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids (count, seq), padded with zeros to the longest, and lengths (count,)."""
    lengths = np.array([len(e) for e in encoded], np.int64)
    ids = np.zeros((len(encoded), int(lengths.max())), np.int64)
    for row, e in zip(ids, encoded, strict=True):
        row[: len(e)] = e
    return ids, lengths


class _Bert:
    """A BERT encoder over the ops of a library, which a subclass gives.

    weight(name), linear(x, weight, bias), gelu(x), layer_norm(x, weight, bias, eps), and attention(q, k, v, mask)
    over (count, seq, heads, head_dim), mask (count, seq) True where a token is no padding.
    """

    weight: Any
    linear: Any
    gelu: Any
    layer_norm: Any
    attention: Any

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.config = folder.config

    def states(self, ids: Any, mask: Any, activations: dict[str, Any] | None = None) -> Any:
        """Hidden states (count, seq, hidden_size) after the last layer.

        `activations` receives those inside every layer i: "i.x" (its input), "i.q", "i.k", "i.v", "i.attended",
        "i.middle" (before the activation), "i.sum" (before the last norm).
        """
        w, c = self.weight, self.config
        count, seq = ids.shape

        def dense(y: Any, name: str) -> Any:
            return self.linear(y, w(f"{name}.weight"), w(f"{name}.bias"))

        def norm(y: Any, name: str) -> Any:
            return self.layer_norm(y, w(f"{name}.weight"), w(f"{name}.bias"), c["layer_norm_eps"])

        x = w("embeddings.word_embeddings.weight")[ids]
        x += w("embeddings.position_embeddings.weight")[:seq]
        x += w("embeddings.token_type_embeddings.weight")[0]
        x = norm(x, "embeddings.LayerNorm")
        for i in range(c["num_hidden_layers"]):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                dense(x, f"{layer}.attention.self.{part}").reshape(count, seq, c["num_attention_heads"], -1)
                for part in ("query", "key", "value")
            )
            o = self.attention(q, k, v, mask).reshape(x.shape)
            a = dense(o, f"{layer}.attention.output.dense")
            a += x
            a = norm(a, f"{layer}.attention.output.LayerNorm")
            m = dense(a, f"{layer}.intermediate.dense")
            y = dense(self.gelu(m), f"{layer}.output.dense")
            y += a
            if activations is not None:
                named = {"x": x, "q": q, "k": k, "v": v, "attended": o, "middle": m, "sum": y}
                activations.update({f"{i}.{name}": value for name, value in named.items()})
            x = norm(y, f"{layer}.output.LayerNorm")
        return x


class NumpyBert(_Bert):
    """A BERT encoder in NumPy, float32."""

    layer_norm, gelu = staticmethod(layer_norm), staticmethod(gelu)

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        self.weight = folder.tensor

    def linear(self, x: F32, weight: F32, bias: F32) -> F32:
        # one matmul: NumPy makes one per text of a three-dimensional operand
        y: F32 = x.reshape(-1, x.shape[-1]) @ weight.T
        y += bias
        return y.reshape(*x.shape[:-1], len(weight))

    def attention(self, q: F32, k: F32, v: F32, mask: NDArray[np.bool_]) -> Any:
        scaled = q.transpose(0, 2, 1, 3) * np.float32(1 / sqrt(q.shape[-1]))
        scores = scaled @ k.transpose(0, 2, 3, 1)
        scores += np.where(mask, np.float32(0), np.float32(-np.inf))[:, None, None, :]
        return (softmax(scores, out=scores) @ v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def hidden(
        self, ids: NDArray[np.int64], lengths: NDArray[np.int64], activations: dict[str, F32] | None = None
    ) -> F32:
        """Hidden states (count, seq, hidden_size) after the last layer; `activations` as in `states`."""
        return np.asarray(self.states(ids, np.arange(ids.shape[1]) < lengths[:, None], activations))

    def embed(self, texts: list[str]) -> F32:
        """Unit sentence vectors (len(texts), hidden_size): the mean over each text's tokens, normalised."""
        ids, lengths = self.folder.batch(texts)
        x = self.hidden(ids, lengths)
        keep = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.float32)
        vectors = np.einsum("bsh,bs->bh", x, keep) / lengths[:, None].astype(np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


class TorchBert(_Bert):
    """A BERT encoder in torch.nn.functional, with PyTorch's fused attention; float32 on the CPU by default."""

    def __init__(self, folder: Folder, torch: Any, device: str = "cpu", dtype: Any = None) -> None:
        super().__init__(folder)
        self.torch, self.device = torch, device
        self.weights = {n: torch.from_numpy(folder.tensor(n)).to(device, dtype) for n in folder.names()}
        self.weight = self.weights.__getitem__
        self.linear, self.gelu = torch.nn.functional.linear, torch.nn.functional.gelu

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return self.torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)

    def attention(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        mask = None if mask is None else mask[:, None, None, :]
        return self.torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def hidden(self, ids: Any, mask: Any = None) -> Any:
        """Hidden states (count, seq, hidden_size) after the last layer; mask as in `attention`, None: no padding."""
        with self.torch.inference_mode():
            return self.states(ids, mask)

    def embed(self, texts: list[str]) -> F32:
        """Unit sentence vectors (len(texts), hidden_size), as NumPy's."""
        torch = self.torch
        ids_array, lengths_array = self.folder.batch(texts)
        with torch.inference_mode():
            ids = torch.from_numpy(ids_array).to(self.device)
            lengths = torch.from_numpy(lengths_array).to(self.device)
            mask = torch.arange(ids.shape[1], device=self.device)[None, :] < lengths[:, None]
            x = self.hidden(ids, mask).float()
            pooled = (x * mask[..., None]).sum(1) / lengths[:, None]
            return np.asarray(torch.nn.functional.normalize(pooled, dim=1).cpu().numpy())
