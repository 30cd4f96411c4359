"""RBEAttention: multi-head attention with its four projections."""

from __future__ import annotations

from math import sqrt
from typing import Any, cast

import numpy as np

from .. import ops, transforms
from ..blocks import Array, RBEMatrix
from ..cache import PanelCache
from ..dispatch import as_cupy, device_of, module_of
from ..workspace import Workspace
from .rbe_linear import RBELinear, compressed


class RBEAttention:
    """y = output(concat_h softmax(scale * q_h k_h^T + mask) v_h) + residual; q = query(x), k = key(c), v =
    value(c).

    c is x itself, or `context` (cross attention). Padded sequences come as (batch, seq, hidden) with their
    `lengths`. Sequences may also be packed end to end, (tokens, hidden) with lengths that add up to the
    tokens, or with the `cu_seqlens` that those give: no padding is then computed anywhere.

    Parameters
    ----------
    query : RBELinear, hidden -> num_heads * head_dim
    key, value : RBELinear, hidden -> num_kv_heads * head_dim
    output : RBELinear, num_heads * head_dim -> hidden
    num_heads : query heads
    num_kv_heads : key/value heads, a divisor of num_heads (grouped-query attention; 1: multi-query); by
        default num_heads
    causal, window, scale : as in `rbe_gpu.attention`
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
        self._inside: tuple[Any, RBEAttention | None] | None = None

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
        **options: Any,
    ) -> RBEAttention:
        """Compress the four weights: grade=, ratio=, rmse=, density=, block=, transform=, basis=, codes= go to
        `rbe_gpu.compress`. With none of them they stay dense. `cache` is shared by the four projections, `method`
        is that of each (`RBELinear`).
        """
        shared = PanelCache(cache) if isinstance(cache, int) else cache
        pairs = ((query, query_bias), (key, key_bias), (value, value_bias), (output, output_bias))
        q, k, v, o = (
            RBELinear(compressed(w, "matrix", options), b, cache=shared, method=method) for w, b in pairs
        )
        return cls(q, k, v, o, num_heads, num_kv_heads, causal, window, scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        return self.query.nbytes + self.key.nbytes + self.value.nbytes + self.output.nbytes

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
    ) -> Array:
        """Attend.

        Parameters
        ----------
        x : (batch, seq, hidden), or (tokens, hidden) for packed sequences
        lengths : (batch,) integers: valid keys of each sequence (of `context` where that is given); for
            packed sequences the length of each
        mask : broadcastable to (batch, num_heads, seq, seq_k), float32 (added) or bool (True keeps); not for
            packed sequences
        residual : like the result, added to it
        context : (batch, seq_k, context_hidden), what keys and values are made of; not for packed sequences
        cu_seqlens : (batch + 1,) int32/int64, where x is: for packed sequences in the place of `lengths`,
            sequence b being rows cu_seqlens[b] to cu_seqlens[b + 1]. On a GPU nothing looks at them, and
            nothing is copied

        Returns
        -------
        (batch, seq, hidden) or (tokens, hidden), dtype of x. Rows of padding hold no meaning.
        """
        x = as_cupy(x)
        workspace = (workspace or Workspace()).on(device_of(x, "x"))
        context = as_cupy(context)
        inside = self._coefficients() if self._favors_transform_domain(x, context) else None
        within = self if inside is None else inside
        merged = within.mix(x, lengths, mask, context, workspace, cu_seqlens)
        return within.output(merged, residual, out=out, workspace=workspace)

    def _favors_transform_domain(self, x: Array, context: Array | None) -> bool:
        """Whether every projection does, with the algorithm that it takes."""
        source = x if context is None else context
        inputs = ((self.query, x), (self.key, source), (self.value, source), (self.output, x))
        return all(projection.favors_transform_domain(a) for projection, a in inputs)

    def _coefficients(self) -> RBEAttention | None:
        """This attention between the transforms: q, k, v come out as coefficients and `output` takes them.

        An orthonormal transform whose blocks divide the heads changes no product q.k, and what the output
        transform of v does, the input transform of `output` undoes: of eight transforms two are left. None
        where a weight is dense or has a basis, or blocks do not fit.
        """
        parts = (self.query, self.key, self.value, self.output)
        state = (
            (self.causal, self.window, self.scale),
            *((part.weight, part.bias, part.activation, part.method) for part in parts),
        )
        if self._inside is None or any(
            a is not b
            for old, new in zip(self._inside[0], state, strict=True)
            for a, b in zip(old, new, strict=True)
        ):
            self._inside = state, self._one_sided() if self._fits() else None
        return self._inside[1]

    def _fits(self) -> bool:
        weights = [part.weight for part in (self.query, self.key, self.value, self.output)]
        first = weights[0]
        return (
            all(isinstance(w, RBEMatrix) and w.basis is None for w in weights)
            and all(w.row_transformed and w.col_transformed for w in weights)
            and all(part.activation is None for part in (self.query, self.key, self.value))
            and len({(w.transform, w.block) for w in weights}) == 1
            and first.transform != "none"
            and transforms.is_orthonormal(first.transform)
            and self.head_dim % first.block == 0
        )

    def _one_sided(self) -> RBEAttention:
        from ..transfer import to

        weight: Any = self.query.weight
        s = transforms.synthesis(weight.transform, weight.block)

        def gives(linear: RBELinear) -> RBELinear:
            bias = linear.bias
            if bias is not None:
                blocks = to(bias, "cpu").astype(np.float64).reshape(-1, weight.block)
                bias = to((blocks @ s).reshape(-1).astype(np.float32), device_of(bias, "bias"))
            given = cast(RBEMatrix, linear.weight).without_transform("row")
            return RBELinear(given, bias, method=linear.method)

        output = self.output
        taken = cast(RBEMatrix, output.weight).without_transform("col")
        takes = RBELinear(taken, output.bias, output.activation, method=output.method)
        scale = 1.0 / sqrt(self.head_dim) if self.scale is None else self.scale
        return RBEAttention(
            gives(self.query), gives(self.key), gives(self.value), takes, self.num_heads, self.num_kv_heads,
            self.causal, self.window, scale,
        )  # fmt: skip

    def mix(
        self,
        x: Array,
        lengths: Array | None = None,
        mask: Array | None = None,
        context: Array | None = None,
        workspace: Workspace | None = None,
        cu_seqlens: Array | None = None,
    ) -> Array:
        """All heads side by side, before the output projection; arguments as in a call.

        Returns
        -------
        (..., num_heads * head_dim), dtype of x, in the workspace's memory: use it before the next call.
        """
        x, context = as_cupy(x), as_cupy(context)
        workspace = (workspace or Workspace()).on(device_of(x, "x"))
        packed = x.ndim == 2
        if packed:
            if (lengths is None) == (cu_seqlens is None) or mask is not None or context is not None:
                raise ValueError(
                    "packed sequences (tokens, hidden) need lengths= or cu_seqlens= and take no mask= or context="
                )
            if lengths is not None:
                cu_seqlens = _ends(lengths, x)
        elif x.ndim != 3:
            raise ValueError(f"x has {x.ndim} axes, needs (batch, seq, hidden) or packed (tokens, hidden)")
        elif cu_seqlens is not None:
            raise ValueError("cu_seqlens is for packed sequences (tokens, hidden); padded ones take lengths=")
        source = x if context is None else context
        if source.ndim != x.ndim:
            raise ValueError(f"context has {source.ndim} axes, needs (batch, seq_k, context_hidden)")

        def project(linear: RBELinear, a: Array, name: str, heads: int) -> Array:
            scratch = workspace.get(f"layer.attention.{name}", (*a.shape[:-1], linear.out_features), a.dtype)
            return linear(a, out=scratch, workspace=workspace).reshape(*a.shape[:-1], heads, self.head_dim)

        with workspace.keeping():  # one transform for all that reads the same
            q = project(self.query, x, "q", self.num_heads)
            k = project(self.key, source, "k", self.num_kv_heads)
            v = project(self.value, source, "v", self.num_kv_heads)
        heads = workspace.get("layer.attention.heads", q.shape, x.dtype)
        if packed:
            self._attend_packed(q, k, v, cu_seqlens, heads, workspace)
        else:
            self._attend(q, k, v, lengths, mask, heads, workspace)
        return heads.reshape(*x.shape[:-1], self.num_heads * self.head_dim)

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        lengths: Array | None,
        mask: Array | None,
        out: Array,
        workspace: Workspace,
    ) -> None:
        ops.attention(
            q, k, v, self.causal, self.scale, mask, lengths, self.window, out=out, workspace=workspace
        )

    def _attend_packed(
        self, q: Array, k: Array, v: Array, cu_seqlens: Array | None, out: Array, workspace: Workspace
    ) -> None:
        options = {"window": self.window, "out": out, "workspace": workspace, "cu_seqlens_q": cu_seqlens}
        ops.attention(q, k, v, self.causal, self.scale, **options)

    def __repr__(self) -> str:
        extra = ", causal" * self.causal
        extra += "" if self.window is None else f", window={self.window}"
        extra += "" if self.scale is None else f", scale={self.scale:g}"
        kv = "" if self.num_kv_heads == self.num_heads else f" ({self.num_kv_heads} for keys and values)"
        return (
            f"RBEAttention({self.num_heads} heads of {self.head_dim}{kv}{extra},\n  query={self.query!r},\n"
            f"  key={self.key!r},\n  value={self.value!r},\n  output={self.output!r})"
        )


def _ends(lengths: Array, x: Array) -> Array:
    """Where packed sequences begin and end, int64, where x is."""
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
