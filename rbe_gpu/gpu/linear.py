"""linear: y = activation(x W^T + bias) + residual; a compressed W is multiplied as it is stored where that pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rbe_gpu import transforms
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.cache import PanelCache
from rbe_gpu.matmul import PreparedInput, check_activation_bits, check_method

from ..kernel_struct import Params, address
from . import decode, linear_few, linear_integers, linear_transform
from . import matmul_algorithms as algorithms
from ._elements import divider
from ._execute import run
from ._launch import TYPE, WARP, Launch, aligned, ceil_div, grid_1d, type_of
from ._params import (
    ABSMAX,
    ACTIVATIONS,
    CODES,
    DENSE_SPLIT_K,
    EPILOGUE,
    FEATURES,
    FFMA,
    FINISH,
    INPUTS,
    MMA,
    SPLIT_K,
    SPLIT_K_EPILOGUE,
)
from ._splits import splits_of, tiling
from .linear_few import group_of

_ACTIVATION = {
    name: i for i, name in enumerate((None, "relu", "gelu", "gelu_tanh", "silu"))
}  # RELU, GELU, ... of linear.cu
_COLUMNS, _F16 = range(2)  # LAYOUT_... of linear.cu
_F32_DTYPE, _F16_DTYPE = np.dtype(np.float32), np.dtype(np.float16)
_NO_TRANSFORM = decode.TRANSFORM["none"]

PANEL_BYTES = 32 << 20  # of a decoded panel: stays in the second-level cache of a large GPU

_DOT_ROWS = {1: 4, 4: 2, 8: 2}  # of linear_weight_T
_THREADS = 256
_SPAN = 1024  # columns of linear_weight_T that a split is a multiple of
_LINE_BLOCKS_WANTED = 132  # of the transforms of x^ and of the results: a multiprocessor each
_TILE = 128  # of linear_mma, tokens and outputs
_STEP = 64  # along k
_FFMA_TILE = 64
_MMA_SHARED = 2 * 2 * (_TILE + _TILE) * _STEP
_MMA_PARTS_SHARED = 2 * 2 * (64 + _TILE) * _STEP


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call; the launches so far."""

    x: Any
    bias: Any
    activation: str | None
    residual: Any
    out: Any
    ws: Any
    cache: PanelCache | None
    prepared: PreparedInput | None
    launches: list[Launch]

    @property
    def tokens(self) -> int:
        return int(self.x.shape[0])

    def add(
        self, entry: str, blocks: int, threads: int, params: Params, shared: int = 0, op: str = "linear"
    ) -> None:
        self.launches.append(Launch(op, f"{op}_{entry}", grid_1d(blocks), (threads, 1, 1), params, shared))

    def is_computed(self, buffer: str, out: Any, *key: Any) -> bool:
        """Whether an earlier matmul of the same prepared input has computed what is to be in `out`."""
        if self.prepared is None:
            self.ws.owners[buffer] = None
            return False
        return self.prepared.is_computed(buffer, (*key, address(out), out.shape))

    def activations(self) -> Params:
        """x, as the kernels of the activation prologue read it."""
        tokens, cols = self.x.shape
        return ACTIVATIONS.fill(
            data=self.x,
            type=TYPE[self.x.dtype],
            wide=cols % 8 == 0 and aligned(self.x),
            tokens=tokens,
            cols=cols,
        )

    def epilogue(self) -> Params:
        """Bias, activation, residual and output."""
        tokens, cols = self.out.shape
        return EPILOGUE.fill(
            bias=self.bias,
            bias_type=type_of(self.bias),
            activation=_ACTIVATION[self.activation],
            residual=self.residual,
            residual_type=type_of(self.residual),
            type=TYPE[self.out.dtype],
            out=self.out,
            tokens=tokens,
            cols=cols,
            wide=cols % 8 == 0 and aligned(self.bias, self.residual, self.out),
        )

    def absmax(self) -> Any:
        """(tokens,) float32: the largest absolute value of each token."""
        absmax = self.ws.get("linear.absmax", (self.tokens,))
        if not self.is_computed("linear.absmax", absmax):
            params = ABSMAX.fill(x=self.activations(), absmax=absmax)
            self.add("absmax", ceil_div(self.tokens, _THREADS // WARP), _THREADS, params)
        return absmax

    def inputs(
        self,
        padded: int,
        layout: int,
        group: int = 1,
        weight: RBEBlocks | None = None,
        absmax: Any = None,
    ) -> Any:
        """x^ = S^T x of `padded` columns in a layout."""
        rows = ceil_div(self.tokens, group) * group
        out = self.ws.get("linear.x", (rows, padded), _F16_DTYPE if layout == _F16 else _F32_DTYPE)
        block = 64 if weight is None else weight.block
        transform = _NO_TRANSFORM if weight is None else decode.TRANSFORM[weight.col_transform]
        per_token = padded // block
        lines = _lines(rows * per_token, block)
        if self.is_computed("linear.x", out, layout, group, block, transform, absmax is None):
            return out
        params = INPUTS.fill(
            x=self.activations(),
            padded=padded,
            block=block,
            transform=transform,
            lines=lines,
            by_token=divider(per_token),
            absmax=absmax,
            layout=layout,
            group=group,
            out=out,
        )
        self.add("inputs", ceil_div(rows * per_token, lines), 128, params)
        return out

    def float_rows(self, weight: RBEBlocks) -> Any:
        """x^ in float32, (tokens, cols_pad)."""
        return self.inputs(weight.cols_pad, _COLUMNS, 1, weight)

    def half_inputs(self, weight: RBEBlocks) -> tuple[Any, Any]:
        """x^ in float16, (tokens, cols_pad), and the absmax that it is scaled by, token by token.

        Without a transform and in float16 already, x itself, unscaled.
        """
        x = self.x
        if (
            weight.col_transform == "none"
            and x.dtype == _F16_DTYPE
            and x.shape[1] == weight.cols_pad
            and aligned(x)
        ):
            return x, None
        absmax = self.absmax()
        return self.inputs(weight.cols_pad, _F16, 1, weight, absmax=absmax), absmax

    def sum_parts(
        self,
        parts: Any,
        stored: int,
        weight: RBEBlocks | None = None,
        absmax: Any = None,
        scaled: bool = False,
    ) -> None:
        """out from parts (splits, tokens, ld), of which `stored` columns are filled.

        absmax : of the tokens; `scaled`: x^ was scaled by it
        """
        splits, tokens, ld = parts.shape
        matrix = weight is not None and weight.row_block > 1
        block = weight.block if weight is not None and matrix else 64
        transform = _NO_TRANSFORM if weight is None else decode.TRANSFORM[weight.row_transform]
        basis = None if weight is None else weight.basis
        features, blocks = None, 0
        if weight is not None and basis is not None:
            features, blocks = self.features(weight), weight.cols_pad // weight.block
        per_token = ceil_div(self.out.shape[1], block)
        lines = _lines(tokens * per_token, block)
        params = SPLIT_K_EPILOGUE.fill(
            parts=parts,
            splits=splits,
            ld=ld,
            stored=stored,
            block=block,
            transform=transform,
            matrix=matrix,
            lines=lines,
            by_token=divider(per_token),
            gain=1.0 if weight is None else weight.gain,
            absmax=absmax,
            scaled=scaled,
            with_basis=basis is not None,
            basis=basis,
            features=features,
            blocks=blocks,
            basis_block=0 if weight is None else weight.block,
            epilogue=self.epilogue(),
        )
        self.add("epilogue", ceil_div(tokens * per_token, lines), 128, params)

    def features(self, weight: RBEBlocks) -> Any:
        """The basis functions times x: (tokens, blocks, 4 + B), of vectors (tokens, blocks, 5)."""
        tokens, blocks, matrix = self.tokens, weight.cols_pad // weight.block, weight.row_block > 1
        out = self.ws.get("linear.features", (tokens, blocks, 4 + weight.block if matrix else 5))
        params = FEATURES.fill(
            x=self.activations(), blocks=blocks, block=weight.block, matrix=matrix, out=out
        )
        self.add("features", ceil_div(tokens * blocks, 4), 128, params)
        return out

    def split_k(self, weight: RBEBlocks, x: Any, ldx: int, each: int, parts: Any) -> Params:
        """Parameters of the kernels that write partial sums of a compressed weight."""
        return SPLIT_K.fill(
            codes=decode.codes_params(weight),
            x=x,
            ldx=ldx,
            rows=weight.rows_pad,
            tokens=self.tokens,
            each=each,
            splits=parts.shape[0],
            ld=parts.shape[2],
            parts=parts,
        )

    def parts(self, splits: int, rows: int) -> Any:
        return self.ws.get("linear.parts", (splits, self.tokens, ceil_div(rows, 8) * 8))

    def finish(self, weight: RBEBlocks, tiles: int, splits: int) -> Params:
        """What the last of `splits` blocks of each of `tiles` tiles of results makes of its sums."""
        transform = decode.TRANSFORM[weight.row_transform]
        return FINISH.fill(
            counters=self.ws.zeros("linear.counters", tiles) if splits > 1 else None,
            block=weight.block if transform != _NO_TRANSFORM else 64,
            transform=transform,
            gain=weight.gain,
            epilogue=self.epilogue(),
        )


def _lines(count: int, block: int) -> int:
    """Lines of `block` values that a block of threads transforms: fewer where `count` would not fill a GPU."""
    lines = 64 if block == 128 else 128
    while lines > 1 and count < lines * _LINE_BLOCKS_WANTED:
        lines //= 2
    return lines


# --- few tokens ---------------------------------------------------------------------------------------


def _sparse(call: Call, weight: RBEBlocks) -> None:
    """Sparse codes, dot products in float32."""
    group, rows = group_of(call.tokens), weight.rows_pad
    x = call.inputs(weight.cols_pad, _COLUMNS, group, weight)
    parts = call.parts(1, rows)
    blocks = ceil_div(rows, _THREADS // WARP) * ceil_div(call.tokens, group)
    call.add(f"sparse_{group}", blocks, _THREADS, call.split_k(weight, x, 0, 0, parts))
    call.sum_parts(parts, rows, weight, absmax=call.absmax())


def _weight(call: Call, weight: Any) -> None:
    """A dense weight, dot products in float32."""
    group, (rows, cols) = group_of(call.tokens), weight.shape
    padded = ceil_div(cols, 64) * 64
    blocks = ceil_div(rows, _THREADS // WARP * _DOT_ROWS[group]) * ceil_div(call.tokens, group)
    each, splits = splits_of(ceil_div(cols, _SPAN), blocks)
    x = call.inputs(padded, _COLUMNS, group)
    parts = call.parts(splits, rows)
    params = DENSE_SPLIT_K.fill(
        w=weight,
        w_type=TYPE[weight.dtype],
        wide=aligned(weight) and cols * weight.itemsize % 16 == 0,
        x=x,
        rows=rows,
        cols=cols,
        padded=padded,
        tokens=call.tokens,
        each=each * _SPAN,
        splits=splits,
        ld=parts.shape[2],
        parts=parts,
    )
    call.add(f"weight_{group}", blocks * splits, _THREADS, params)
    call.sum_parts(parts, rows)


# --- many tokens --------------------------------------------------------------------------------------

_NO_CODES = CODES.fill(
    kind=0, bits=0, group=0, index_kind=0, value=None, scale=None, col_scale=None, index=None, row_start=None,
    offset=0.0, cols=0,
)  # fmt: skip


def _mma(
    call: Call,
    name: str,
    x: Any,
    w: Any,
    codes: Params,
    rows: int,
    column: int,
    depth: int,
    block: int,
    transform: int,
    gain: float,
    absmax: Any,
    height: int = _TILE,
) -> None:
    """Tensor cores: `rows` outputs from `column` on; x of at least `depth` columns; tiles of `height` tokens."""
    params = MMA.fill(
        x=x,
        ldx=x.shape[1],
        w=w,
        ldw=0 if w is None else w.shape[1],
        codes=codes,
        rows=rows,
        column=column,
        depth=depth,
        block=block,
        transform=transform,
        gain=gain,
        absmax=absmax,
        epilogue=call.epilogue(),
    )
    blocks = ceil_div(call.tokens, height) * ceil_div(rows, _TILE)
    call.add(f"mma_{name}", blocks, _THREADS, params, shared=_MMA_SHARED)


def _mma_codes(call: Call, weight: RBEBlocks) -> None:
    """Dense and grid codes, unpacked tile by tile."""
    rows, cols = weight.rows_pad, weight.cols_pad
    tiles = tiling(call.tokens, rows, ceil_div(cols, _STEP))
    x, absmax = call.half_inputs(weight)
    if tiles.splits == 1:
        _mma(
            call, "codes" if tiles.height == _TILE else f"codes_{tiles.height}", x, None,
            decode.codes_params(weight), rows, 0, cols, weight.block, decode.TRANSFORM[weight.row_transform],
            weight.gain, absmax, tiles.height,
        )  # fmt: skip
        return
    parts = call.parts(tiles.splits, rows)
    blocks = ceil_div(rows, _TILE) * ceil_div(call.tokens, tiles.height)
    params = call.split_k(weight, x, cols, tiles.each * _STEP, parts)
    call.add("mma_parts", blocks * tiles.splits, _THREADS, params, shared=_MMA_PARTS_SHARED)
    call.sum_parts(parts, rows, weight, absmax, scaled=True)


def _ffma(call: Call, w: Any, column: int, gain: float = 1.0) -> None:
    """In float32: a dense weight, or a panel of rows from `column` on."""
    rows, depth = w.shape
    params = FFMA.fill(
        x=call.x,
        x_type=TYPE[call.x.dtype],
        x_wide=depth % 8 == 0 and aligned(call.x),
        w=w,
        w_type=TYPE[w.dtype],
        w_wide=depth % 8 == 0 and aligned(w),
        ldw=depth,
        rows=rows,
        column=column,
        depth=depth,
        gain=gain,
        epilogue=call.epilogue(),
    )
    call.add("ffma", ceil_div(call.tokens, _FFMA_TILE) * ceil_div(rows, _FFMA_TILE), 128, params)


def panel_rows(cols: int, itemsize: int) -> int:
    """Rows of a decoded panel: whole tiles, about `PANEL_BYTES`."""
    return max(_TILE, PANEL_BYTES // (cols * itemsize) // _TILE * _TILE)


def _dense_tiles(call: Call, weight: Any) -> None:
    """A dense weight, tile by tile."""
    x, depth = call.x, call.x.shape[1]
    if x.dtype != _F32_DTYPE and x.dtype == weight.dtype and depth % 8 == 0 and aligned(x, weight):
        name = "f16" if x.dtype == _F16_DTYPE else "bf16"
        _mma(call, name, x, weight, _NO_CODES, weight.shape[0], 0, depth, _TILE, _NO_TRANSFORM, 1.0, None)
    else:
        _ffma(call, weight, 0)


def _panels(call: Call, weight: RBEBlocks, cache: PanelCache | None = None) -> None:
    """Decoded panels: float32 for float32 x, else W / gain in float16, padded to whole 16 bytes."""
    half = call.x.dtype != _F32_DTYPE
    width = ceil_div(weight.cols, 8) * 8 if half else weight.cols
    dtype = _F16_DTYPE if half else _F32_DTYPE
    gain = 1.0 if half else weight.gain
    x, absmax = call.x, None
    if half and not (x.dtype == _F16_DTYPE and x.shape[1] == width and aligned(x)):
        absmax = call.absmax()
        x = call.inputs(ceil_div(width, 64) * 64, _F16, absmax=absmax)
    step = panel_rows(width, dtype.itemsize)
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        scratch = call.ws.get("linear.panel", (stop - start, width), dtype)

        def decode_into(target: Any, start: int = start) -> None:
            call.launches.extend(decode.launches(weight, target, call.ws, first=start, gain=gain))

        panel = None
        if cache is not None:
            panel = cache.panel(weight, start, stop, decode_into, scratch)
            if panel.dtype != dtype:  # kept by a call with another x
                panel = None
        if panel is None:
            decode_into(scratch)
            panel = scratch
        if half:
            _mma(
                call, "f16", x, panel, _NO_CODES, stop - start, start, width, _TILE, _NO_TRANSFORM, weight.gain,
                absmax,
            )  # fmt: skip
        else:
            _ffma(call, panel, start)


def _cached_panels(call: Call, weight: RBEBlocks) -> None:
    _panels(call, weight, call.cache)


def _transform_tiles(call: Call, weight: RBEBlocks) -> None:
    half = call.x.dtype != _F32_DTYPE and transforms.is_orthonormal(weight.col_transform)
    linear_transform.add_launches(call, weight, half)


ALGORITHMS = algorithms.GpuMatmulAlgorithms(
    algorithms.DenseDot(_weight),
    algorithms.DenseTiles(_dense_tiles),
    algorithms.CodesMmaFew(linear_few.add_mma),
    algorithms.CodesMma(_mma_codes),
    algorithms.CodesDot(linear_few.add_dot),
    algorithms.SparseDot(_sparse),
    algorithms.CachedPanels(_cached_panels),
    algorithms.DecodedPanels(_panels),
    algorithms.TransformTiles(_transform_tiles),
    algorithms.Int8Few(linear_integers.add_few),
    algorithms.Int8Tiles(linear_integers.add_tiles),
)


def launches(
    x: Any,
    weight: Any,
    bias: Any,
    activation: str | None,
    residual: Any,
    out: Any,
    ws: Any,
    cache: PanelCache | None = None,
    method: str | None = None,
    prepared: PreparedInput | None = None,
    activation_bits: int | None = None,
) -> tuple[Launch, ...]:
    """The launches of `linear` for at least one result."""
    check_method(method, cache)
    call = Call(x, bias, activation, residual, out, ws, cache, prepared, [])
    algorithm: Any = ALGORITHMS.choose(weight, call.tokens, x.dtype, cache, method, activation_bits)
    algorithm.add_launches(call, weight)
    return tuple(call.launches)


def linear(
    x: Any,
    weight: Any,
    bias: Any,
    activation: str | None,
    residual: Any,
    out: Any,
    ws: Any,
    cache: PanelCache | None,
    method: str | None = None,
    prepared: PreparedInput | None = None,
    activation_bits: int | None = None,
) -> None:
    """Write activation(x W^T + bias) + residual to `out`.

    Parameters
    ----------
    x : (tokens, in) float32/float16/bfloat16, C-contiguous
    weight : (out, in) compressed, or dense of any of the three dtypes
    bias : (out,) or None; residual : (tokens, out) or None, each of any of the three dtypes
    activation : None, "relu", "gelu", "gelu_tanh" or "silu"
    out : (tokens, out), dtype of x; may be `residual`
    ws : workspace: x^, partial sums, and a panel of up to `PANEL_BYTES`
    cache : keeps decoded panels, where an algorithm decodes any
    method : restricts the choice of the algorithm for a compressed weight (`rbe_gpu.matmul`)
    prepared : of x
    activation_bits : 8 rounds activations to int8 (dense and grid codes: linear_integers.cu)
    """
    check_activation_bits(activation_bits)
    if out.size:
        run(
            *launches(
                x, weight, bias, activation, residual, out, ws, cache, method, prepared, activation_bits
            )
        )
    else:
        check_method(method, cache)
