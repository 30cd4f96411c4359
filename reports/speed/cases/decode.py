"""W from its blocks: scales times codes, then the block transform, S_r C S_c^T."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rbe_gpu as rbe
from rbe_gpu import reference, transforms
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.codecs import packing

from ...harness.baselines import F32
from ...harness.inputs import Inputs
from . import NUMPY, Case, Provider

WIDTHS = ("dense-int8", "dense-int4", "dense-int2")


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    weight = inputs.weight(0, "intermediate.dense") if quick else inputs.tall()
    rows, cols = weight.shape
    for codes in WIDTHS[1:2] if quick else WIDTHS:
        m = rbe.compress(weight, codes=codes, basis=False)
        yield Case("decode", f"{rows}x{cols}, {codes}", f"({rows}, {cols})", _providers(m, weight))
    sparse = rbe.compress(weight, codes="sparse-int8", density=0.12, basis=False)
    if not quick:
        providers = {k: v for k, v in _providers(sparse, weight).items() if k != NUMPY}
        yield Case("decode", f"{rows}x{cols}, sparse-int8, density 12%", f"({rows}, {cols})", providers)


def _providers(m: RBEBlocks, weight: F32) -> dict[str, Provider]:
    out, copy = np.empty(m.shape, np.float32), np.empty(m.shape, np.float32)
    workspace = rbe.Workspace()
    s = transforms.synthesis(m.transform, m.block).astype(np.float32)
    b = m.block

    def in_numpy() -> F32:
        codes = m.codes
        assert isinstance(codes, rbe.DenseCodes)
        c = packing.unpack(codes.value, codes.bits, m.cols_pad).astype(np.float32)
        c -= np.float32((2**codes.bits - 1) / 2)
        scale = codes.scale.astype(np.float32) * np.float32(m.gain)
        c = (c.reshape(m.rows_pad, -1, codes.group) * scale[:, :, None]).reshape(m.rows_pad, m.cols_pad)
        c = (c.reshape(-1, b) @ s.T).reshape(-1, b, m.cols_pad)
        return np.asarray(np.matmul(s, c)).reshape(m.rows_pad, m.cols_pad)

    def copied() -> F32:
        np.copyto(copy, weight)
        return copy

    dense = "NumPy copy of the dense weight"
    providers = {dense: Provider([copied])}
    if isinstance(m.codes, rbe.DenseCodes):
        providers[NUMPY] = Provider([in_numpy], m.decode())
    name = f"rbe_gpu {m.codes.name}"
    providers[name] = Provider(
        [lambda: rbe.decode(m, out=out, workspace=workspace)],
        in_numpy() if isinstance(m.codes, rbe.DenseCodes) else reference.decode(m),
        facts={"bits_per_weight": (m.bits_per_weight, "bit")},
    )
    return providers
