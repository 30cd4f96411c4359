"""What rbe_gpu is measured against: NumPy as a careful user writes it, and PyTorch where it is installed.

Both run the same ops on the same arrays and threads, and both carry a whole BERT of their own, so that a
report compares complete models. Neither uses anything of rbe_gpu.
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
from tokenizers import Tokenizer

F32 = NDArray[np.float32]


@cache
def torch_or_none() -> Any:
    """The module `torch`, or None when it is not installed."""
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
    """A model folder: configuration, tokenizer, pooling, and weights by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.weights_file = path / "model.safetensors"
        try:
            self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path / 'tokenizer.json'} is not a tokenizer: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self._longest())
        pooling = path / "1_Pooling" / "config.json"
        chosen = json.loads(pooling.read_text()) if pooling.exists() else {"pooling_mode_mean_tokens": True}
        if not chosen.get("pooling_mode_mean_tokens"):
            raise ValueError(
                f"{path} does not pool by the mean of its tokens; the report's peers do only that"
            )

    def _longest(self) -> int:
        sentence = self.path / "sentence_bert_config.json"
        told = json.loads(sentence.read_text()).get("max_seq_length") if sentence.exists() else None
        return int(told or self.config["max_position_embeddings"])

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
        encoded = [e.ids for e in self.tokenizer.encode_batch(texts)]
        lengths = np.array([len(e) for e in encoded], np.int64)
        ids = np.zeros((len(encoded), int(lengths.max())), np.int64)
        for row, e in zip(ids, encoded, strict=True):
            row[: len(e)] = e
        return ids, lengths


def _unit(vectors: F32) -> F32:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


class NumpyBert:
    """A BERT encoder in NumPy, float32."""

    name = "NumPy"

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.config = folder.config

    def hidden(
        self, ids: NDArray[np.int64], lengths: NDArray[np.int64], seen: dict[str, F32] | None = None
    ) -> F32:
        """Hidden states (count, seq, hidden_size) after the last layer.

        `seen`, when given, receives what flows inside every layer i: "i.x" (its input), "i.q", "i.k", "i.v",
        "i.attended", "i.middle" (before the activation), "i.sum" (before the last norm).
        """
        w, c = self.folder.tensor, self.config
        count, seq = ids.shape
        heads, eps = c["num_attention_heads"], c["layer_norm_eps"]
        x = w("embeddings.word_embeddings.weight")[ids]
        x += w("embeddings.position_embeddings.weight")[:seq]
        x += w("embeddings.token_type_embeddings.weight")[0]
        x = layer_norm(x, w("embeddings.LayerNorm.weight"), w("embeddings.LayerNorm.bias"), eps, out=x)
        head_dim = x.shape[-1] // heads
        padding = np.where(np.arange(seq) < lengths[:, None], np.float32(0), np.float32(-np.inf))
        for i in range(c["num_hidden_layers"]):

            def dense(y: F32, name: str, layer: int = i) -> F32:
                # one product of two matrices: NumPy makes one per text of a three-dimensional operand
                rows: F32 = y.reshape(-1, y.shape[-1]) @ w(f"encoder.layer.{layer}.{name}.weight").T
                rows += w(f"encoder.layer.{layer}.{name}.bias")
                return rows.reshape(*y.shape[:-1], -1)

            def norm(y: F32, name: str, layer: int = i) -> F32:
                weight, bias = (w(f"encoder.layer.{layer}.{name}.{part}") for part in ("weight", "bias"))
                return layer_norm(y, weight, bias, eps)

            q, k, v = (
                dense(x, f"attention.self.{part}").reshape(count, seq, heads, head_dim)
                for part in ("query", "key", "value")
            )
            q_rows = q.transpose(0, 2, 1, 3) * np.float32(1 / sqrt(head_dim))
            scores = q_rows @ k.transpose(0, 2, 3, 1)
            scores += padding[:, None, None, :]
            o = (softmax(scores, out=scores) @ v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3).reshape(x.shape)
            a = dense(o, "attention.output.dense")
            a += x
            a = norm(a, "attention.output.LayerNorm")
            m = dense(a, "intermediate.dense")
            y = dense(gelu(m), "output.dense")
            y += a
            if seen is not None:
                seen.update(
                    {f"{i}.x": x, f"{i}.q": q, f"{i}.k": k, f"{i}.v": v, f"{i}.attended": o, f"{i}.middle": m,
                     f"{i}.sum": y}
                )  # fmt: skip
            x = norm(y, "output.LayerNorm")
        return x

    def embed(self, texts: list[str]) -> F32:
        """Unit sentence vectors (len(texts), hidden_size): the mean over each text's tokens, normalised."""
        ids, lengths = self.folder.batch(texts)
        x = self.hidden(ids, lengths)
        keep = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.float32)
        return _unit(np.einsum("bsh,bs->bh", x, keep) / lengths[:, None].astype(np.float32))


