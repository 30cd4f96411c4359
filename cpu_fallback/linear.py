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
from rbe_gpu.matmul import PreparedInput, check_activation_bits, check_method
from rbe_gpu.workspace import Workspace

from ._pool import num_threads
from .decode import convert, decode_rows, panel_rows
from .int8_matvec import Int8MatvecCall, int8_matvec
from .int8_tiles import Int8Activations, Int8TilesCall, int8_tiles
from .matmul_algorithms import (
    CachedPanels,
    CpuMatmul,
    CpuMatmulAlgorithms,
    DecodedPanels,
    DenseMatvec,
    DenseTiles,
    Int8Matvec,
    Int8Tiles,
    TransformMatvec,
    TransformTiles,
)
from .matmul_costs import FEW_TOKENS, costs
from .matmul_tiles import TilesCall, matmul_tiles
from .matvec import MatvecCall, matvec
from .operand import DenseWeight, Operand, operand_of
from .simd import bits
from .transform_in import Activations


def activations(
    x: Any,
    transform: str,
    block: int,
    basis: tuple[int, bool] | None,
    ws: Workspace,
    threads: int,
    prepared: PreparedInput | None,
) -> Activations:
    """x (n, in_features), any storage type, as the kernels read it for a weight of this transform, block and basis.

    They are transformed by the next matmul, unless an earlier one of `prepared` has done it.
    """
    if prepared is not None:
        ws = prepared.workspace

    def make(buffer: Any) -> Activations:
        return Activations(*x.shape, transform, block, basis, threads, buffer)

    key = x.shape, transform, block, basis, threads
    a: Activations = ws.arguments.get(ws, "linear.x", key, make)
    if prepared is None:
        ws.owners["linear.x"] = None
        a.set_input(x)
    elif not prepared.is_computed("linear.x", a):
        a.set_input(x)
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

    call: TilesCall = ws.arguments.get(ws, "linear", (w.key, a.n, a.address, threads), make)
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


# --- algorithms ---------------------------------------------------------------------------------------

# Each function takes the arguments of `linear` and, as `w`, the operand of the weight; it returns if it wrote `out`.


def _matvec(
    x: Any, w: Operand | DenseWeight, bias: Any, activation: str | None, residual: Any, out: Any, ws: Workspace,
    threads: int, *_: Any,
) -> bool:  # fmt: skip
    """Token by token. Nothing is written where x has NaN, Inf or huge values and the weight is compressed."""
    n, in_features = x.shape

    def make(buffer: Any) -> MatvecCall:
        operand = w if isinstance(w, Operand) else w.operand()
        return MatvecCall(operand, n, in_features, threads, buffer)

    call: MatvecCall = ws.arguments.get(ws, "linear", (w.key, n, in_features, "few", threads), make)
    wide = _as_float32(bias, "linear.bias", ws)
    call.set_output(wide, activation, residual, out)
    call.set_input(x)
    return matvec(call.params_at)


def _dense_tiles(
    x: Any, w: DenseWeight, bias: Any, activation: str | None, residual: Any, out: Any, ws: Workspace, threads: int,
    weight: Any, cache: PanelCache | None, prepared: PreparedInput | None,
) -> bool:  # fmt: skip
    a = activations(x, "none", 64, None, ws, threads, prepared)
    _multiply(a, w, bias, activation, residual, out, ws, threads)
    return True


def _transform_tiles(
    x: Any, w: Operand, bias: Any, activation: str | None, residual: Any, out: Any, ws: Workspace, threads: int,
    weight: RBEBlocks, cache: PanelCache | None, prepared: PreparedInput | None,
) -> bool:  # fmt: skip
    a = activations(x, w.transform_in, weight.block, w.basis, ws, threads, prepared)
    if a.pending or a.finite:
        _multiply(a, w, bias, activation, residual, out, ws, threads)
    return a.finite


def _decoded_panels(
    x: Any, w: Operand, bias: Any, activation: str | None, residual: Any, out: Any, ws: Workspace, threads: int,
    weight: RBEBlocks, cache: PanelCache | None, prepared: PreparedInput | None,
) -> bool:  # fmt: skip
    """Panels of rows, decoded one after another."""
    return _cached_panels(x, w, bias, activation, residual, out, ws, threads, weight, None, prepared)


def _cached_panels(
    x: Any, w: Operand, bias: Any, activation: str | None, residual: Any, out: Any, ws: Workspace, threads: int,
    weight: RBEBlocks, cache: PanelCache | None, prepared: PreparedInput | None,
) -> bool:  # fmt: skip
    """Panels of rows from the cache, which decodes those that it does not hold."""
    few = x.shape[0] <= FEW_TOKENS
    a = None if few else activations(x, "none", 64, None, ws, threads, prepared)
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
            _matvec(x, DenseWeight(panel, start), bias, activation, residual, out, ws, threads)
        else:
            _multiply(a, DenseWeight(panel, start), bias, activation, residual, out, ws, threads)
    return True


