"""decode and linear: real weights tiled to large matrices, compressed and dense, few tokens and many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu import reference, registry
from rbe_gpu.blocks import RBEMatrix

from ..bench import speeds
from ..inputs import Inputs
from .device import COPY, OURS, TORCH, Device, attempt, sampled
from .stage import Result

#: name -> how the weight is compressed
CODES: dict[str, dict[str, Any]] = {
    "dense-int4": {"codes": "dense-int4", "transform": "dct", "block": 64, "basis": False},
    "dense-int4, no transform": {"codes": "dense-int4", "transform": "none", "block": 64, "basis": False},
    "dense-int8": {"codes": "dense-int8", "transform": "dct", "block": 64, "basis": False},
    **{
        f"sparse-int4, {kept:.0%} kept": {
            "codes": "sparse-int4", "density": kept, "transform": "dct", "block": 64, "basis": False
        }
        for kept in (0.05, 0.12, 0.25, 0.5)
    },
}  # fmt: skip
DECODED = (*(name for name in CODES if not name.startswith("sparse")), "sparse-int4, 25% kept")
SHAPES = ((4096, 4096), (11008, 4096), (8192, 8192))  # (out_features, in_features)
QUICK_SHAPE = (256, 384)
TOKENS = (1, 4, 16, 64, 512, 2048)
QUICK_TOKENS = (1, 16, 40)
SAMPLE = 32
TORCH_TOLERANCE = 2e-3  # cuBLAS may add in float16 within a split


class Weights:
    """Tiles of one real matrix, and their compressed forms, each made once."""

    def __init__(self, inputs: Inputs) -> None:
        self._tile = inputs.tall()
        self._rows = inputs.rows("1.x", 512).reshape(-1)
        self.compressed = cache(self._compressed)
        self.decoded = lru_cache(maxsize=2)(self._decoded)  # of one matrix: up to half a gigabyte each

    def dense(self, shape: tuple[int, int]) -> NDArray[np.float32]:
        rows, cols = self._tile.shape
        times = (-(-shape[0] // rows), -(-shape[1] // cols))
        return np.ascontiguousarray(np.tile(self._tile, times)[: shape[0], : shape[1]])

    def _compressed(self, shape: tuple[int, int], codes: str) -> RBEMatrix:
        found = rbe.compress(self.dense(shape), **CODES[codes])
        assert isinstance(found, RBEMatrix)
        return found

    def _decoded(self, shape: tuple[int, int], codes: str, dtype: str) -> NDArray[Any]:
        found: NDArray[Any] = self.compressed(shape, codes).decode(registry.DTYPES[dtype])
        return found

    def tokens(self, count: int, width: int, dtype: str) -> NDArray[Any]:
        return np.resize(self._rows.astype(registry.DTYPES[dtype]), (count, width))


# --- decode -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decode:
    codes: str
    dtype: str

    @property
    def name(self) -> str:
        return self.codes


def decodes() -> Iterator[Decode]:
    for codes in DECODED:
        for dtype in ("float16", "float32"):
            yield Decode(codes, dtype)


def measure_decode(device: Device, inputs: Inputs, result: Result) -> None:
    """Bytes written per second, beside a copy of as many bytes."""
    weights = Weights(inputs)
    for case in decodes():
        shape = QUICK_SHAPE if device.quick else (8192, 8192 if case.dtype == "float16" else 4096)
        name = f"decode, {case.name}, {case.dtype}"
        attempt(device, result, name, partial(one_decode, device, case, weights, shape))


def one_decode(device: Device, case: Decode, weights: Weights, shape: tuple[int, int]) -> None:
    m = weights.compressed(shape, case.codes)
    dtype = registry.DTYPES[case.dtype]
    written = m.rows * m.cols * dtype.itemsize
    moved = written + m.resident_nbytes
    workspace = rbe.Workspace()
    sets = []
    for _ in range(device.copies(written)):
        there, out = rbe.to(m, "cuda"), device.array(np.zeros(m.shape, dtype))
        sets.append((there, out, device.array(np.zeros(m.shape, dtype))))
    rivals: dict[str, list[Callable[[], Any]]] = {
        COPY: [partial(device.copy, s[2], s[1]) for s in sets],
        OURS: [partial(rbe.decode, s[0], out=s[1], workspace=workspace) for s in sets],
    }
    sample = sampled(m.rows, SAMPLE)
    tol = registry.OPS["decode"].tolerances[case.dtype]
    # the CPU's own decode, which the conformance table holds to the float64 reference within the same tolerance
    expected = m.decode()[sample].astype(np.float64)
    what = f"decode, {case.name}, {case.dtype}"
    error = device.check(what, rivals[OURS][-1](), expected, 2 * tol.rel, tol.floor, sample)
    times = device.times(rivals)

    def row(provider: str, metric: str, unit: str, values: Any) -> None:
        device.row("decode", case.name, provider, metric, unit, values, str(m.shape), case.dtype)

    row(OURS, "relative_error", "", error)
    row(OURS, "bits_per_weight", "bit", m.bits_per_weight)
    for provider, seen in times.items():
        row(provider, "time", "s", seen)
    copied = 2 * written
    row(COPY, "bandwidth", "B/s", [copied / t for t in times[COPY]])
    row(OURS, "bandwidth", "B/s", [moved / t for t in times[OURS]])
    row(OURS, "written", "B/s", [written / t for t in times[OURS]])
    pairs = list(zip(times[OURS], times[COPY], strict=True))
    row(OURS, "written_vs_copy", "", [written / t * c / copied for t, c in pairs])
    row(OURS, "bandwidth_vs_copy", "", [moved / t * c / copied for t, c in pairs])


# --- linear -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    shape: tuple[int, int]
    tokens: int
    codes: str
    dtype: str = "float16"

    @property
    def name(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.tokens} tokens, {self.codes}"


def linears(quick: bool = False) -> Iterator[Linear]:
    for shape in (QUICK_SHAPE,) if quick else SHAPES:
        for tokens in QUICK_TOKENS if quick else TOKENS:
            yield Linear(shape, tokens, "dense-int4")
    for tokens in QUICK_TOKENS if quick else (1, 16, 512):
        for codes in ("dense-int8", "sparse-int4, 25% kept"):
            yield Linear(QUICK_SHAPE if quick else SHAPES[0], tokens, codes)


def measure_linear(device: Device, inputs: Inputs, result: Result) -> None:
    """Compressed and dense products of ours beside PyTorch's (cuBLAS) of the decoded weight."""
    weights = Weights(inputs)
    for case in linears(device.quick):
        attempt(
            device, result, f"linear, {case.name}, {case.dtype}", partial(one_linear, device, case, weights)
        )


