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
    # of grid codes, see `exceptions`; 0 where they have none
    exception_start=_POINTER, start_bits="i64",  # 16 or 32 of each start
    exception_column="const u16*", exception_delta="const i8*",
    # of grid codes in nested bit planes, see `bit_planes`: a function, 0 for packed codes
    planes_of_rows=_POINTER, planes="i64", fours="i64", chunk_start="const u32*", chunk_bytes="const u8*",
    kind="i64",  # of the values: `arrays.F32` and the others
    index_kind="i64",  # `codes.FULL` and the others
    bits="i64",  # of a packed code
    group="i64", rows="i64", rows_padded="i64",
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

# (bytes of a record, offset, *fields in their order): a third of the time that assigning to the record takes
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
    # digits of activations and the scales of groups of 64, token by token; 0 where none are made
    digits="void*", digits_stride="i64", digit_groups="i64",
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

#: Grid and dense codes times the int8 activations of one to a few tokens: `int8_matvec`.
INT8_MATVEC = Struct(
    "Int8Matvec",
    weight=WEIGHT, output=OUTPUT, input=INPUT, tokens="i64", in_features="i64", block="i64", columns="i64",
    z="u8*",  # int8 (tokens, depth)
    depth="i64",  # columns rounded up to 64
    spread="i64",  # whether 32 zeros are behind each 32 columns
    scale=_FLOATS_OUT,  # (tokens)
    group="i64",  # columns of a sum of activations
    groups="i64",
    sums="i32*",  # (tokens, groups)
    line=_FLOATS_OUT,  # (columns): of one token
    lines=_FLOATS_OUT, lines_stride="i64",  # (tokens, block)
    codes="u8*", codes_stride="i64",  # (block, columns): of a block of rows that are not packed codes
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
    scale="float", softcap="float",  # 0: none
)  # fmt: skip

#: Attention of a few queries a head: `attention_few_queries`. Distances are in elements.
ATTENTION_FEW = Struct(
    "AttentionFew",
    q=_POINTER, q_sequence="i64", q_row="i64", q_head="i64",
    k=_POINTER, k_sequence="i64", k_row="i64", k_head="i64",
    v=_POINTER, v_sequence="i64", v_row="i64", v_head="i64",
    out="void*", out_sequence="i64", out_row="i64", out_head="i64",
    num_kv_heads="i64", group="i64", head_dim="i64", seq_q="i64",
    first_key="i64", keys="i64",  # keys first_key .. keys are seen
    lengths=_LONGS,  # of the sequences, 0 for none: as many keys at most
    scratch=_FLOATS_OUT, scratch_stride="i64",
    units="i64", parts="i64",  # key heads of all sequences, divided among the parts
    scale="float", softcap="float",  # 0: none
)  # fmt: skip

#: A matmul whose struct is filled: `prepared_matmul`. Fields of what a kernel does not have are 0.
PREPARED_MATMUL = Struct(
    "PreparedMatmul",
    kernel=_POINTER, params=_POINTER,
    parts="i64",  # of a kernel of tiles; 0 for one that takes a few tokens, and divides its work itself
    tokens="i64*", input_tokens="i64*",  # the fields of the matmul and of its input
    written=_LONGS,  # by the matmul: whether it wrote its results
    counters="i64*", num_counters="i64", state="i64*", state_size="i64",  # become 0 before
    not_finite=_LONGS,  # in the state of the input
)  # fmt: skip

#: A layer of `decoder_step`. Gains that a model does not have are 0.
DECODER_LAYER = Struct(
    "DecoderLayer",
    norm=_FLOATS, attention_norm=_FLOATS, ffn_norm=_FLOATS, output_norm=_FLOATS, query_norm=_FLOATS,
    key_norm=_FLOATS,
    norm_bias=_FLOATS, ffn_norm_bias=_FLOATS,  # of LayerNorms
    query=PREPARED_MATMUL, key=PREPARED_MATMUL, value=PREPARED_MATMUL, output=PREPARED_MATMUL, gate=PREPARED_MATMUL,
    up=PREPARED_MATMUL, down=PREPARED_MATMUL,
    cos=_FLOATS, sin=_FLOATS,  # (positions, rotary_half)
    window="i64",  # keys in front of a token that it sees, -1 for all
)  # fmt: skip

#: One token through a decoder: `decoder_step`. Distances in the cache are in elements.
DECODER_STEP = Struct(
    "DecoderStep",
    layers=_POINTER, num_layers="i64", hidden_size="i64", intermediate_size="i64", num_heads="i64",
    num_kv_heads="i64", head_dim="i64",
    rotary_half="i64",  # 0: no rotations
    gated="i64",  # whether the FFN has a gate
    sandwich="i64",  # whether what is added is normalised before
    x=_FLOATS_OUT, y=_FLOATS_OUT, h=_FLOATS_OUT, q=_FLOATS_OUT, k=_FLOATS_OUT, v=_FLOATS_OUT, mixed=_FLOATS_OUT,
    gate=_FLOATS_OUT, up=_FLOATS_OUT,
    final_norm=_FLOATS, final_norm_bias=_FLOATS,
    position="i64",
    cache=_FLOATS_OUT, cache_layer="i64",  # from the keys of a layer to those of the next
    cache_values="i64",  # from keys to values
    attention=_POINTER, attention_kernel=_POINTER,  # `ATTENTION_FEW`, and `attention_few_queries.HEADS`
    parts="i64",
)  # fmt: skip

#: A layer of `encoder_step`.
ENCODER_LAYER = Struct(
    "EncoderLayer",
    query=PREPARED_MATMUL, key=PREPARED_MATMUL, value=PREPARED_MATMUL, output=PREPARED_MATMUL, up=PREPARED_MATMUL,
    down=PREPARED_MATMUL,
    attention_gain=_FLOATS, attention_bias=_FLOATS, ffn_gain=_FLOATS, ffn_bias=_FLOATS,  # of the norms
)  # fmt: skip

#: A few tokens through an encoder: `encoder_step`.
ENCODER_STEP = Struct(
    "EncoderStep",
    layers=_POINTER, num_layers="i64", tokens="i64", hidden_size="i64",
    x=_FLOATS_OUT, y=_FLOATS_OUT,
    attention=_POINTER, attention_kernel=_POINTER,  # `ATTENTION`, and `attention._tiles`
    attention_parts="i64",
)  # fmt: skip

# (*fields in their order) -> bytes of a record: filling it by names takes 10 us
pack_attention_few = struct.Struct(f"{len(ATTENTION_FEW.fields) - 2}q2f").pack

#: A sequence of the batch: rows in front of its queries and keys, queries, keys seen, keys minus queries, and the
#: queries of a tile.
SEQUENCE = Struct(
    "Sequence", first_query="i64", first_key="i64", queries="i64", keys="i64", offset="i64", tile="i64"
)
