"""y = W[ids]: rows of the word embedding table for the tokens of 32 texts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

import rbe_gpu as rbe

from ...harness.baselines import torch_or_none
from ...harness.inputs import Inputs
from ...harness.measure import builds
from . import DENSE, NUMPY, OURS, TORCH, Case, Provider

WIDTHS = ("dense-int8", "dense-int4")
TRANSFORMS = {"": "dct", ", no transform": "none"}


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    ids, lengths = inputs.batch
    tokens = np.concatenate([row[:n] for row, n in zip(ids, lengths, strict=True)])
    if quick:  # the words that occur, so that there is less to compress
        words, tokens = np.unique(tokens, return_inverse=True)
        table = np.ascontiguousarray(inputs.words[words])
    else:
        table = inputs.words
    expected = table[tokens]
    numpy_out, out = np.empty_like(expected), np.empty_like(expected)
    workspace = rbe.Workspace()
    providers = {NUMPY: Provider([lambda: np.take(table, tokens, axis=0, out=numpy_out, mode="clip")])}
    torch = torch_or_none()
    if torch is not None:
        t_ids, t_table = torch.from_numpy(tokens), torch.from_numpy(table)
        providers[TORCH] = Provider([lambda: torch.nn.functional.embedding(t_ids, t_table)], expected)
    providers[DENSE] = Provider(
        [lambda: rbe.embedding(tokens, table, out=out, workspace=workspace)], expected
    )
    for codes, suffix in product(WIDTHS, TRANSFORMS) if builds(OURS) else ():
        m = rbe.compress(table, codes=codes, kind="vectors", basis=False, transform=TRANSFORMS[suffix])
        report = m.error_report(table)
        providers[f"rbe_gpu {codes}{suffix}"] = Provider(
            [lambda m=m: rbe.embedding(tokens, m, out=out, workspace=workspace)],  # type: ignore[misc]
            m.decode()[tokens],
            facts={
                "weight_error": (report.relative_error, ""),
                "bits_per_weight": (m.bits_per_weight, "bit"),
            },
        )
    shape = f"{len(tokens)} of {table.shape}"
    yield Case("embedding", f"{len(tokens)} tokens, {len(table)} words", shape, providers)
