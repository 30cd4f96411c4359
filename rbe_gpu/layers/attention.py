"""RBEAttention: multi-head attention with its four projections."""

from __future__ import annotations

from math import prod
from typing import Any, cast

import numpy as np

from .. import ops
from ..blocks import Array
from ..cache import PanelCache
from ..dispatch import as_cupy, backend_of, device_of, module_of, to_host
from ..matmul import PreparedInput, algorithms_of, prepare_input
from ..workspace import Workspace
from .attention_transform_domain import TransformDomainAttention
from .attention_with_cache import attend_with_cache
from .kv_cache import KVLayer
from .norm import RBERMSNorm
from .rbe_linear import RBELinear, compressed
from .rotary import RBERotary


class RBEAttention:
    """y = output(concat_h softmax(scale * q_h k_h^T + mask) v_h) + residual; q = query(x), k = key(c), v =
    value(c).

    c is x itself, or `context` (cross attention). Padded sequences are (batch, seq, hidden) with their
    `lengths`. Packed sequences are (tokens, hidden), end to end without padding, with their `lengths`, which add up
    to the tokens, or with `cu_seqlens`, the cumulative lengths.

    As in decoders, queries and keys may be normalised head by head (`query_norm`, `key_norm`) and then rotated by
    their positions (`rotary`), and keys and values of earlier tokens may come from a `KVCache`.

    Parameters
    ----------
    query : RBELinear, hidden -> num_heads * head_dim
    key, value : RBELinear, hidden -> num_kv_heads * head_dim
    output : RBELinear, num_heads * head_dim -> hidden
    num_heads : query heads
    num_kv_heads : key/value heads, a divisor of num_heads (grouped-query attention; 1: multi-query); by
        default num_heads
    causal, window, scale : as in `rbe_gpu.attention`
    query_norm, key_norm : RBERMSNorm of head_dim features, or None
    rotary : RBERotary, or None
    softcap : as in `rbe_gpu.attention`
    """

    def __init__(
        self,
        query: RBELinear,
        key: RBELinear,
        value: RBELinear,
        output: RBELinear,
        num_heads: int,
        num_kv_heads: int | None = None,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        scale: float | None = None,
        query_norm: RBERMSNorm | None = None,
        key_norm: RBERMSNorm | None = None,
        rotary: RBERotary | None = None,
        softcap: float | None = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or query.out_features % num_heads:
            raise ValueError(
                f"query gives {query.out_features} features, not a multiple of num_heads={num_heads}"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
        head_dim = query.out_features // num_heads
        for name, linear in (("key", key), ("value", value)):
            if linear.out_features != num_kv_heads * head_dim:
                raise ValueError(
                    f"{name} gives {linear.out_features} features, expected num_kv_heads * head_dim = "
                    f"{num_kv_heads} * {head_dim}"
                )
        if key.in_features != value.in_features:
            raise ValueError(f"key takes {key.in_features} features, value takes {value.in_features}")
        if output.in_features != query.out_features:
            raise ValueError(f"output takes {output.in_features} features, query gives {query.out_features}")
        for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
            if norm is not None and tuple(norm.weight.shape) != (head_dim,):
                raise ValueError(
                    f"{name} has shape {tuple(norm.weight.shape)}, expected ({head_dim},) (head_dim)"
                )
        if rotary is not None and rotary.rotary_dim > head_dim:
            raise ValueError(f"rotary has {rotary.rotary_dim} features, a head has {head_dim}")
        self.query = query
        self.key = key
        self.value = value
        self.output = output
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.window = window
        self.scale = scale
        self.query_norm = query_norm
        self.key_norm = key_norm
        self.rotary = rotary
        self.softcap = softcap
        self._derived: TransformDomainAttention | None = None

    @classmethod
    def from_dense(
        cls,
        query: Array,
        key: Array,
        value: Array,
        output: Array,
        num_heads: int,
        num_kv_heads: int | None = None,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        scale: float | None = None,
        *,
        query_bias: Array | None = None,
        key_bias: Array | None = None,
        value_bias: Array | None = None,
        output_bias: Array | None = None,
        cache: PanelCache | int | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
        **options: Any,
    ) -> RBEAttention:
        """Compress the four weights: grade=, ratio=, rmse=, density=, block=, transform=, basis=, codes= are passed
        to `rbe_gpu.compress`. Without any of them the weights stay dense. The four projections share `cache`, and
        each has this `method` and `activation_bits` (`RBELinear`).
        """
        shared = PanelCache(cache) if isinstance(cache, int) else cache
        pairs = ((query, query_bias), (key, key_bias), (value, value_bias), (output, output_bias))
        q, k, v, o = (
            RBELinear(
                compressed(w, "matrix", options),
                b,
                cache=shared,
                method=method,
                activation_bits=activation_bits,
            )
            for w, b in pairs
        )
        return cls(q, k, v, o, num_heads, num_kv_heads, causal, window, scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory."""
        parts = (self.query, self.key, self.value, self.output, self.query_norm, self.key_norm)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(
        self,
        x: Array,
        lengths: Array | None = None,
        mask: Array | None = None,
        residual: Array | None = None,
        context: Array | None = None,
        out: Array | None = None,
        workspace: Workspace | None = None,
        cu_seqlens: Array | None = None,
        positions: Array | None = None,
        cache: KVLayer | None = None,
    ) -> Array:
        """Attend.

        Parameters
        ----------
        x : (batch, seq, hidden), or (tokens, hidden) for packed sequences
        lengths : (batch,) integers: valid keys of each sequence (of `context` where that is given); for
            packed sequences the length of each
        mask : broadcastable to (batch, num_heads, seq, seq_k), float32 (added) or bool (True keeps); for packed
            sequences to (batch, num_heads, rows, columns), whose first ones a sequence reads (`rbe_gpu.attention`)
        residual : like the result, added to it
        context : (batch, seq_k, context_hidden), the input of key and value; not for packed sequences
        cu_seqlens : (batch + 1,) int32/int64, on the device of x: for packed sequences instead of `lengths`.
            Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. On a GPU they are neither read on the host nor
            copied, except with `cache`
        positions : x.shape[:-1] integers, for `rotary`; None: 0, 1, 2, ... in each sequence, behind those of `cache`
        cache : earlier tokens of each packed sequence, which are attended to as well; needs `causal`. The keys and
            values of these tokens are written behind them (`KVCache.layer`); its lengths are left as they are

        Returns
        -------
        (batch, seq, hidden) or (tokens, hidden), dtype of x. Rows of padding are undefined.
        """
        x = as_cupy(x)
        workspace = (workspace or Workspace()).on(device_of(x, "x"))
        context = as_cupy(context)
        projections: RBEAttention | TransformDomainAttention = self
        if cache is None:  # keys that are cached are those of every later call, whatever its size
            context_tokens = None if context is None else prod(context.shape[:-1])
            projections = self.projections(prod(x.shape[:-1]), x.dtype, context_tokens)
        heads = self._mix(projections, x, lengths, mask, context, workspace, cu_seqlens, positions, cache)
        return projections.output(heads, residual, out=out, workspace=workspace)

    def projections(
        self, tokens: int, dtype: Any, context_tokens: int | None = None
    ) -> RBEAttention | TransformDomainAttention:
        """The linear layers `query`, `key`, `value` and `output` that a call multiplies with: those in the transform
        domain, where they exist and every matmul becomes cheaper by them.

        Parameters
        ----------
        tokens, dtype : of x
        context_tokens : None without `context`
        """
        if self.rotary is not None or self.query_norm is not None or self.key_norm is not None:
            return self  # head features have to be what they are
        algorithms = algorithms_of(backend_of(weight=self.query.weight))
        context_tokens = tokens if context_tokens is None else context_tokens
        for part, count in (
            (self.query, tokens), (self.key, context_tokens), (self.value, context_tokens), (self.output, tokens)
        ):  # fmt: skip
            if not algorithms.favors_transform_domain(
                part.weight, count, dtype, part.cache, part.method, part.activation_bits
            ):
                return self
        return self._transform_domain() or self

    def _transform_domain(self) -> TransformDomainAttention | None:
        """The projections in the transform domain, derived once; None if the weights do not support it."""
        projections = self.query, self.key, self.value, self.output
        derived = self._derived
        if derived is None or not derived.is_derived_from(*projections):
            supported = TransformDomainAttention.supports(*projections, self.head_dim)
            derived = self._derived = TransformDomainAttention(*projections) if supported else None
        return derived

    def mix(
        self,
        x: Array,
        lengths: Array | None = None,
        mask: Array | None = None,
        context: Array | None = None,
        workspace: Workspace | None = None,
        cu_seqlens: Array | None = None,
        positions: Array | None = None,
        cache: KVLayer | None = None,
    ) -> Array:
        """The concatenated heads, before the output projection; arguments as in a call.

        Returns
        -------
        (..., num_heads * head_dim), dtype of x, in the workspace's memory: valid until the next call.
        """
        x, context = as_cupy(x), as_cupy(context)
        workspace = (workspace or Workspace()).on(device_of(x, "x"))
        return self._mix(self, x, lengths, mask, context, workspace, cu_seqlens, positions, cache)

    def _mix(
        self,
        projections: RBEAttention | TransformDomainAttention,
        x: Array,
        lengths: Array | None,
        mask: Array | None,
        context: Array | None,
        workspace: Workspace,
        cu_seqlens: Array | None,
        positions: Array | None,
        cache: KVLayer | None,
    ) -> Array:
        """`mix`, with the queries, keys and values of the given projections."""
        packed = x.ndim == 2
        if packed:
            if (lengths is None) == (cu_seqlens is None) or context is not None:
                raise ValueError(
                    "packed sequences (tokens, hidden) need lengths= or cu_seqlens= and take no context="
                )
            if lengths is not None:
                cu_seqlens = _ends(lengths, x)
        elif x.ndim != 3:
            raise ValueError(f"x has {x.ndim} axes, needs (batch, seq, hidden) or packed (tokens, hidden)")
        elif cu_seqlens is not None:
            raise ValueError("cu_seqlens is for packed sequences (tokens, hidden); padded ones take lengths=")
        if cache is not None and (not packed or not self.causal or mask is not None):
            raise ValueError(
                "cache= is for packed sequences (tokens, hidden) of causal attention without mask="
            )
        source = x if context is None else context
        if source.ndim != x.ndim:
            raise ValueError(f"context has {source.ndim} axes, needs (batch, seq_k, context_hidden)")

        def project(linear: RBELinear, a: PreparedInput, name: str, heads: int) -> Array:
            scratch = workspace.get(f"layer.attention.{name}", (*a.shape[:-1], linear.out_features), a.dtype)
            return linear(a, out=scratch, workspace=workspace).reshape(*a.shape[:-1], heads, self.head_dim)

        inputs = prepare_input(x, workspace)
        q = project(projections.query, inputs, "q", self.num_heads)
        if context is not None:
            inputs = prepare_input(context, workspace)
        k = project(projections.key, inputs, "k", self.num_kv_heads)
        v = project(projections.value, inputs, "v", self.num_kv_heads)
        self._normalise_and_rotate(q, k, cu_seqlens, positions, cache, context is not None)
        heads = workspace.get("layer.attention.heads", q.shape, x.dtype)
        if packed:
            lengths = None
        if cache is not None:
            attend_with_cache(
                q, k, v, cache, to_host(cu_seqlens), self.scale, self.window, heads, workspace, self.softcap
            )
        else:
            ops.attention(
                q, k, v, self.causal, self.scale, mask, lengths, self.window, out=heads, workspace=workspace,
                cu_seqlens_q=cu_seqlens, softcap=self.softcap,
            )  # fmt: skip
        return heads.reshape(*x.shape[:-1], self.num_heads * self.head_dim)

    def _normalise_and_rotate(
        self,
        q: Array,
        k: Array,
        cu_seqlens: Array | None,
        positions: Array | None,
        cache: KVLayer | None,
        cross: bool,
    ) -> None:
        """`query_norm`, `key_norm` and `rotary`, in place."""
        if self.query_norm is not None:
            self.query_norm(q, out=q)
        if self.key_norm is not None:
            self.key_norm(k, out=k)
        if self.rotary is None:
            return
        if cross:
            raise ValueError("rotary and context= do not go together: keys have positions of their own")
        if positions is None:
            positions = _numbered(q, cu_seqlens, cache)
        # an upper bound: no host synchronisation
        count = (
            q.shape[-3] + (0 if cache is None else int(cache.lengths.max(initial=0))) + self.rotary.context
        )
        if device_of(positions) == "cpu" and positions.size:
            count = int(np.max(positions)) + 1
        self.rotary(q, positions, count, out=q)
        self.rotary(k, positions, count, out=k)

    def __repr__(self) -> str:
        extra = ", causal" * self.causal
        extra += "" if self.window is None else f", window={self.window}"
        extra += "" if self.scale is None else f", scale={self.scale:g}"
        extra += "" if self.softcap is None else f", softcap={self.softcap:g}"
        extra += "" if self.rotary is None else f", {self.rotary!r}"
        kv = "" if self.num_kv_heads == self.num_heads else f" ({self.num_kv_heads} for keys and values)"
        return (
            f"RBEAttention({self.num_heads} heads of {self.head_dim}{kv}{extra},\n  query={self.query!r},\n"
            f"  key={self.key!r},\n  value={self.value!r},\n  output={self.output!r})"
        )


def _numbered(q: Array, cu_seqlens: Array | None, cache: KVLayer | None) -> Array:
    """The positions of queries: 0, 1, 2, ... in each sequence, behind the tokens of a cache."""
    xp = module_of(q)
    if cu_seqlens is None:
        return cast(Array, xp.broadcast_to(xp.arange(q.shape[1]), q.shape[:2]))
    ends = to_host(cu_seqlens).astype(np.int64, copy=False)
    counts = np.diff(ends)
    first = -ends[:-1] if cache is None else cache.lengths - ends[:-1]
    return cast(Array, xp.asarray(np.arange(q.shape[0]) + np.repeat(first, counts)))


def _ends(lengths: Array, x: Array) -> Array:
    """Cumulative lengths of packed sequences, int64, on the device of x."""
    _check_packed(lengths, x.shape[0])
    xp = module_of(lengths)
    ends = xp.zeros(lengths.size + 1, np.int64)
    xp.cumsum(lengths, out=ends[1:])
    return cast(Array, module_of(x).asarray(ends))


def _check_packed(lengths: Array, tokens: int) -> None:
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise TypeError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; use integers of shape (batch,)"
        )
    if lengths.size and int(lengths.min()) < 0:
        raise ValueError("lengths has a negative entry")
    if int(np.sum(lengths)) != tokens:
        raise ValueError(f"lengths add up to {int(np.sum(lengths))}, x has {tokens} packed tokens")
