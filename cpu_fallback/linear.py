"""y = activation(x W^T + b) + residual, without ever forming W.

    x^_J = S_c^T x_J                                  once, for every block of columns J
    y_I  = S_r (sum_J C_IJ x^_J) + basis part         C: sparse entries,
    or low-bit rows unpacked beside the matmul

The driver: it picks the algorithm. `matmul_tiles` computes tiles of tokens, `vector_product` a few tokens, and what
neither can take goes through decoded panels of W (`decode`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.cache import PanelCache
from rbe_gpu.planner import FEW, costs, need_method, plan
from rbe_gpu.workspace import Workspace

from ._pool import most_threads, num_threads
from .decode import convert, decode_rows, panel_rows
from .matmul_tiles import Activations, TilesCall, matmul_tiles
from .operand import Operand, Plain, address, operand_of, set_output
from .simd import bits
from .vector_product import VectorCall, vector_product


def activations(
    x: Any, transform: str, block: int, basis: tuple[int, bool] | None, ws: Workspace, threads: int
) -> Activations:
    """x (n, in_features), any storage type, as products with a weight of this transform, block and basis
    read it."""

    def make(buffer: Any) -> Activations:
        return Activations(*x.shape, transform, block, basis, threads, buffer)

    a: Activations = ws.plan(("linear.x", x.shape, transform, block, basis, threads), "linear.x", make)
    if not ws.unchanged or ws.last is not a or a.input != address(x):
        a.set_input(x)
        ws.last = a
    return a


def _multiply(
    a: Activations,
    w: Operand | Plain,
    bias: Any,
    activation: str | None,
    residual: Any,
    out: Any,
    ws: Workspace,
    threads: int,
) -> None:
    """out = activation(a W^T + bias) + residual; nothing is written where `a` is not finite and W is
    compressed."""

    def make(buffer: Any) -> TilesCall:
        return TilesCall(w if isinstance(w, Operand) else w.operand(), a, threads, buffer)

    call: TilesCall = ws.plan(("linear", w.key, a.n, a.address, threads), "linear", make)
    wide = _as_float32(bias, "linear.bias", ws)
    set_output(call.table, wide, activation, residual, out)
    matmul_tiles(call, a, threads)


def _as_float32(a: Any, name: str, ws: Workspace) -> Any:
    """`a` in float32; None stays None."""
    if a is None or a.dtype == np.float32:
        return a
    wide = ws.get(name, a.shape)
    convert(bits(a).reshape(1, -1), wide.reshape(1, -1))
    return wide


def _few(
    x: Any,
    w: Operand | Plain,
    bias: Any,
    activation: str | None,
    residual: Any,
    out: Any,
    ws: Workspace,
) -> bool:
    """A product for a few tokens; False where x has NaN, Inf or huge values and the weight is compressed."""
    n, in_features = x.shape
    threads = most_threads()  # its scratch memory is that of the thread that computes

    def make(buffer: Any) -> VectorCall:
        operand = w if isinstance(w, Operand) else w.operand()
        return VectorCall(operand, n, in_features, threads, buffer)

    call: VectorCall = ws.plan(("linear", w.key, n, in_features, "few", threads), "linear", make)
    wide = _as_float32(bias, "linear.bias", ws)
    set_output(call.table, wide, activation, residual, out)
    call.set_input(x)
    return bool(vector_product(call.table, call.reals))


def linear(
    x: Any,
    weight: Any,
    bias: Any,
    activation: str | None,
    residual: Any,
    out: Any,
    ws: Workspace,
    cache: PanelCache | None,
    method: str | None = None,
) -> None:
    """x (n, in), weight (out, in), residual and out (n, out)."""
    if method is not None:
        need_method(method, cache)
    if not out.size:
        return
    n, threads = x.shape[0], num_threads()
    if not isinstance(weight, RBEBlocks):
        dense = Plain(weight, 0)
        if n <= FEW or not x.shape[1]:  # there are no panels of no columns
            _few(x, dense, bias, activation, residual, out, ws)
        else:
            a = activations(x, "none", 64, None, ws, threads)
            _multiply(a, dense, bias, activation, residual, out, ws, threads)
        return
    w = operand_of(weight)
    if _method(weight, w, n, cache, method, threads) == "transform":
        if w.basis is None and n <= (1 if w.sparse else FEW):
            done = _few(x, w, bias, activation, residual, out, ws)
        else:
            a = activations(x, w.transform_in, weight.block, w.basis, ws, threads)
            if a.pending or a.finite:
                _multiply(a, w, bias, activation, residual, out, ws, threads)
            done = a.finite
        if done:
            return
    _decoded(x, weight, bias, activation, residual, out, ws, None if method == "decode" else cache, threads)


def _method(
    weight: RBEBlocks, w: Operand, n: int, cache: PanelCache | None, method: str | None, threads: int
) -> str:
    """The way the planner picks, remembered with the weight for every number of tokens, until `tune` runs."""
    if method is not None:
        return method
    key, now = (n, threads, None if cache is None else cache.budget), costs()
    known = w.methods.get(key)
    if known is None or known[1] is not now:
        known = w.methods[key] = plan(weight, n, threads, cache).method, now
    return known[0]


def _decoded(
    x: Any,
    weight: RBEBlocks,
    bias: Any,
    activation: str | None,
    residual: Any,
    out: Any,
    ws: Workspace,
    cache: PanelCache | None,
    threads: int,
) -> None:
    """The same through decoded panels of rows: from a cache, or made for the call.

    Also what activations with NaN or Inf take, which a transform would spread over a block, and huge ones, which it
    would make infinite.
    """
    a = None if x.shape[0] <= FEW else activations(x, "none", 64, None, ws, threads)
    rows, step = weight.rows, panel_rows(weight)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        panel = ws.get("linear.panel", (stop - start, weight.cols))

        def decode(into: Any, start: int = start, stop: int = stop) -> None:
            decode_rows(weight, None, start, stop - start, into, ws)

        if cache is None:
            decode(panel)
        else:
            panel = cache.panel(weight, start, stop, decode, panel)
        if a is None:
            _few(x, Plain(panel, start), bias, activation, residual, out, ws)
        else:
            _multiply(a, Plain(panel, start), bias, activation, residual, out, ws, threads)