def _int8_matvec(
    x: Any, w: Operand, bias: Any, activation: str | None, residual: Any, out: Any, ws: Workspace, threads: int,
    *_: Any,
) -> bool:  # fmt: skip
    """Token by token, activations rounded to int8."""
    n, in_features = x.shape

    def make(buffer: Any) -> Int8MatvecCall:
        return Int8MatvecCall(w, n, in_features, threads, buffer)

    call: Int8MatvecCall = ws.arguments.get(ws, "linear", (w.key, n, "int8 few", threads), make)
    call.set_output(_as_float32(bias, "linear.bias", ws), activation, residual, out)
    call.set_input(x)
    int8_matvec(call.params_at)
    return True


def _int8_tiles(
    x: Any, w: Operand, bias: Any, activation: str | None, residual: Any, out: Any, ws: Workspace, threads: int,
    *_: Any,
) -> bool:  # fmt: skip
    """Tiles of tokens, activations rounded to int8."""
    n, in_features = x.shape

    def make_input(buffer: Any) -> Int8Activations:
        return Int8Activations(w, n, in_features, threads, buffer)

    a: Int8Activations = ws.arguments.get(ws, "linear.int8", (w.key, n, threads), make_input)
    a.set_input(x)

    def make(buffer: Any) -> Int8TilesCall:
        return Int8TilesCall(a, threads, buffer)

    call: Int8TilesCall = ws.arguments.get(ws, "linear", (w.key, n, "int8", a.params_at, threads), make)
    call.set_output(_as_float32(bias, "linear.bias", ws), activation, residual, out)
    int8_tiles(call, threads)
    return True


ALGORITHMS = CpuMatmulAlgorithms(
    DenseMatvec(_matvec),
    DenseTiles(_dense_tiles),
    TransformMatvec(_matvec),
    TransformTiles(_transform_tiles),
    DecodedPanels(_decoded_panels),
    CachedPanels(_cached_panels),
    Int8Matvec(_int8_matvec),
    Int8Tiles(_int8_tiles),
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
    prepared: PreparedInput | None = None,
    activation_bits: int | None = None,
) -> None:
    """x (n, in), weight (out, in), residual and out (n, out); prepared : of x."""
    if method is not None:
        check_method(method, cache)
    if activation_bits is not None:
        check_activation_bits(activation_bits)
    if not out.size:
        return
    n, threads = x.shape[0], num_threads()
    w: Operand | DenseWeight
    # choices are remembered: choosing takes 3 us
    if isinstance(weight, RBEBlocks):
        w = operand_of(weight)
        key = n, threads, None if cache is None else cache.budget, method, activation_bits
        choice = w.choices.get(key)
        if choice is None or choice[1] is not costs():  # `tune` has run
            choice = w.choices[key] = _choose(weight, n, cache, method, activation_bits), costs()
        run = choice[0]
    else:
        if activation_bits is not None:
            _choose(weight, n, activation_bits=activation_bits)  # raises: no algorithm takes a dense weight
        w = DenseWeight(weight, 0)
        run = _DENSE_CHOICES.get((n, weight.shape[1])) or _choose_dense(weight, n)
    if not run(x, w, bias, activation, residual, out, ws, threads, weight, cache, prepared):
        # NaN, Inf and huge values: a transform would spread them over a block, or make them infinite
        panels = _decoded_panels if method == "decode" else _cached_panels
        panels(x, w, bias, activation, residual, out, ws, threads, weight, cache, prepared)


_MOST_CHOICES = 1024
_DENSE_CHOICES: dict[tuple[int, int], Callable[..., bool]] = {}


def _choose(
    weight: Any,
    n: int,
    cache: PanelCache | None = None,
    method: str | None = None,
    activation_bits: int | None = None,
) -> Callable[..., bool]:
    """What runs the algorithm that `ALGORITHMS` chooses; no dtype of x makes a difference."""
    chosen = ALGORITHMS.choose(weight, n, np.dtype(np.float32), cache, method, activation_bits)
    return cast(CpuMatmul, chosen).run


def _choose_dense(weight: Any, n: int) -> Callable[..., bool]:
    if len(_DENSE_CHOICES) >= _MOST_CHOICES:
        _DENSE_CHOICES.clear()
    run = _DENSE_CHOICES[n, weight.shape[1]] = _choose(weight, n)
    return run
