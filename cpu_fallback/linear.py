"""y = activation(x W^T + b) + residual, without ever forming W.

    x^_J = S_c^T x_J                                  once, for every block of columns J
    y_I  = S_r (sum_J C_IJ x^_J) + basis part         C: sparse entries,
    or low-bit rows unpacked beside the matmul

The driver: it picks the algorithm. `matmul_tiles` computes tiles of tokens, `matvec` a few tokens, and what
neither can take goes through decoded panels of W (`decode`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.cache import PanelCache
from rbe_gpu.matmul import check_method
from rbe_gpu.workspace import Workspace

from ._pool import most_threads, num_threads
from .arrays import address
from .decode import convert, decode_rows, panel_rows
from .matmul_algorithms import (
    CachedPanels,
    CpuMatmul,
    CpuMatmulAlgorithms,
    DecodedPanels,
    DenseTiles,
    DenseVectors,
    TransformTiles,
    TransformVectors,
)
from .matmul_costs import FEW_TOKENS, costs
from .matmul_tiles import TilesCall, matmul_tiles
from .matvec import MatvecCall, matvec
from .operand import DenseWeight, Operand, operand_of
from .simd import bits
from .transform_in import Activations


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
    w: Operand | DenseWeight,
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
    call.set_output(wide, activation, residual, out)
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
    w: Operand | DenseWeight,
    bias: Any,
    activation: str | None,
    residual: Any,
    out: Any,
    ws: Workspace,
) -> bool:
    """A product for a few tokens; False where x has NaN, Inf or huge values and the weight is compressed."""
    n, in_features = x.shape
    threads = most_threads()  # its scratch memory is that of the thread that computes

    def make(buffer: Any) -> MatvecCall:
        operand = w if isinstance(w, Operand) else w.operand()
        return MatvecCall(operand, n, in_features, threads, buffer)

    call: MatvecCall = ws.plan(("linear", w.key, n, in_features, "few", threads), "linear", make)
    wide = _as_float32(bias, "linear.bias", ws)
    call.set_output(wide, activation, residual, out)
    call.set_input(x)
    return bool(matvec(call.params_at))


# --- algorithms ---------------------------------------------------------------------------------------

# Each takes the arguments of `linear` and, as `w`, the weight as kernels read it; it returns whether it wrote `out`.


def _vectors(
    x: Any, weight: Any, w: Operand | DenseWeight, bias: Any, activation: str | None, residual: Any, out: Any,
    ws: Workspace, cache: PanelCache | None, threads: int,
) -> bool:  # fmt: skip
    """Token by token."""
    return _few(x, w, bias, activation, residual, out, ws)


def _dense_tiles(
    x: Any, weight: Any, w: DenseWeight, bias: Any, activation: str | None, residual: Any, out: Any,
    ws: Workspace, cache: PanelCache | None, threads: int,
) -> bool:  # fmt: skip
    a = activations(x, "none", 64, None, ws, threads)
    _multiply(a, w, bias, activation, residual, out, ws, threads)
    return True


def _transform_tiles(
    x: Any, weight: RBEBlocks, w: Operand, bias: Any, activation: str | None, residual: Any, out: Any,
    ws: Workspace, cache: PanelCache | None, threads: int,
) -> bool:  # fmt: skip
    a = activations(x, w.transform_in, weight.block, w.basis, ws, threads)
    if a.pending or a.finite:
        _multiply(a, w, bias, activation, residual, out, ws, threads)
    return a.finite


def _decoded_panels(
    x: Any, weight: RBEBlocks, w: Operand, bias: Any, activation: str | None, residual: Any, out: Any,
    ws: Workspace, cache: PanelCache | None, threads: int,
) -> bool:  # fmt: skip
    """Panels of rows, decoded one after another."""
    return _cached_panels(x, weight, w, bias, activation, residual, out, ws, None, threads)


def _cached_panels(
    x: Any, weight: RBEBlocks, w: Operand, bias: Any, activation: str | None, residual: Any, out: Any,
    ws: Workspace, cache: PanelCache | None, threads: int,
) -> bool:  # fmt: skip
    """Panels of rows from the cache, which decodes those that it does not hold."""
    a = None if x.shape[0] <= FEW_TOKENS else activations(x, "none", 64, None, ws, threads)
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
            _few(x, DenseWeight(panel, start), bias, activation, residual, out, ws)
        else:
            _multiply(a, DenseWeight(panel, start), bias, activation, residual, out, ws, threads)
    return True


ALGORITHMS = CpuMatmulAlgorithms(
    DenseVectors(_vectors),
    DenseTiles(_dense_tiles),
    TransformVectors(_vectors),
    TransformTiles(_transform_tiles),
    DecodedPanels(_decoded_panels),
    CachedPanels(_cached_panels),
)


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
        check_method(method, cache)
    if not out.size:
        return
    n, threads = x.shape[0], num_threads()
    w: Operand | DenseWeight
    if not isinstance(weight, RBEBlocks):
        w = DenseWeight(weight, 0)
        run = _dense_choice(n, weight)
    else:
        w = operand_of(weight)
        run = _choice(weight, w, n, cache, method, threads)
    if not run(x, weight, w, bias, activation, residual, out, ws, cache, threads):
        # NaN, Inf and huge values: a transform would spread them over a block, or make them infinite
        panels = _decoded_panels if cache is None or method == "decode" else _cached_panels
        panels(x, weight, w, bias, activation, residual, out, ws, cache, threads)


_DENSE_CHOICES: dict[tuple[int, int], Callable[..., bool]] = {}
_MOST_CHOICES = 1024


def _dense_choice(n: int, weight: Any) -> Callable[..., bool]:
    """The choice of `ALGORITHMS` for a dense weight. It is remembered: choosing takes 3 us."""
    key = n, weight.shape[1]
    run = _DENSE_CHOICES.get(key)
    if run is None:
        if len(_DENSE_CHOICES) >= _MOST_CHOICES:
            _DENSE_CHOICES.clear()
        run = _DENSE_CHOICES[key] = cast(CpuMatmul, ALGORITHMS.choose(weight, n, weight.dtype)).run
    return run


def _choice(
    weight: RBEBlocks, w: Operand, n: int, cache: PanelCache | None, method: str | None, threads: int
) -> Callable[..., bool]:
    """The choice of `ALGORITHMS` for a compressed weight. It is remembered with the weight, until `tune` runs."""
    key, now = (n, threads, None if cache is None else cache.budget, method), costs()
    known = w.choices.get(key)
    if known is None or known[1] is not now:
        algorithm = cast(CpuMatmul, ALGORITHMS.choose(weight, n, np.dtype(np.float32), cache, method))
        known = w.choices[key] = algorithm.run, now
    return known[0]
