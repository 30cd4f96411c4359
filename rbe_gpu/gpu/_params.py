"""The parameters of every CUDA kernel: one struct per kernel family.

`HEADERS` says which of them stand in which header; `_source` puts the text in the place of `#include "..._params.h"`,
so that there is nothing to keep in step. A kernel takes the fields one by one, since the struct by value costs
registers (figures in `rbe_gpu/kernel_struct.py`): there is no common layout that a `static_assert` could check.
Codes (`*_type`, `activation`, `kind`, ...) are those of the CUDA sources. A field of type `CONSTANT` is a number that
the kernel is compiled for: `_source.kernel_source` makes one module per kernel and set of such numbers.
"""

from __future__ import annotations

from ..kernel_struct import CONSTANT, Struct

_POINTER, _OUTPUT, _FLOATS, _FLOATS_OUT = "const void*", "void*", "const float*", "float*"

#: n / divisor as a product: see `_elements.divider`.
DIVIDER = Struct("Divider", factor="u64", shift="int")

#: silu, gelu, swiglu: every element of `out`; `by_cols` divides by the chunks of a row.
ELEMENTWISE = Struct(
    "ElementwiseParams",
    x=_POINTER, bias=_POINTER, out=_OUTPUT, bias_type="int", count="i64", cols="i64", by_cols=DIVIDER,
)  # fmt: skip

ADD = Struct("AddParams", x=_POINTER, residual=_POINTER, out=_OUTPUT, count="i64")

#: count: units of all heads; units: those of a head. by_heads divides by num_heads, the others by their fields.
ROPE = Struct(
    "RopeParams",
    x=_POINTER, cos=_FLOATS, sin=_FLOATS, positions=_POINTER, wide="int", out=_OUTPUT,
    count="i64", units="i64", by_units=DIVIDER, by_heads=DIVIDER, seq="i64", by_seq=DIVIDER,
    head_dim="i64", half="i64", max_positions="i64",
)  # fmt: skip

#: threshold: floor(p 2^32), up to 2^32; factor: 1 / (1 - p).
DROPOUT = Struct(
    "DropoutParams",
    x=_POINTER, residual=_POINTER, out=_OUTPUT,
    count="i64", threshold="u64", factor="float", seed="u64", offset="u64",
)  # fmt: skip

#: Strides of the mask are in elements.
SOFTMAX = Struct(
    "SoftmaxParams",
    x=_POINTER, out=_OUTPUT, rows="i64", cols="i64", scale="float",
    mask_kind="int", mask=_POINTER, mask_row_stride="i64", mask_col_stride="i64",
)  # fmt: skip

#: layer_norm, and rms_norm without `bias`.
NORM = Struct(
    "NormParams",
    x=_POINTER, residual=_POINTER, out=_OUTPUT, residual_out=_OUTPUT, weight=_POINTER, bias=_POINTER,
    weight_type="int", bias_type="int", rows="i64", cols="i64", eps="float",
)  # fmt: skip

L2_NORMALIZE = Struct("L2NormalizeParams", x=_POINTER, out=_OUTPUT, rows="i64", cols="i64", eps="float")

#: Padded sequences of `seq` tokens, with or without `lengths`; or packed ones, with `cu_seqlens`.
MEAN_POOL = Struct(
    "MeanPoolParams",
    x=_POINTER, seq="i64", lengths="const i64*", cu_seqlens="const i64*", out=_OUTPUT, out_type="int", batch="i64",
    cols="i64",
)  # fmt: skip

#: Strides are in elements, of the mask in bytes. Packed sequences: seq_q and seq_k are rows in all.
ATTENTION = Struct(
    "AttentionParams",
    q=_POINTER, k=_POINTER, v=_POINTER, out=_OUTPUT, mask=_POINTER,
    lengths="const i64*", cu_seqlens_q="const i64*", cu_seqlens_k="const i64*", lse=_FLOATS_OUT,
    q_batch_stride="i64", q_row_stride="i64", q_head_stride="i64",
    k_batch_stride="i64", k_row_stride="i64", k_head_stride="i64",
    v_batch_stride="i64", v_row_stride="i64", v_head_stride="i64",
    out_batch_stride="i64", out_row_stride="i64", out_head_stride="i64",
    mask_batch_stride="i64", mask_head_stride="i64", mask_row_stride="i64", mask_key_stride="i64",
    batch="i64", num_heads="int",
    group="int",  # query heads that share a head of k and v
    seq_q="int", seq_k="int", head_dim="int", scale="float",
    window_left="int", window_right="int",  # negative: no limit
    mask_kind="int", mask_queries="int", alignment="int",
    capped=CONSTANT, softcap="float", cap_unit="float",  # 2 log2(e) / softcap
)  # fmt: skip

