"""The parameters of the CPU's matmul and attention kernels: one struct per kernel.

The driver fills a `record` of a struct; the kernel gets its address and reads the fields by name (`p.tokens`).
Addresses are int64 there, for `arrays.floats_at(p.x)` and the others. A field without a comment is an address, a
size or a count. A `*_stride` is the distance between the scratch memory of one thread and that of the next, in
elements.
"""

from __future__ import annotations

import struct

from rbe_gpu.kernel_struct import Struct

_POINTER, _FLOATS, _FLOATS_OUT, _INTS, _LONGS = (
    "const void*",
    "const float*",
    "float*",
    "const i32*",
    "const i64*",
)

#: A weight (rows, columns), dense or compressed.
WEIGHT = Struct(
    "Weight",
    value=_POINTER, scale="const f16*", column_scale="const f16*", index="const u8*", row_start=_LONGS,
    kind="i64",  # of the values: `arrays.F32` and the others
    index_kind="i64",  # `codes.FULL` and the others
    bits="i64", group="i64", rows="i64", rows_padded="i64",
    row_values="i64",  # stored values of a row, dense codes only
    row_bytes="i64",  # of a bitmap
    first_row="i64",  # of the results that the weight makes
    # the basis: parameters (parameter rows, basis_blocks, basis_params)
    basis="const f16*", basis_blocks="i64", basis_params="i64",
    features="i64",  # basis features of a block of activations
    sum_features="i64",  # basis sums of a block of results; 0 for vectors
    # `transforms.basis_terms`
    terms="i64", term_row=_LONGS, term_column=_LONGS, term_param=_LONGS, term_factor=_FLOATS,
    # sparse rows that turn basis sums into results
    psi_start=_LONGS, psi_offset=_INTS, psi_value=_FLOATS,
    gain="float", dead_zone="float", shrink="float",
)  # fmt: skip

#: An array of activations, and how its values are encoded (`arrays.F32` and the others).
INPUT = Struct("Input", x=_POINTER, kind="i64")

#: What the epilogue adds and where it stores: bias and residual are 0 where there is none.
OUTPUT = Struct(
    "Output",
    bias=_FLOATS, activation="i64", residual=_POINTER, residual_kind="i64",
    out="void*", out_kind="i64", out_features="i64",
)  # fmt: skip

# (bytes of a record, offset, *fields): a third of the time that assigning to the record takes
pack_input = struct.Struct(f"{len(INPUT.fields)}q").pack_into
pack_output = struct.Struct(f"{len(OUTPUT.fields)}q").pack_into

#: Activations into tiles of tokens, blocks transformed: `transform_in`.
TRANSFORM_IN = Struct(
    "TransformIn",
    input=INPUT, tokens="i64", in_features="i64", block="i64",
    transform="i64",  # address of the function, 0 for none
    # sparse rows from a block to its basis features, and `SPARSE_ROWS`
    feature_rows=_POINTER, features="i64", feature_start=_LONGS, feature_offset=_INTS, feature_value=_FLOATS,
    out=_FLOATS_OUT, depth="i64", width="i64",
    scratch=_FLOATS_OUT, scratch_stride="i64",
    units="i64", parts="i64",
    state="i64*",  # see `transform_in`
)  # fmt: skip

#: Tiles of tokens: `matmul_tiles`.
TILES = Struct(
    "Tiles",
    weight=WEIGHT, output=OUTPUT,
    # activations (tiles, depth, width); `columns` of `depth` are coefficients
    x=_FLOATS, tokens="i64", depth="i64", columns="i64", width="i64",
    transform_in=_POINTER,  # `TRANSFORM_IN` of activations that are still to be transformed, else 0
    transform_in_kernel="i64",
    # functions, 0 where a weight needs none: `EPILOGUE`, of `CODE_ROWS`, `_DENSIFY`, `BASIS_ENTRIES`, `SPARSE_ROWS`
    epilogue=_POINTER, code_rows=_POINTER, densify=_POINTER, basis_entries=_POINTER, basis_rows=_POINTER,
    block="i64", transform_out="i64", unit_rows="i64", panel="i64", panels="i64", group_tiles="i64",
    sums=_FLOATS_OUT, sums_stride="i64", lines=_FLOATS_OUT, lines_stride="i64",
    entry_value=_FLOATS_OUT, entry_offset="i32*", entry_stride="i64",
    entry_start="i64*", entry_start_stride="i64",
    basis_value=_FLOATS_OUT, basis_offset="i32*", basis_stride="i64",
    basis_start="i64*", basis_start_stride="i64",
    corner=_FLOATS_OUT, corner_stride="i64",
    counters="i64*", parts="i64",
)  # fmt: skip