def one_linear(device: Device, case: Linear, weights: Weights) -> None:
    m = weights.compressed(case.shape, case.codes)
    dtype = registry.DTYPES[case.dtype]
    whole = weights.decoded(case.shape, case.codes, "float32")
    dense = weights.decoded(case.shape, case.codes, case.dtype)
    x = weights.tokens(case.tokens, case.shape[1], case.dtype)
    workspace = rbe.Workspace()
    x_there, out = device.array(x), device.array(np.zeros((case.tokens, case.shape[0]), dtype))
    packed = [rbe.to(m, "cuda") for _ in range(device.copies(m.resident_nbytes))]
    plain = [device.array(dense) for _ in range(device.copies(dense.nbytes))]
    ours_dense = f"{OURS} dense"
    rivals: dict[str, list[Callable[[], Any]]] = {
        OURS: [partial(rbe.linear, x_there, w, out=out, workspace=workspace) for w in packed],
        ours_dense: [partial(rbe.linear, x_there, w, out=out, workspace=workspace) for w in plain],
    }
    sample = sampled(case.tokens, SAMPLE)
    tol = registry.OPS["linear"].tolerances[case.dtype]
    right = {OURS: reference.linear(x[sample], whole), ours_dense: reference.linear(x[sample], dense)}
    if device.torch is not None:
        linear, tx = device.torch.nn.functional.linear, device.tensor(x)
        tensors = [device.tensor(dense) for _ in plain]
        rivals[TORCH] = [partial(linear, tx, w) for w in tensors]
        right[TORCH] = right[ours_dense]
    errors = {}
    for provider, calls in rivals.items():
        allowed, floor = (TORCH_TOLERANCE, 0.0) if provider == TORCH else (tol.rel, tol.floor)
        what = f"linear, {case.name}, {case.dtype}: {provider}"
        errors[provider] = device.check(what, calls[-1](), right[provider], allowed, floor, sample)
    times = device.times(rivals)
    flops = 2 * case.tokens * case.shape[0] * case.shape[1]

    def row(provider: str, metric: str, unit: str, values: Any) -> None:
        shape = f"({case.tokens}, {case.shape[1]}) x {case.shape}"
        device.row("linear", case.name, provider, metric, unit, values, shape, case.dtype)

    row(OURS, "bits_per_weight", "bit", m.bits_per_weight)
    for provider, seen in times.items():
        held = m.resident_nbytes if provider == OURS else dense.nbytes
        row(provider, "relative_error", "", errors[provider])
        row(provider, "time", "s", seen)
        row(provider, "rate", "FLOP/s", [flops / t for t in seen])
        row(provider, "weight_bandwidth", "B/s", [held / t for t in seen])
        if TORCH in times and provider != TORCH:
            row(provider, f"speed_vs_{TORCH}", "x", speeds(times, TORCH)[provider])