#: The coefficients of a compressed weight, and where they are stored.
CODES = Struct(
    "Codes",
    kind=CONSTANT,
    bits=CONSTANT,  # of a code; sparse: 32 and 16 are float and f16
    group=CONSTANT,  # dense: columns, sparse: entries that share a scale
    index_kind=CONSTANT,  # sparse
    value="const unsigned char*",
    scale="const f16*",  # dense: (rows, ceil(cols / group)); grid: (rows); sparse: (ceil(entries / group))
    col_scale="const f16*",  # grid
    index="const unsigned char*",  # sparse
    row_start="const i64*",  # sparse
    offset="float",  # grid: shrink; sparse: dead zone
    cols="i64",  # padded: whole blocks
)

#: Rows of a weight that has `stored` of them: from `first` on, or those in `ids`, int64 (`wide`) or int32.
ROWS = Struct("RowNumbers", ids=_POINTER, wide=CONSTANT, first="i64", stored="i64")

#: decode_<B>, decode_plain. sides: ALONG_ROWS, DOWN_COLUMNS; wide: rows of `out` are aligned to 16 bytes. by_pieces
#: divides by the pieces of a row: tiles side by side, or parts of decode_plain.
DECODE = Struct(
    "DecodeParams",
    codes=CODES, starts="const uint2*", numbers=ROWS, rows="i64", cols="i64", by_pieces=DIVIDER, sides=CONSTANT,
    transform=CONSTANT, with_basis=CONSTANT, basis="const f16*", gain="float", out=_OUTPUT, type=CONSTANT,
    wide=CONSTANT,
)  # fmt: skip

#: decode_starts.
STARTS = Struct("StartsParams", codes=CODES, numbers=ROWS, rows="i64", block=CONSTANT, starts="uint2*")

#: embedding_<B>; by_pieces as of decode.
EMBEDDING = Struct(
    "EmbeddingParams",
    codes=CODES, starts="const uint2*", numbers=ROWS, count="i64", cols="i64", by_pieces=DIVIDER,
    transform=CONSTANT, with_basis=CONSTANT, basis="const f16*", gain="float", out=_OUTPUT, type=CONSTANT,
)  # fmt: skip

#: embedding_rows: `count` rows of `units` units of 2^unit bytes.
COPY_ROWS = Struct(
    "CopyRowsParams",
    numbers=ROWS, table=_POINTER, count="i64", units="i64", unit=CONSTANT, out=_OUTPUT,
)  # fmt: skip

#: x of linear, (tokens, cols) row-major; wide: rows of 4 values start at multiples of their size.
ACTIVATIONS = Struct("Activations", data=_POINTER, type=CONSTANT, wide=CONSTANT, tokens="i64", cols="i64")

#: out = activation(y + bias) + residual, (tokens, cols) row-major; wide: rows of 8 values are aligned to 16 bytes.
EPILOGUE = Struct(
    "Epilogue",
    bias=_POINTER, bias_type=CONSTANT, activation=CONSTANT, residual=_POINTER, residual_type=CONSTANT,
    type=CONSTANT, out=_OUTPUT, tokens="i64", cols="i64", wide=CONSTANT,
)  # fmt: skip

#: linear_absmax.
ABSMAX = Struct("AbsmaxParams", x=ACTIVATIONS, absmax=_FLOATS_OUT)

#: linear_inputs: `padded` columns and `group` tokens a group are written.
INPUTS = Struct(
    "InputsParams",
    x=ACTIVATIONS, padded="i64", block=CONSTANT, transform=CONSTANT, lines="int", by_token=DIVIDER,
    absmax=_FLOATS, layout=CONSTANT, group=CONSTANT, out=_OUTPUT,
)  # fmt: skip

#: linear_features.
FEATURES = Struct(
    "FeaturesParams", x=ACTIVATIONS, blocks="i64", block=CONSTANT, matrix=CONSTANT, out=_FLOATS_OUT
)