class TorchBert:
    """A BERT encoder in torch.nn.functional, with PyTorch's fused attention; float32 on the CPU by default."""

    name = "PyTorch"

    def __init__(self, folder: Folder, torch: Any, device: str = "cpu", dtype: Any = None) -> None:
        self.torch = torch
        self.folder = folder
        self.config = folder.config
        self.device = device
        self.weights = {n: torch.from_numpy(folder.tensor(n)).to(device, dtype) for n in folder.names()}

    def hidden(self, ids: Any, real: Any = None) -> Any:
        """Hidden states (count, seq, hidden_size) after the last layer.

        Parameters
        ----------
        ids : (count, seq), on the device
        real : (count, seq) bool, True where a token is no padding; None: everywhere
        """
        torch = self.torch
        f = torch.nn.functional
        w, c = self.weights, self.config
        with torch.inference_mode():
            count, seq = ids.shape
            heads, eps = c["num_attention_heads"], c["layer_norm_eps"]
            x = f.embedding(ids, w["embeddings.word_embeddings.weight"])
            x += w["embeddings.position_embeddings.weight"][:seq]
            x += w["embeddings.token_type_embeddings.weight"][0]
            e = "embeddings.LayerNorm."
            x = f.layer_norm(x, x.shape[-1:], w[e + "weight"], w[e + "bias"], eps)
            mask = None if real is None else real[:, None, None, :]
            for i in range(c["num_hidden_layers"]):

                def dense(y: Any, name: str, layer: int = i) -> Any:
                    at = f"encoder.layer.{layer}.{name}."
                    return f.linear(y, w[at + "weight"], w[at + "bias"])

                def norm(y: Any, name: str, layer: int = i) -> Any:
                    at = f"encoder.layer.{layer}.{name}."
                    return f.layer_norm(y, y.shape[-1:], w[at + "weight"], w[at + "bias"], eps)

                q, k, v = (
                    dense(x, f"attention.self.{part}").view(count, seq, heads, -1).transpose(1, 2)
                    for part in ("query", "key", "value")
                )
                o = f.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                o = dense(o.transpose(1, 2).reshape(x.shape), "attention.output.dense")
                a = norm(o + x, "attention.output.LayerNorm")
                x = norm(
                    dense(f.gelu(dense(a, "intermediate.dense")), "output.dense") + a, "output.LayerNorm"
                )
            return x

    def embed(self, texts: list[str]) -> F32:
        """Unit sentence vectors (len(texts), hidden_size), as NumPy's."""
        torch = self.torch
        ids_array, lengths_array = self.folder.batch(texts)
        with torch.inference_mode():
            ids = torch.from_numpy(ids_array).to(self.device)
            lengths = torch.from_numpy(lengths_array).to(self.device)
            real = torch.arange(ids.shape[1], device=self.device)[None, :] < lengths[:, None]
            x = self.hidden(ids, real).float()
            pooled = (x * real[..., None]).sum(1) / lengths[:, None]
            return np.asarray(torch.nn.functional.normalize(pooled, dim=1).cpu().numpy())
