"""Cases of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu import reference

from ._case import Args, Case, Data, ErrorCase, Mutant, OpCases
from ._errors import (
    NO_SYNC,
    OUT_ERRORS,
    as_float16,
    as_list,
    narrower,
    shorter,
    strided,
    to_float64,
)


@lru_cache(maxsize=1)
def _qkv(data: Data) -> tuple[NDArray[Any], ...]:
    return data.qkv(4)


def _heads(
    data: Data, which: int, batch: int, seq: int, heads: int, head_dim: int, dtype: Any
) -> NDArray[Any]:
    """Real q, k or v values (which = 0, 1, 2), reshaped if head_dim is not 32."""
    return np.resize(_qkv(data)[which], (batch, seq, heads, head_dim)).astype(dtype)


def _attend(
    batch: int = 2,
    seq_q: int = 33,
    seq_k: int | None = None,
    heads: int = 3,
    kv_heads: int | None = None,
    head_dim: int = 32,
    mask: Callable[[int, int, int, int], NDArray[Any]] | None = None,
    lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> Callable[[Data, Any], Args]:
    def make(data: Data, dtype: Any) -> Args:
        keys, kv = seq_q if seq_k is None else seq_k, kv_heads or heads
        args: Args = {
            "q": _heads(data, 0, batch, seq_q, heads, head_dim, dtype),
            "k": _heads(data, 1, batch, keys, kv, head_dim, dtype),
            "v": _heads(data, 2, batch, keys, kv, head_dim, dtype),
            **options,
        }
        if mask is not None:
            args["mask"] = mask(batch, heads, seq_q, keys)
        if lengths is not None:
            args["lengths"] = np.array(lengths, np.int64)
        return args

    return make


def _alibi(batch: int, heads: int, seq_q: int, seq_k: int) -> Any:
    """Press, Smith and Lewis 2021: -slope * distance, one slope per head. (1, heads, seq_q, seq_k)."""
    distance = np.abs(np.arange(seq_q)[:, None] + seq_k - seq_q - np.arange(seq_k)[None, :])
    return -(distance / 2.0 ** np.arange(1, heads + 1)[:, None, None])[None].astype(np.float32)


def _holes(batch: int, heads: int, seq_q: int, seq_k: int) -> Any:
    """(batch, 1, seq_q, seq_k) bool: True for about two thirds, and nowhere for query 1."""
    b, i, j = np.ogrid[:batch, :seq_q, :seq_k]
    return (((b + 3 * i + 5 * j) % 7 > 1) & (i != 1))[:, None]


def _padding(batch: int, heads: int, seq_q: int, seq_k: int) -> NDArray[np.bool_]:
    """(batch, 1, 1, seq_k): the last keys of each sequence are padding."""
    return (np.arange(seq_k)[None, :] < seq_k - 3 - np.arange(batch)[:, None])[:, None, None]


def _minus_inf(batch: int, heads: int, seq_q: int, seq_k: int) -> NDArray[np.float32]:
    """(seq_q, seq_k): -inf above the diagonal, and in the whole row of query 2."""
    mask = np.triu(np.full((seq_q, seq_k), -np.inf, np.float32), 1)
    mask[2] = -np.inf
    return mask


def _packed_qkv(data: Data, dtype: Any) -> Args:
    """q, k, v as views of one (batch, seq, 3, heads, head_dim) array, as a fused projection returns them."""
    packed = np.stack([_heads(data, which, 2, 31, 3, 32, dtype) for which in range(3)], axis=2)
    return {"q": packed[:, :, 0], "k": packed[:, :, 1], "v": packed[:, :, 2]}


def _head_major(data: Data, dtype: Any) -> Args:
    """(batch, heads, seq, head_dim) arrays viewed as (batch, seq, heads, head_dim)."""
    arrays = (np.ascontiguousarray(_heads(data, i, 2, 31, 3, 32, dtype).swapaxes(1, 2)) for i in range(3))
    return {name: a.swapaxes(1, 2) for name, a in zip("qkv", arrays, strict=True)}


def _with_nan(data: Data, dtype: Any) -> Args:
    """NaN in one query, one key and one value; keys and values past the length are NaN and must not be read."""
    args = _attend(seq_q=5, seq_k=9, lengths=(9, 6))(data, dtype)
    args["q"][0, 2, 0, 3] = np.nan
    args["k"][0, 4, 1, 3] = np.nan
    args["v"][0, 5, 2, 7] = np.nan
    for name in "kv":
        args[name][1, 6:] = np.nan
    return args


def _not_a_number_beyond(data: Data, dtype: Any) -> Args:
    """Keys and values beyond a length are NaN or infinite, and must not count."""
    args = _attend(seq_q=70, seq_k=200, heads=2, kv_heads=1, head_dim=96, lengths=(200, 70))(data, dtype)
    for name, value in (("k", np.nan), ("v", np.inf)):
        args[name][1, 70:] = value
        args[name][1, 150:] = -np.inf if name == "k" else np.nan
    return {**args, "return_lse": True}


def _large_scores(data: Data, dtype: Any) -> Args:
    """Scores of 1e9 with exact sums in float32: the largest takes all of the weight, or equal ones share it."""
    args = _attend(batch=1, seq_q=70, seq_k=300, heads=1, head_dim=128, causal=True, scale=0.25)(data, dtype)
    for name in "qk":
        args[name] = np.where(args[name] > 0, 2.0**14, -(2.0**14)).astype(dtype)
    return args


def _varlen(
    lengths: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    heads: int = 3,
    kv_heads: int | None = None,
    head_dim: int = 32,
    ends: Any = np.int64,
    **options: Any,
) -> Callable[[Data, Any], Args]:
    """Packed sequences of `lengths` queries and `lengths_k` keys (None: the same)."""

    def make(data: Data, dtype: Any) -> Args:
        key_lengths = lengths if lengths_k is None else lengths_k
        args: Args = {
            "q": _heads(data, 0, 1, sum(lengths), heads, head_dim, dtype)[0],
            "k": _heads(data, 1, 1, sum(key_lengths), kv_heads or heads, head_dim, dtype)[0],
            "v": _heads(data, 2, 1, sum(key_lengths), kv_heads or heads, head_dim, dtype)[0],
            "cu_seqlens_q": np.cumsum((0, *lengths), dtype=ends),
            **options,
        }
        if lengths_k is not None:
            args["cu_seqlens_k"] = np.cumsum((0, *lengths_k), dtype=ends)
        return args

    return make


def _relative(batch: int, heads: int, seq_q: int, seq_k: int) -> NDArray[np.float32]:
    """(heads, seq_q, seq_k): a number for every distance and head, as a view of (heads, distances)."""
    distances = np.sin(np.arange(heads * (seq_q + seq_k - 1), dtype=np.float32)).reshape(heads, -1)
    first, step = distances[:, seq_q - 1 :], distances.strides[1]
    return np.lib.stride_tricks.as_strided(first, (heads, seq_q, seq_k), (distances.strides[0], -step, step))


def _varlen_masked(
    mask: Callable[[int, int, int, int], NDArray[Any]],
    lengths: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    **options: Any,
) -> Callable[[Data, Any], Args]:
    """Packed sequences with a mask that has a row and a column more than the longest."""

    def make(data: Data, dtype: Any) -> Args:
        args = _varlen(lengths, lengths_k, **options)(data, dtype)
        args["mask"] = mask(len(lengths), 3, max(lengths) + 1, max(lengths_k or lengths) + 1)
        return args

    return make


def _varlen_with_nan(data: Data, dtype: Any) -> Args:
    """NaN in one query, one key and one value: each affects only its own sequence."""
    args = _varlen((9, 5, 0, 7), return_lse=True)(data, dtype)
    args["q"][10, 0, 3] = np.nan
    args["k"][3, 1, 3] = np.nan
    args["v"][20, 2, 7] = np.nan
    return args


def _expected(args: Args) -> dict[str, NDArray[np.float64]]:
    o, lse = reference.attention(**{**args, "return_lse": True})
    return {"out": o, "lse": lse} if args.get("return_lse") else {"out": o}


def _packed(**change: Any) -> dict[str, Any]:
    """Changes that make the valid arguments packed: 10 queries and 14 keys."""
    ends = {"cu_seqlens_q": np.array([0, 5, 10]), "cu_seqlens_k": np.array([0, 7, 14])}
    return {**{n: lambda a: a.reshape(-1, *a.shape[2:]) for n in ("q", "k", "v", "out")}, **ends, **change}


CASES = OpCases(
    "attention",
    output_like=lambda args, dtype: (args["q"].shape, args["q"].dtype),
    expected=_expected,
    cases=(
        Case("plain", _attend()),
        *(Case(f"head_dim {d}", _attend(heads=2, head_dim=d, seq_q=31)) for d in (1, 31, 33, 64, 128, 256)),
        *(
            Case(
                f"head_dim {d}, several tiles, causal, lse",
                _attend(
                    batch=1,
                    seq_q=200,
                    seq_k=270,
                    heads=2,
                    kv_heads=1,
                    head_dim=d,
                    causal=True,
                    return_lse=True,
                ),
                ("float16", "bfloat16"),
            )
            for d in (64, 128)
        ),
        *(
            Case(name, make, ("float16", "bfloat16"))
            for name, make in {
                "head_dim 64, window, lengths 0 and short": _attend(
                    batch=3, seq_q=200, heads=2, kv_heads=1, head_dim=64, window=(40, 9), lengths=(0, 11, 200)
                ),
                "head_dim 128, window, more keys, short lengths": _attend(
                    seq_q=140, seq_k=300, heads=1, head_dim=128, window=(70, 0), lengths=(300, 1)
                ),
                "head_dim 96, NaN and Inf beyond lengths": _not_a_number_beyond,
                "head_dim 128, scores of 1e9": _large_scores,
                "varlen, head_dim 64, empty sequence, lse": _varlen(
                    (150, 0, 1, 200), heads=2, kv_heads=1, head_dim=64, causal=True, return_lse=True
                ),
                "varlen, head_dim 96, other keys, lse": _varlen(
                    (5, 0, 150, 3), (30, 4, 0, 265), heads=2, head_dim=96, return_lse=True
                ),
            }.items()
        ),
        *(Case(f"seq {n}", _attend(seq_q=n, heads=1, batch=1), ("float32",)) for n in (1, 63, 64, 65, 130)),
        Case("causal", _attend(causal=True)),
        Case("causal, more keys", _attend(seq_q=5, seq_k=65, causal=True)),
        Case("causal, more queries", _attend(seq_q=33, seq_k=20, causal=True)),
        Case("one query", _attend(seq_q=1, seq_k=65)),
        Case("one query a head", _attend(seq_q=1, seq_k=150, heads=6, kv_heads=2, head_dim=64)),
        Case(
            "few queries, lengths",
            _attend(seq_q=2, seq_k=130, heads=4, kv_heads=2, head_dim=33, lengths=(0, 70)),
        ),
        Case("one query, causal, lengths", _attend(seq_q=1, seq_k=65, causal=True, lengths=(65, 12))),
        Case("one key", _attend(seq_q=33, seq_k=1)),
        Case("lengths", _attend(lengths=(33, 7))),
        Case("lengths 0", _attend(lengths=(0, 12))),
        Case("causal lengths", _attend(lengths=(30, 7), causal=True), ("float32",)),
        Case("window", _attend(window=(4, 2))),
        Case("window left", _attend(window=(4, -1)), ("float32",)),
        Case("window right", _attend(window=(-1, 0)), ("float32",)),
        Case("window causal", _attend(window=(4, 4), causal=True), ("float32",)),
        Case("window, more keys", _attend(seq_q=9, seq_k=65, window=(3, 0)), ("float32",)),
        Case("mask ALiBi", _attend(mask=_alibi), ("float32", "float16")),
        Case("mask with holes", _attend(mask=_holes), ("float32", "bfloat16")),
        Case("mask padding", _attend(mask=_padding), ("float32",)),
        Case("mask -inf", _attend(mask=_minus_inf), ("float32",)),
        Case(
            "mask and causal and lengths", _attend(mask=_holes, causal=True, lengths=(33, 20)), ("float32",)
        ),
        Case("grouped", _attend(heads=6, kv_heads=2)),
        Case("multi-query", _attend(heads=6, kv_heads=1)),
        Case(
            "grouped causal lengths",
            _attend(heads=4, kv_heads=2, causal=True, lengths=(11, 33)),
            ("float32",),
        ),
        Case("scale", _attend(scale=0.05)),
        Case("scale negative", _attend(scale=-0.1), ("float32",)),
        Case("softcap", _attend(softcap=2.0)),
        Case("softcap, one query a head", _attend(seq_q=1, seq_k=150, heads=6, kv_heads=2, softcap=5.0)),
        Case(
            "softcap, causal, mask, lse, head_dim 256",
            _attend(seq_q=40, heads=2, head_dim=256, causal=True, mask=_alibi, softcap=50.0, return_lse=True),
        ),
        Case("packed", _packed_qkv),
        Case("head-major", _head_major),
        Case("no sequence", _attend(batch=0)),
        Case("no query", _attend(seq_q=0, seq_k=5)),
        Case("NaN", _with_nan),
        Case("softcap, NaN", lambda data, dtype: {**_with_nan(data, dtype), "softcap": 3.0}),
        Case("lse", _attend(return_lse=True)),
        Case("lse, lengths 0", _attend(lengths=(0, 12), return_lse=True), ("float32",)),
        Case("lse, causal, more queries", _attend(seq_q=33, seq_k=20, causal=True, return_lse=True)),
        Case(
            "lse, mask ALiBi, grouped",
            _attend(heads=4, kv_heads=2, mask=_alibi, return_lse=True),
            ("float32",),
        ),
        Case("lse, mask -inf", _attend(mask=_minus_inf, return_lse=True), ("float32",)),
        Case("lse, NaN", lambda data, dtype: {**_with_nan(data, dtype), "return_lse": True}),
        Case("lse, no keys", _attend(seq_q=3, seq_k=0, return_lse=True), ("float32",)),
        Case("varlen", _varlen((33, 7, 20))),
        Case("varlen, causal, lse", _varlen((33, 7, 20), causal=True, return_lse=True)),
        Case("varlen, int32, empty sequences", _varlen((0, 5, 0, 0, 64, 1, 0), ends=np.int32)),
        Case("varlen, one sequence", _varlen((65,), causal=True), ("float32",)),
        Case("varlen, other keys", _varlen((5, 0, 20, 3), (30, 4, 0, 65), return_lse=True)),
        Case("varlen, other keys, causal", _varlen((5, 33, 1), (30, 20, 65), causal=True, return_lse=True)),
        Case("varlen, window", _varlen((33, 7, 70), window=(4, 2)), ("float32",)),
        Case("varlen, softcap, window", _varlen((33, 7, 70), window=(4, 0), softcap=2.0), ("float32",)),
        Case("varlen, grouped", _varlen((33, 7), heads=6, kv_heads=2, head_dim=64, causal=True)),
        Case(
            "varlen, several tiles",
            _varlen((300, 17, 130), heads=2, causal=True, return_lse=True),
            ("float32",),
        ),
        Case("varlen, no sequence", _varlen((), return_lse=True)),
        Case("varlen, no tokens", _varlen((0, 0), return_lse=True), ("float32",)),
        Case("varlen, NaN", _varlen_with_nan),
        Case("varlen, relative positions", _varlen_masked(_relative, (33, 0, 7, 20))),
        Case(
            "varlen, mask with holes", _varlen_masked(_holes, (5, 33, 2), (30, 7, 65)), ("float32", "float16")
        ),
        Case(
            "varlen, causal, mask, lse",
            _varlen_masked(_relative, (9, 40), causal=True, return_lse=True),
            ("float32",),
        ),
    ),
    valid_args=_attend(seq_q=5, seq_k=7, heads=4),
    errors=(
        ErrorCase("q 3-D", {"q": lambda a: a[0]}, ValueError, "axes"),
        ErrorCase("q float64", {"q": to_float64}, TypeError, "float64"),
        ErrorCase("q a list", {"q": as_list}, TypeError, "numpy"),
        ErrorCase("q strided", {"q": strided}, ValueError, "contiguous"),
        ErrorCase("k of another dtype", {"k": as_float16}, TypeError, "k has dtype"),
        ErrorCase("k of another batch", {"k": shorter}, ValueError, "k has shape"),
        ErrorCase("v of fewer keys", {"v": lambda a: a[:, :6]}, ValueError, "v has shape"),
        ErrorCase("v of another head_dim", {"v": narrower}, ValueError, "v has shape"),
        ErrorCase("heads no multiple", {n: lambda a: a[:, :, :3] for n in "kv"}, ValueError, "multiple"),
        ErrorCase(
            "head_dim 257", {n: lambda a: np.resize(a, (1, 2, 1, 257)) for n in "qkv"}, ValueError, "257"
        ),
        ErrorCase("mask shape", {"mask": np.ones((5, 6), bool)}, ValueError, "mask has shape"),
        ErrorCase("mask float64", {"mask": np.ones((5, 7))}, TypeError, "mask has dtype"),
        ErrorCase("mask int64", {"mask": np.ones((5, 7), np.int64)}, TypeError, "mask has dtype"),
        ErrorCase("lengths float", {"lengths": np.ones(2, np.float32)}, TypeError, "integers"),
        ErrorCase("lengths count", {"lengths": np.ones(3, np.int64)}, ValueError, "lengths has shape"),
        ErrorCase("lengths too long", {"lengths": np.array([3, 8])}, ValueError, "seq_k=7", NO_SYNC),
        ErrorCase("lengths negative", {"lengths": np.array([3, -1])}, ValueError, "seq_k=7", NO_SYNC),
        ErrorCase("window", {"window": (-2, 0)}, ValueError, "window"),
        ErrorCase("softcap 0", {"softcap": 0.0}, ValueError, "softcap=0.0"),
        ErrorCase("softcap NaN", {"softcap": np.nan}, ValueError, "softcap=nan"),
        ErrorCase("packed with 4 axes", {"cu_seqlens_q": np.array([0, 5])}, ValueError, "axes"),
        ErrorCase("packed with lengths", _packed(lengths=np.array([5, 7])), ValueError, "lengths"),
        ErrorCase("packed, mask 1-D", _packed(mask=np.ones(14, bool)), ValueError, "mask has 1 axes"),
        ErrorCase(
            "packed, mask of other heads",
            _packed(mask=np.ones((3, 10, 14), bool)),
            ValueError,
            "mask has shape",
        ),
        ErrorCase("packed, few rows", _packed(mask=np.ones((4, 14), bool)), ValueError, "4 rows", NO_SYNC),
        ErrorCase(
            "packed, few columns", _packed(mask=np.ones((5, 6), bool)), ValueError, "6 columns", NO_SYNC
        ),
        ErrorCase("packed keys alone", {"cu_seqlens_k": np.array([0, 7])}, ValueError, "cu_seqlens_q"),
        ErrorCase("packed, keys not said", _packed(cu_seqlens_k=None), ValueError, "cu_seqlens_k"),
        ErrorCase(
            "cu_seqlens_q float",
            _packed(cu_seqlens_q=np.array([0.0, 5.0, 10.0])),
            TypeError,
            "cu_seqlens_q",
        ),
        ErrorCase(
            "cu_seqlens_q 2-D", _packed(cu_seqlens_q=np.array([[0, 5, 10]])), ValueError, "cu_seqlens_q"
        ),
        ErrorCase(
            "cu_seqlens_q empty",
            _packed(cu_seqlens_q=np.array([], np.int64)),
            ValueError,
            "cu_seqlens_q",
        ),
        ErrorCase(
            "cu_seqlens_q from 1",
            _packed(cu_seqlens_q=np.array([1, 5, 10])),
            ValueError,
            "cu_seqlens_q",
            NO_SYNC,
        ),
        ErrorCase(
            "cu_seqlens_q falls",
            _packed(cu_seqlens_q=np.array([0, 11, 10])),
            ValueError,
            "cu_seqlens_q",
            NO_SYNC,
        ),
        ErrorCase(
            "cu_seqlens_q short",
            _packed(cu_seqlens_q=np.array([0, 5, 9])),
            ValueError,
            "cu_seqlens_q",
            NO_SYNC,
        ),
        ErrorCase(
            "cu_seqlens_k long",
            _packed(cu_seqlens_k=np.array([0, 5, 15])),
            ValueError,
            "cu_seqlens_k",
            NO_SYNC,
        ),
        ErrorCase(
            "cu_seqlens_k of fewer", _packed(cu_seqlens_k=np.array([0, 14])), ValueError, "cu_seqlens_k"
        ),
        *OUT_ERRORS,
    ),
    mutants=(
        Mutant("masks", "if (!whole) mask_scores<8>", "if (false) mask_scores<8>", "causal", "float16"),
        Mutant("cap", "if (p.capped) {", "if (false) {", "softcap", "float16"),
        Mutant(
            "masks on Hopper",
            "if (!whole) mask_scores<8>",
            "if (false) mask_scores<8>",
            "head_dim 64, several tiles, causal, lse",
            "float16",
            source="attention_wgmma",
        ),
    ),
)