#: linear_sparse_T, linear_mma_parts: partial sums (splits, tokens, ld). each: columns of a split (mma_parts); ldx:
#: columns of x^.
SPLIT_K = Struct(
    "SplitKParams",
    codes=CODES, x=_POINTER, ldx="i64", rows="i64", tokens="i64", each="i64", splits="int", ld="i64",
    parts=_FLOATS_OUT,
)  # fmt: skip

#: What the last block of a tile of results makes of the sums; counters: one a tile, 0 between launches.
FINISH = Struct(
    "Finish", counters="u32*", block=CONSTANT, transform=CONSTANT, gain="float", epilogue=EPILOGUE
)

#: linear_few_dot_T: x is transformed in blocks of in_block; a split has `each` spans of 1024 columns. parts (splits,
#: tokens, ld), unless there is one split. The basis' fields: see `SPLIT_K_EPILOGUE`.
DOT = Struct(
    "DotParams",
    x=ACTIVATIONS, in_block=CONSTANT, in_transform=CONSTANT, codes=CODES, rows="i64", each="int", splits="int",
    ld="i64", parts=_FLOATS_OUT, finish=FINISH, with_basis=CONSTANT, matrix=CONSTANT, basis="const f16*",
    features=_FLOATS, blocks="i64", basis_block=CONSTANT,
)  # fmt: skip

#: linear_few_mma: the same, a split has `each` columns. direct: x is the operand as it lies.
FEW_MMA = Struct(
    "FewMmaParams",
    x=ACTIVATIONS, direct=CONSTANT, in_block=CONSTANT, in_transform=CONSTANT, codes=CODES, rows="i64", each="i64",
    splits="int", ld="i64", parts=_FLOATS_OUT, finish=FINISH,
)  # fmt: skip

#: linear_weight_T: partial sums (splits, tokens, ld) of a dense W (rows, cols); x^ has `padded` columns, a split
#: `each`.
DENSE_SPLIT_K = Struct(
    "DenseSplitKParams",
    w=_POINTER, w_type=CONSTANT, wide=CONSTANT, x=_FLOATS, rows="i64", cols="i64", padded="i64", tokens="i64",
    each="i64", splits="int", ld="i64", parts=_FLOATS_OUT,
)  # fmt: skip

#: linear_epilogue: results from parts (splits, tokens, ld), of which the first `stored` columns hold something.
#: Lines of `block` columns; the basis' blocks are basis_block wide. scaled: x^ was scaled by a power of two a token.
SPLIT_K_EPILOGUE = Struct(
    "SplitKEpilogueParams",
    parts=_FLOATS, splits="int", ld="i64", stored="i64", block=CONSTANT, transform=CONSTANT, matrix=CONSTANT,
    lines="int", by_token=DIVIDER, gain="float", absmax=_FLOATS, scaled=CONSTANT, with_basis=CONSTANT,
    basis="const f16*", features=_FLOATS, blocks="i64", basis_block=CONSTANT, epilogue=EPILOGUE,
)  # fmt: skip

#: linear_mma_*: the rows of W are the columns `column` on of out.
MMA = Struct(
    "MmaParams",
    x=_POINTER, ldx="i64", w=_POINTER, ldw="i64", codes=CODES, rows="i64", column="i64", depth="i64", block=CONSTANT,
    transform=CONSTANT, gain="float", absmax=_FLOATS, epilogue=EPILOGUE,
)  # fmt: skip

#: linear_ffma. x_wide, w_wide: rows are multiples of 8 values and start at multiples of 16 bytes.
FFMA = Struct(
    "FfmaParams",
    x=_POINTER, x_type=CONSTANT, x_wide=CONSTANT, w=_POINTER, w_type=CONSTANT, w_wide=CONSTANT, ldw="i64",
    rows="i64",
    column="i64", depth="i64", gain="float", epilogue=EPILOGUE,
)  # fmt: skip

#: linear_integers_inputs: x, or x^ in float, to int8 of `padded` columns, and a scale a token.
INT8_INPUTS = Struct(
    "Int8InputsParams", x=ACTIVATIONS, padded="i64", col_scale="const f16*", out="char*", scale=_FLOATS_OUT
)

#: linear_integers_few: x (tokens, codes.cols) int8, scale of the tokens; a split has `each` columns, parts (splits,
#: tokens, ld) are int32 of grid codes.
INT8_FEW = Struct(
    "Int8FewParams",
    x=_POINTER, scale=_FLOATS, codes=CODES, rows="i64", tokens="i64", each="i64", splits="int", ld="i64",
    parts=_FLOATS_OUT, finish=FINISH,
)  # fmt: skip

