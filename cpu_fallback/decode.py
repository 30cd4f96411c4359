"""W = gain * (S_r C S_c^T + sum_k p_k Phi_k): compressed weights to dense rows.

Three steps per panel of rows: stored codes to coefficients, block transforms in place (each block stays in
the first-level cache between its two matmuls), then basis, crop and storage type in one pass. Each code
byte is read once.
`embedding` and `linear` decode through the same functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rbe_gpu import transforms
from rbe_gpu.blocks import RBEBlocks, RBEMatrix
from rbe_gpu.codecs import Codes, DenseCodes, GridCodes, SparseCodes
from rbe_gpu.codecs.grid import GridPlanes, GridRows
from rbe_gpu.codecs.packing import RUN
from rbe_gpu.workspace import Workspace

from . import grid_planes, grid_rows, params
from ._jit import cpu_inline
from ._parts import in_parts, record_at
from ._pool import num_threads
from .arrays import address
from .codes import grid_integers, scale_grid_integers
from .operand import operand_of
from .simd import bits, narrow, vload, vstore, wide_registers, widen
from .unpack import add_scaled, multiply_1x32, multiply_4x16, multiply_4x32, multiply_4x64, unpack_run

PANEL_BYTES = 2 << 20  # float32 bytes of a panel: coefficients and transform stay in a 2 to 4 MB cache share
_WEIGHT = params.WEIGHT.dtype
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_FULL, _BITMAP, _DELTA = 0, 1, 2
_INDEX_KIND = {"full": _FULL, "bitmap": _BITMAP, "delta": _DELTA}
_NO_BYTES = np.empty((1, 1), np.uint8)
_NO_PARAMS = np.empty((0, 0, 0), np.uint16)
_NO_PHI = np.empty((0, 1, 1), np.float32)


# --- codes to coefficients ----------------------------------------------------------------------------


@cpu_inline
def _dense_rows_of(width, value, scale, group, gain, rows, first, out, begin, end):
    """`_dense_rows` of one width."""
    middle = np.float32((1 << width) - 1) * _HALF
    cols, row_bytes = out.shape[1], value.shape[1]
    for i in range(begin, end):
        row = first + i
        if rows is not None:
            row = rows[i]
        for run in range(cols // RUN):
            s = gain * widen(scale[row, run * RUN // group])
            at = row * row_bytes + run * 4 * width
            unpack_run(value, at, width, s, -s * middle, out, i * cols + run * RUN)


def _dense_rows(value, scale, width, group, gain, rows, first, out, begin, end):
    """out[i] = gain * scale * (u - (2^b - 1) / 2) for stored row rows[i], or first + i where rows is None."""
    # the usual widths as constants: a run of 32 codes takes 20 ns where the width is a variable, 5 ns so
    if width == 4:
        _dense_rows_of(4, value, scale, group, gain, rows, first, out, begin, end)
    elif width == 8:
        _dense_rows_of(8, value, scale, group, gain, rows, first, out, begin, end)
    else:
        _dense_rows_of(width, value, scale, group, gain, rows, first, out, begin, end)


_dense_rows_in_parts = in_parts(_dense_rows)


def _grid_rows(weight, rows, first, out, begin, end):
    """out[i] = gain * row_scale * col_scale[c] * (q - sign(q) * shrink); weight : address of a `params.WEIGHT`."""
    w, flat = record_at(weight, _WEIGHT), out.reshape(-1)
    cols = out.shape[1]
    for i in range(begin, end):
        row = first + i
        if rows is not None:
            row = rows[i]
        grid_integers(w, row, 0, cols, flat, i * cols)
        scale_grid_integers(w, row, 0, cols, flat, i * cols)


_grid_rows_in_parts = in_parts(_grid_rows)


@cpu_inline
def _scatter(values, offset, start, stop, kind, index, row, gain, out):
    """Entries start..stop of a row, at values[offset + e], to their columns; zero elsewhere."""
    if kind == _FULL:
        for k in range(stop - start):
            out[k] = gain * widen(values[offset + start + k])
        return
    for c in range(out.shape[0]):
        out[c] = _ZERO
    if kind == _BITMAP:
        e = offset + start
        for byte in range(index.shape[1]):
            word = np.int32(index[row, byte])
            column = 8 * byte
            while word != 0:
                if word & 1:
                    out[column] = gain * widen(values[e])
                    e += 1
                word >>= 1
                column += 1
    else:
        column = -1
        for e in range(start, stop):
            column += np.int64(index[0, e]) + 1
            out[column] = gain * widen(values[offset + e])


def _sparse_float_rows(value, kind, index, row_start, gain, rows, first, out, begin, end):
    """out[i, column(e)] = gain * value[e] for the entries e of the row; zero elsewhere."""
    for i in range(begin, end):
        row = first + i
        if rows is not None:
            row = rows[i]
        _scatter(value, 0, row_start[row], row_start[row + 1], kind, index, row, gain, out[i])


_sparse_float_rows_in_parts = in_parts(_sparse_float_rows)


def _sparse_int_rows(
    value, scale, width, group, dead_zone, kind, index, row_start, gain, rows, first, scratch, out, begin, end
):
    """The same for b-bit values: sign * (dead_zone + scale * (m + 1/2)); scratch holds one row per part."""
    half = np.float32(1 << (width - 1))
    parts, length = scratch.shape
    for part in range(begin, end):
        values = scratch[part]
        for i in range(out.shape[0] * part // parts, out.shape[0] * (part + 1) // parts):
            row = first + i
            if rows is not None:
                row = rows[i]
            start, stop = row_start[row], row_start[row + 1]
            base = start // RUN * RUN
            for run in range(base // RUN, (stop + RUN - 1) // RUN):
                unpack_run(
                    value, run * 4 * width, width, _ONE, _ZERO, scratch, part * length + run * RUN - base
                )
            for e in range(start, stop):
                u = values[e - base]
                s = widen(scale[e // group])
                m = u - half if u >= half else half - _ONE - u
                v = dead_zone + s * (m + _HALF)
                values[e - base] = v if u >= half else -v
            _scatter(values, -base, start, stop, kind, index, row, gain, out[i])


_sparse_int_rows_in_parts = in_parts(_sparse_int_rows)


def _expand_dense(weight: RBEBlocks, codes: Any, rows: Any, first: int, out: Any, ws: Workspace) -> None:
    gain = np.float32(weight.gain)
    _dense_rows_in_parts(
        out.shape[0], num_threads(), codes.value, bits(codes.scale), codes.bits, codes.group, gain, rows, first, out
    )  # fmt: skip


def _expand_grid(weight: RBEBlocks, codes: Any, rows: Any, first: int, out: Any, ws: Workspace) -> None:
    record = operand_of(weight).params
    _grid_rows_in_parts(out.shape[0], num_threads(), address(record.view(np.uint8)), rows, first, out)


def _expand_grid_rows(weight: RBEBlocks, codes: Any, rows: Any, first: int, out: Any, ws: Workspace) -> None:
    grid_rows.rows_of(codes, weight.gain, rows, first, out)


def _expand_grid_planes(
    weight: RBEBlocks, codes: Any, rows: Any, first: int, out: Any, ws: Workspace
) -> None:
    grid_planes.rows_of(codes, weight.gain, rows, first, out)


def _expand_sparse(weight: RBEBlocks, codes: Any, rows: Any, first: int, out: Any, ws: Workspace) -> None:
    gain, kind = np.float32(weight.gain), _INDEX_KIND[codes.index_kind]
    index = _NO_BYTES if codes.index is None else np.atleast_2d(codes.index)
    if codes.scale is None:
        _sparse_float_rows_in_parts(
            out.shape[0], num_threads(), bits(codes.value), kind, index, codes.row_start, gain, rows, first, out
        )  # fmt: skip
        return
    scratch = ws.get("decode.values", (num_threads(), weight.cols_pad + 2 * RUN))
    _sparse_int_rows_in_parts(
        scratch.shape[0], scratch.shape[0], codes.value, bits(codes.scale), codes.bits, codes.group,
        np.float32(codes.dead_zone), kind, index, codes.row_start, gain, rows, first, scratch, out,
    )  # fmt: skip


#: codec -> its kernel: (weight, codes, rows, first, out, workspace) as in `expand`
EXPAND: dict[type[Codes], Any] = {
    DenseCodes: _expand_dense,
    GridCodes: _expand_grid,
    GridPlanes: _expand_grid_planes,
    GridRows: _expand_grid_rows,
    SparseCodes: _expand_sparse,
}


def expand(weight: RBEBlocks, rows: Any, first: int, out: Any, ws: Workspace) -> None:
    """gain * C for the stored rows `rows` (int64), or first, first + 1, ... where `rows` is None.

    out : (n, cols_pad) float32
    """
    codes = weight.codes
    kernel = EXPAND.get(type(codes))
    if kernel is None:
        raise NotImplementedError(f"no CPU kernel decodes {codes.kind} codes; add it to EXPAND in {__name__}")
    kernel(weight, codes, rows, first, out, ws)


# --- coefficients to rows -----------------------------------------------------------------------------


@cpu_inline
def _four_rows(a, a_at, a_step, b, b_at, b_step, block, out, out_at, out_step):
    """out[4, block] = a[4, block] @ b[block, block], as many columns at a time as there are registers for."""
    if not wide_registers():
        for part in range(0, block, 16):
            multiply_4x16(a, a_at, a_step, b, b_at + part, b_step, block, out, out_at + part, out_step)
    elif block == 32:
        multiply_4x32(a, a_at, a_step, b, b_at, b_step, block, out, out_at, out_step)
    else:
        for part in range(0, block, 64):
            multiply_4x64(a, a_at, a_step, b, b_at + part, b_step, block, out, out_at + part, out_step)


@cpu_inline
def _times_transposed(a, a_at, a_step, s_t, rows, block, out, out_at, out_step):
    """out[rows, block] = a[rows, block] @ s_t, flat offsets; out and a do not overlap."""
    done = rows // 4 * 4
    for i in range(0, done, 4):
        _four_rows(a, a_at + i * a_step, a_step, s_t, 0, block, block, out, out_at + i * out_step, out_step)
    for i in range(done, rows):
        for part in range(0, block, 32):
            multiply_1x32(a, a_at + i * a_step, s_t, part, block, block, out, out_at + i * out_step + part)


@cpu_inline
def _rows_transform(s, c, c_at, c_step, block, out):
    """out[block, block] = s @ c[block, block]; out is contiguous from its flat start `out[1]` in `out[0]`."""
    target, at = out
    for i in range(0, block, 4):
        _four_rows(s, i * block, block, c, c_at, c_step, block, target, at + i * block, block)


def _synthesise_blocks(c, s, s_t, block, scratch, begin, end):
    """c_IJ = S c_IJ S^T in place, a block at a time; scratch holds a block per part, in the first cache."""
    cols = c.shape[1]
    per_row = cols // block
    tiles, parts = c.shape[0] // block * per_row, scratch.shape[0]
    for part in range(begin, end):
        own = part * block * block
        for tile in range(tiles * part // parts, tiles * (part + 1) // parts):
            at = tile // per_row * block * cols + tile % per_row * block
            _rows_transform(s, c, at, cols, block, (scratch, own))
            _times_transposed(scratch, own, block, s_t, block, block, c, at, cols)


_synthesise_blocks_in_parts = in_parts(_synthesise_blocks)


def _synthesise_runs(c, s_t, block, scratch, begin, end):
    """c[i, J] = c[i, J] S^T in place, 16 rows of one block column at a time."""
    rows, cols = c.shape
    per_row = cols // block
    tiles, parts = (rows + 15) // 16 * per_row, scratch.shape[0]
    for part in range(begin, end):
        own = part * block * block
        for tile in range(tiles * part // parts, tiles * (part + 1) // parts):
            row = tile // per_row * 16
            count = min(16, rows - row)
            at = row * cols + tile % per_row * block
            for i in range(count):
                for k in range(0, block, 16):
                    vstore(scratch, own + i * block + k, vload(c, at + i * cols + k))
            _times_transposed(scratch, own, block, s_t, count, block, c, at, cols)


_synthesise_runs_in_parts = in_parts(_synthesise_runs)


def _epilogue(block_rows, params, gain, phi, rows, first, row_block, out, begin, end):
    """out[i, c] = block_rows[i, c] + gain * sum_k p[I, J, k] Phi[k, row in block, column in block]."""
    cols = out.shape[1]
    size = phi.shape[2]
    for i in range(begin, end):
        source = block_rows[i]
        if params.shape[0] > 0:
            row = first + i
            if rows is not None:
                row = rows[i]
            for j in range(source.shape[0] // size):
                for k in range(phi.shape[0]):
                    p = gain * widen(params[row // row_block, j, k])
                    pattern_at = (k * phi.shape[1] + row % row_block) * size
                    add_scaled(p, phi, pattern_at, block_rows, i * block_rows.shape[1] + j * size, size)
        for c in range(cols):
            out[i, c] = narrow(out, source[c])


_epilogue_in_parts = in_parts(_epilogue)


def _convert(source, out, begin, end):
    for r in range(begin, end):
        for c in range(out.shape[1]):
            out[r, c] = narrow(out, widen(source[r, c]))


_convert_in_parts = in_parts(_convert)


def convert(source: Any, out: Any) -> None:
    """out[r, c] = source[r, c] in the storage type of `out`; both (rows, cols)."""
    _convert_in_parts(out.shape[0], num_threads(), source, out)


def _basis_arguments(weight: RBEBlocks) -> tuple[Any, Any]:
    if weight.basis is None:
        return _NO_PARAMS, _NO_PHI
    return bits(weight.basis), _phi(isinstance(weight, RBEMatrix), weight.block)


def _phi(matrix: bool, size: int) -> Any:
    """Basis functions float32, (functions, rows of a block, columns of a block)."""
    key = (matrix, size)
    if key not in _PHI:
        phi = transforms.basis_2d(size) if matrix else transforms.basis_1d(size)[:, None, :]
        _PHI[key] = np.ascontiguousarray(phi, np.float32)
    return _PHI[key]


_PHI: dict[tuple[bool, int], Any] = {}


def decode_rows(weight: RBEBlocks, rows: Any, first: int, count: int, out: Any, ws: Workspace) -> None:
    """Dense rows of a weight: the stored rows `rows` (int64, vectors only), or first .. first + count.

    out : (count, cols), any storage type. `first` is a multiple of the row block.
    """
    block, cols_pad = weight.block, weight.cols_pad
    count_pad = -(-count // weight.row_block) * weight.row_block
    direct = weight.basis is None and out.dtype == np.float32 and out.shape == (count_pad, cols_pad)
    buffer = out if direct else ws.get("decode.rows", (count_pad, cols_pad))
    expand(weight, rows, first, buffer, ws)
    if weight.transform != "none":
        s = transforms.cast_synthesis(weight.transform, block)
        across = weight.col_transform
        s_t = transforms.cast_synthesis(across, block, transposed=True)
        scratch = ws.get("decode.block", (num_threads(), block * block))
        if not weight.row_transformed:
            _synthesise_runs_in_parts(scratch.shape[0], scratch.shape[0], buffer, s_t, block, scratch)
        else:
            _synthesise_blocks_in_parts(scratch.shape[0], scratch.shape[0], buffer, s, s_t, block, scratch)
    if buffer is not out:
        params, phi = _basis_arguments(weight)
        gain = np.float32(weight.gain)
        _epilogue_in_parts(
            out.shape[0], num_threads(), buffer, params, gain, phi, rows, first, weight.row_block, bits(out)
        )


def panel_rows(weight: RBEBlocks) -> int:
    """Rows decoded at a time: whole blocks, about `PANEL_BYTES` of float32."""
    rows = max(1, PANEL_BYTES // (4 * weight.cols_pad))
    return max(64, rows // 64 * 64) if weight.row_block <= 64 else max(128, rows // 128 * 128)


def decode(weight: RBEBlocks, out: Any, ws: Workspace) -> None:
    """All rows of `weight` into out (rows, cols) float32, float16 or bfloat16."""
    step = panel_rows(weight)
    for first in range(0, weight.rows, step):
        count = min(step, weight.rows - first)
        decode_rows(weight, None, first, count, out[first : first + count], ws)