#: One to a few tokens: `matvec`.
MATVEC = Struct(
    "Matvec",
    weight=WEIGHT, output=OUTPUT, input=INPUT, tokens="i64", in_features="i64", block="i64", columns="i64",
    parts="i64",  # that units are divided among, each with scratch memory of its own
    synthesis_in=_FLOATS, synthesis_out=_FLOATS,  # (block, block), 0 for none
    x=_FLOATS_OUT,  # (tokens, columns): transformed activations
    groups="i64",  # of a row, with a scale each
    sums=_FLOATS_OUT,  # (tokens, groups): of the activations of a group
    digits="void*", digits_stride="i64",  # int8 activations and their scales, token by token; 0 where none are made
    lines=_FLOATS_OUT, lines_stride="i64",
    entry_value=_FLOATS_OUT, entry_offset="i32*", entry_stride="i64",
    entry_start="i64*", entry_start_stride="i64",
    written="i64",  # by the kernel: whether it wrote the results
)  # fmt: skip

#: Activations to int8 in tiles of tokens: `int8_input`.
INT8_INPUT = Struct(
    "Int8Input",
    input=INPUT, tokens="i64", in_features="i64", block="i64",
    transform=_POINTER,  # the function, 0 for none
    column_scale="const f16*",  # (columns), 0 for none
    columns="i64",
    depth="i64",  # columns rounded up to 64
    group="i64",  # columns of a sum of activations
    groups="i64", width="i64",
    out="u8*",  # int8 (tiles, depth / 4, width, 4)
    scale=_FLOATS_OUT,  # (tiles, width)
    sums="i32*",  # (tiles, groups, width)
    ones="const u8*",  # (columns), then 64 zeros
    scratch="u8*", scratch_stride="i64",
    units="i64", parts="i64",
    state="i64*",  # units done, then counters of parts
)  # fmt: skip

#: Codes times int8 activations in tiles of tokens: `int8_tiles`.
INT8_TILES = Struct(
    "Int8Tiles",
    weight=WEIGHT, output=OUTPUT,
    input=_POINTER,  # `INT8_INPUT`
    input_kernel=_POINTER,  # that is still to be run, else 0
    offset="i64",  # what is added to a code before it is multiplied
    base_bits="i64",  # of codes where products are added in int16
    multiply=_POINTER, epilogue=_POINTER,  # the functions `MULTIPLY` and `EPILOGUE`
    block="i64", transform_out=_POINTER, unit_rows="i64", panel="i64", group_tiles="i64",
    sums="void*", sums_stride="i64",  # i32 or float (group_tiles, unit_rows, width)
    group_sums="i32*", group_sums_stride="i64",  # (unit_rows, width): of one group and tile
    lines="u8*", lines_stride="i64",  # (unit_rows, panel)
    entries=_INTS, entry_start=_INTS,  # `int8_exceptions.Exceptions`
    corner=_FLOATS_OUT, corner_stride="i64",
    counters="i64*", parts="i64",
)  # fmt: skip

#: Grid codes times the int8 activations of one to a few tokens: `int8_matvec`.
INT8_MATVEC = Struct(
    "Int8Matvec",
    weight=WEIGHT, output=OUTPUT, input=INPUT, tokens="i64", in_features="i64", block="i64", columns="i64",
    z="u8*",  # int8 (tokens, columns)
    scale=_FLOATS_OUT,  # (tokens)
    line=_FLOATS_OUT,  # (columns): of one token
    lines=_FLOATS_OUT, lines_stride="i64",  # (tokens, block)
    parts="i64",
)  # fmt: skip

#: Attention over tiles of queries: `attention`. Distances between sequences, rows and heads are in elements.
ATTENTION = Struct(
    "Attention",
    q=_POINTER, q_sequence="i64", q_row="i64", q_head="i64",
    k=_POINTER, k_sequence="i64", k_row="i64", k_head="i64",
    v=_POINTER, v_sequence="i64", v_row="i64", v_head="i64",
    out="void*", out_sequence="i64", out_row="i64", out_head="i64",
    bias=_FLOATS, keep="const bool*",  # the mask: one of the two
    mask_kind="i64", mask_sequence="i64", mask_head="i64", mask_query="i64", mask_key="i64",
    lse=_FLOATS_OUT, lse_sequence="i64", lse_head="i64",  # 0 where it is not wanted
    batch="i64", num_heads="i64", group="i64", head_dim="i64", left="i64", right="i64",
    sequences=_POINTER,  # of `SEQUENCE`
    tasks=_LONGS, num_tasks="i64",
    max_tiles="i64",  # of a sequence
    scratch=_FLOATS_OUT, scratch_stride="i64",
    counter="i64*",  # tasks claimed
    scale="float",
)  # fmt: skip

#: A sequence of the batch: rows in front of its queries and keys, queries, keys seen, keys minus queries, and the
#: queries of a tile.
SEQUENCE = Struct(
    "Sequence", first_query="i64", first_key="i64", queries="i64", keys="i64", offset="i64", tile="i64"
)