#: linear_integers_tiles, linear_integers_groups: x (tokens, codes.cols) int8, scale of the tokens.
INT8_MMA = Struct(
    "Int8MmaParams",
    x=_POINTER, scale=_FLOATS, codes=CODES, rows="i64", block=CONSTANT, transform=CONSTANT, gain="float",
    epilogue=EPILOGUE,
)  # fmt: skip

#: linear_transform_inputs.
TRANSFORM_INPUTS = Struct(
    "TransformInputsParams", x=ACTIVATIONS, padded="i64", block=CONSTANT, transform=CONSTANT, out=_FLOATS_OUT
)

#: linear_transform_features; functions: phi (block, 16).
TRANSFORM_FEATURES = Struct(
    "TransformFeaturesParams", x=ACTIVATIONS, blocks="i64", block=CONSTANT, functions=_FLOATS, out=_FLOATS_OUT
)

#: linear_transform_basis.
BASIS = Struct(
    "BasisParams",
    features=_FLOATS, basis="const f16*", tokens="i64", row_blocks="i64", blocks="i64", sums=_FLOATS_OUT,
)  # fmt: skip

#: linear_transform_bitmap: bitmaps (rows, cols / 32) of delta positions.
BITMAP = Struct(
    "BitmapParams",
    index="const unsigned char*", row_start="const i64*", rows="i64", cols="i64", words="u32*",
)  # fmt: skip

#: What becomes of the sums of a tile. absmax: of tokens that are scaled, or whose zeros were skipped, or null.
#: basis: or null; sums: g, of vectors the output of linear_features; functions: psi, null of vectors.
TRANSFORM_EPILOGUE = Struct(
    "TransformEpilogue",
    block=CONSTANT, transform=CONSTANT, gain="float", absmax=_FLOATS, scaled=CONSTANT, with_basis=CONSTANT,
    basis="const f16*", sums=_FLOATS, functions=_FLOATS, blocks="i64", row_blocks="i64", epilogue=EPILOGUE,
)  # fmt: skip

#: linear_transform_codes, _entries, _dense, _sparse; a split has k_each values of k.
TRANSFORM_MATMUL = Struct(
    "TransformMatmulParams",
    x=_POINTER, codes=CODES, rows="i64", k_each="i64", ld="i64", parts=_FLOATS_OUT, epilogue=TRANSFORM_EPILOGUE,
)  # fmt: skip

#: linear_transform_epilogue: the sum of the splits.
TRANSFORM_SUM = Struct(
    "TransformSumParams", parts=_FLOATS, splits="int", ld="i64", epilogue=TRANSFORM_EPILOGUE
)

HEADERS: dict[str, tuple[Struct, ...]] = {
    "division_params.h": (DIVIDER,),
    "elementwise_params.h": (ELEMENTWISE,),
    "add_params.h": (ADD,),
    "rope_params.h": (ROPE,),
    "dropout_params.h": (DROPOUT,),
    "l2_normalize_params.h": (L2_NORMALIZE,),
    "mean_pool_params.h": (MEAN_POOL,),
    "softmax_params.h": (SOFTMAX,),
    "norm_params.h": (NORM,),
    "attention_params.h": (ATTENTION,),
    "codes_params.h": (CODES, ROWS),
    "decode_params.h": (DECODE, STARTS),
    "embedding_params.h": (EMBEDDING, COPY_ROWS),
    "epilogue_params.h": (ACTIVATIONS, EPILOGUE),
    "split_k_params.h": (SPLIT_K,),
    "linear_params.h": (ABSMAX, INPUTS, FEATURES, DENSE_SPLIT_K, SPLIT_K_EPILOGUE, MMA, FFMA),
    "finish_params.h": (FINISH,),
    "linear_few_params.h": (DOT, FEW_MMA),
    "linear_integers_params.h": (INT8_INPUTS, INT8_FEW, INT8_MMA),
    "linear_transform_params.h": (
        *(TRANSFORM_INPUTS, TRANSFORM_FEATURES, BASIS, BITMAP),
        *(TRANSFORM_EPILOGUE, TRANSFORM_MATMUL, TRANSFORM_SUM),
    ),
}
