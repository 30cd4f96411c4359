"""The parameters of the CPU's matmul and attention kernels: one struct per kernel, with named fields.

A struct is a NumPy structured dtype, aligned as a C compiler aligns it. The driver fills an array of one (`make`);
the kernel gets its address and reads the fields by name (`p.tokens`): a Numba record, not a copy. A field without
a comment is an address, a size or a count.

A `*_stride` is the distance between the scratch memory of one thread and that of the next, in elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _struct(*fields: str | tuple[str, Any]) -> np.dtype[np.void]:
    """A field without a type is an int64."""
    return np.dtype([(f, np.int64) if isinstance(f, str) else f for f in fields], align=True)


def make(struct: np.dtype[np.void], **fields: Any) -> np.ndarray[Any, np.dtype[np.void]]:
    """An array of one `struct` with these fields, a nested one as a tuple; fields that are not named are zero."""
    params = np.zeros(1, struct)
    params[0] = tuple(
        fields.pop(name, zero) for name, zero in zip(struct.names or (), params.item(), strict=True)
    )
    if fields:
        raise TypeError(f"no such fields: {', '.join(fields)}")
    return params


#: A weight (rows, columns), dense or compressed.
WEIGHT = _struct(
    "value", "scale", "column_scale", "index", "row_start",
    "kind",  # of the values: `arrays.F32` and the others
    "index_kind",  # `codes.FULL` and the others
    "bits", "group", "rows", "rows_padded",
    "row_values",  # stored values of a row, dense codes only
    "row_bytes",  # of a bitmap
    "first_row",  # of the results that the weight makes
    # the basis: float16 parameters (parameter rows, basis_blocks, basis_params)
    "basis", "basis_blocks", "basis_params",
    "features",  # basis features of a block of activations
    "sum_features",  # basis sums of a block of results; 0 for vectors
    # `transforms.basis_terms`
    "terms", "term_row", "term_column", "term_param", "term_factor",
    # sparse rows that turn basis sums into results
    "psi_start", "psi_offset", "psi_value",
    ("gain", np.float32), ("dead_zone", np.float32), ("shrink", np.float32),
)  # fmt: skip

#: An array of activations, and how its values are encoded (`arrays.F32` and the others).
INPUT = _struct("x", "kind")

#: What the epilogue adds and where it stores: bias (float32) and residual are 0 where there is none.
OUTPUT = _struct("bias", "activation", "residual", "residual_kind", "out", "out_kind", "out_features")

#: Activations into tiles of tokens, blocks transformed: `transform_in`.
TRANSFORM_IN = _struct(
    ("input", INPUT), "tokens", "in_features", "block",
    "transform",  # address of the function, 0 for none
    "features", "feature_start", "feature_offset", "feature_value",  # sparse rows from a block to its basis features
    "out", "depth", "width",
    "scratch", "scratch_stride",
    "units", "parts",
    "state",  # int64: see `transform_in`
)  # fmt: skip

#: Tiles of tokens: `matmul_tiles`.
TILES = _struct(
    ("weight", WEIGHT), ("output", OUTPUT),
    # activations (tiles, depth, width) float32; `columns` of `depth` are coefficients
    "x", "tokens", "depth", "columns", "width",
    "transform_in",  # `TRANSFORM_IN` of activations that are still to be transformed, else 0
    "transform_in_kernel",
    "block", "transform_out", "unit_rows", "panel", "panels", "group_tiles",
    "sums", "sums_stride", "lines", "lines_stride",
    "entry_value", "entry_offset", "entry_stride", "entry_start", "entry_start_stride",
    "basis_value", "basis_offset", "basis_stride", "basis_start", "basis_start_stride",
    "corner", "corner_stride",
    "counters", "parts",
)  # fmt: skip

#: One to a few tokens: `matvec`.
MATVEC = _struct(
    ("weight", WEIGHT), ("output", OUTPUT), ("input", INPUT), "tokens", "in_features", "block", "columns",
    "parts",  # that units are divided among, each with scratch memory of its own
    "synthesis_in", "synthesis_out",  # float32 (block, block), 0 for none
    "x",  # (tokens, columns) float32: transformed activations
    "groups",  # of a row, with a scale each
    "sums",  # (tokens, groups) float32: of the activations of a group
    "digits", "digits_stride",  # int8 activations and their scales, token by token; 0 where none are made
    "lines", "lines_stride", "entry_value", "entry_offset", "entry_stride", "entry_start", "entry_start_stride",
)  # fmt: skip

#: Attention over tiles of queries: `attention`. Distances between sequences, rows and heads are in elements.
ATTENTION = _struct(
    "q", "q_sequence", "q_row", "q_head",
    "k", "k_sequence", "k_row", "k_head",
    "v", "v_sequence", "v_row", "v_head",
    "out", "out_sequence", "out_row", "out_head",
    "bias", "keep",  # the mask: one of the two, float32 or bool
    "mask_kind", "mask_sequence", "mask_head", "mask_query", "mask_key",
    "lse", "lse_sequence", "lse_head",  # 0 where it is not wanted
    "batch", "num_heads", "group", "head_dim", "left", "right",
    "sequences",  # of `SEQUENCE`
    "tasks", "num_tasks",
    "max_tiles",  # of a sequence
    "scratch", "scratch_stride",
    "counter",  # int64, tasks claimed
    ("scale", np.float32),
)  # fmt: skip

#: A sequence of the batch: rows in front of its queries and keys, queries, keys seen, keys minus queries, and the
#: queries of a tile.
SEQUENCE = _struct("first_query", "first_key", "queries", "keys", "offset", "tile")
