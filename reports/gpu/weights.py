"""decode and linear: real weights tiled to large matrices, compressed and dense, few tokens and many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu import reference, registry
from rbe_gpu.blocks import RBEMatrix
from rbe_gpu.codecs import GridCodes

from ..harness.inputs import Inputs
from ..harness.measure import OURS, TORCH, Case, Provider
from ..harness.row_names import DENSITIES
from ..harness.timing import Calls
from .device import COPY, Device, run_cases, sampled
from .stage import Result

#: name -> how the weight is compressed
CODES: dict[str, dict[str, Any]] = {
    "dense-int4": {"codes": "dense-int4", "transform": "dct", "block": 64, "basis": False},
    "dense-int4, no transform": {"codes": "dense-int4", "transform": "none", "block": 64, "basis": False},
    "dense-int8": {"codes": "dense-int8", "transform": "dct", "block": 64, "basis": False},
    **{
        f"sparse-int4, density {density:.0%}": {
            "codes": "sparse-int4", "density": density, "transform": "dct", "block": 64, "basis": False
        }
        for density in DENSITIES
    },
}  # fmt: skip
DECODED = (*(name for name in CODES if not name.startswith("sparse")), "sparse-int4, density 25%")
SHAPES = ((4096, 4096), (11008, 4096), (8192, 8192))  # (out_features, in_features)
QUICK_SHAPE = (256, 384)
TOKENS = (1, 16, 2048, 512, 4, 64)
MORE_TOKENS = (33, 128, 256)  # of the first shape, last
GRID = "grid-int4"  # integers with a scale of each row, column scales of 1
GRID_TOKENS = (1, 16, 2048, 128)
QUICK_TOKENS = (1, 16, 40)
SAMPLE = 32
TORCH_TOLERANCE = 2e-3  # cuBLAS may add in float16 within a split


def grid(dense: NDArray[np.float32]) -> RBEMatrix:
    """A weight as `GRID`."""
    padded = np.pad(dense, [(0, -size % 64) for size in dense.shape])
    top = np.abs(padded).max(axis=1)
    step = np.where(top > 0, top, 1) / 7
    q = np.rint(padded / step[:, None]).astype(np.int8)
    codes = GridCodes.from_integers(q, step, np.ones(padded.shape[1]))
    return RBEMatrix(dense.shape, 64, "none", 1.0, None, codes)


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
        dense = self.dense(shape)
        if codes == GRID:
            return grid(dense)
        m = rbe.compress(dense, **CODES[codes])
        assert isinstance(m, RBEMatrix)
        return m

    def _decoded(self, shape: tuple[int, int], codes: str, dtype: str) -> NDArray[Any]:
        dense: NDArray[Any] = self.compressed(shape, codes).decode(registry.DTYPES[dtype])
        return dense

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


def decodes(quick: bool = False) -> Iterator[Decode]:
    """In the order of their worth: float16 first. quick : no float32"""
    for dtype in ("float16",) if quick else ("float16", "float32"):
        for codes in DECODED:
            yield Decode(codes, dtype)


def measure_decode(device: Device, inputs: Inputs, result: Result) -> None:
    """Bytes written per second, beside a copy of as many bytes."""
    weights = Weights(inputs)

    def measurement(case: Decode) -> Callable[[], None]:
        shape = QUICK_SHAPE if device.quick else (8192, 8192 if case.dtype == "float16" else 4096)
        return partial(one_decode, device, case, weights, shape)

    run_cases(
        device,
        result,
        [(f"decode, {case.name}, {case.dtype}", measurement(case)) for case in decodes(device.quick)],
    )


def one_decode(device: Device, size: Decode, weights: Weights, shape: tuple[int, int]) -> None:
    m = weights.compressed(shape, size.codes)
    dtype = registry.DTYPES[size.dtype]
    written = m.rows * m.cols * dtype.itemsize
    workspace = rbe.Workspace()
    sets = [
        (rbe.to(m, "cuda"), *(device.array(np.zeros(m.shape, dtype)) for _ in range(2)))
        for _ in range(device.copies(written))
    ]
    sample = sampled(m.rows, SAMPLE)
    tol = registry.OPS["decode"].tolerances[size.dtype]
    # the CPU's own decode, which the conformance table holds to the float64 reference within the same tolerance
    expected = m.decode()[sample].astype(np.float64)
    providers = {
        COPY: Provider([partial(device.copy, to, out) for _, out, to in sets]),
        OURS: Provider(
            [partial(rbe.decode, w, out=out, workspace=workspace) for w, out, _ in sets],
            expected, 2 * tol.rel, tol.floor, {"bits_per_weight": (m.bits_per_weight, "bit")},
        ),
    }  # fmt: skip
    case = Case("decode", size.name, str(m.shape), providers, size.dtype, sample)
    times = device.measure(case)
    moved, copied = written + m.resident_nbytes, 2 * written
    device.row(case, COPY, "bandwidth", "B/s", [copied / t for t in times[COPY]])
    device.row(case, OURS, "bandwidth", "B/s", [moved / t for t in times[OURS]])
    device.row(case, OURS, "written", "B/s", [written / t for t in times[OURS]])
    pairs = list(zip(times[OURS], times[COPY], strict=True))
    device.row(case, OURS, "written_vs_copy", "", [written / t * c / copied for t, c in pairs])
    device.row(case, OURS, "bandwidth_vs_copy", "", [moved / t * c / copied for t, c in pairs])


# --- linear -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    shape: tuple[int, int]
    tokens: int
    codes: str
    dtype: str = "float16"
    activation_bits: int | None = None

    @property
    def name(self) -> str:
        int8 = "" if self.activation_bits is None else ", int8 activations"
        return f"{self.shape[0]}x{self.shape[1]}, {self.tokens} tokens, {self.codes}{int8}"


def linears(quick: bool = False) -> Iterator[Linear]:
    """In the order of their worth: 4096 x 4096 in 4 bits is what a target names."""
    first, *others = (QUICK_SHAPE,) if quick else SHAPES
    for tokens in QUICK_TOKENS if quick else TOKENS:
        yield Linear(first, tokens, "dense-int4")
    for codes in ("dense-int8", "sparse-int4, density 25%"):
        for tokens in QUICK_TOKENS[:1] if quick else (1, 16, 512):
            yield Linear(first, tokens, codes)
    for shape in others:
        for tokens in TOKENS:
            yield Linear(shape, tokens, "dense-int4")
    for tokens in () if quick else MORE_TOKENS:
        yield Linear(first, tokens, "dense-int4")
    for tokens in QUICK_TOKENS[1:2] if quick else GRID_TOKENS:
        for bits in (8, None):
            yield Linear(first, tokens, GRID, activation_bits=bits)


def measure_linear(device: Device, inputs: Inputs, result: Result) -> None:
    """Our matmuls with compressed and dense weights beside PyTorch's (cuBLAS) with the decoded weight."""
    weights = Weights(inputs)
    run_cases(
        device,
        result,
        [
            (f"linear, {case.name}, {case.dtype}", partial(one_linear, device, case, weights))
            for case in linears(device.quick)
        ],
    )


def one_linear(device: Device, size: Linear, weights: Weights) -> None:
    """int8 activations alone: the case of the same codes without them has the dense weight and PyTorch's."""
    m = weights.compressed(size.shape, size.codes)
    dense = weights.decoded(size.shape, size.codes, size.dtype)
    setup = LinearSetup(device, size, weights)
    # in memory: a file's need zstandard, which may be missing
    providers = {OURS: setup.ours(facts={"bits_per_weight": (8 * m.resident_nbytes / dense.size, "bit")})}
    if size.activation_bits is None:
        plain = [device.array(dense) for _ in range(device.copies(dense.nbytes))]
        providers[f"{OURS} dense"] = setup.provider([setup.call(w) for w in plain], dense)
        providers |= setup.torch()
    case = setup.case(providers)
    times = device.measure(case)
    flops = 2 * size.tokens * size.shape[0] * size.shape[1]
    device.rows(case, "rate", "FLOP/s", {p: [flops / t for t in seconds] for p, seconds in times.items()})
    held = {p: m.resident_nbytes if p == OURS else dense.nbytes for p in times}
    device.rows(
        case, "weight_bandwidth", "B/s", {p: [held[p] / t for t in seconds] for p, seconds in times.items()}
    )


class LinearSetup:
    """The arrays of a matmul and its providers: ours with any method, and PyTorch's with the decoded weight."""

    def __init__(self, device: Device, size: Linear, weights: Weights) -> None:
        self.device, self.size, self.weights = device, size, weights
        self.x = weights.tokens(size.tokens, size.shape[1], size.dtype)
        self.sample = sampled(size.tokens, SAMPLE)
        self._x, self._out = (
            device.array(a) for a in (self.x, np.zeros((size.tokens, size.shape[0]), self.x.dtype))
        )
        self._workspace = rbe.Workspace()
        m = weights.compressed(size.shape, size.codes)
        self._packed = [rbe.to(m, "cuda") for _ in range(device.copies(m.resident_nbytes))]

    def call(self, weight: Any, **options: Any) -> Callable[[], Any]:
        """Our matmul with a weight on the GPU."""
        return partial(rbe.linear, self._x, weight, out=self._out, workspace=self._workspace, **options)

    def provider(
        self, calls: Calls, dense: NDArray[Any], allowed: float | None = None, **more: Any
    ) -> Provider:
        """A provider whose result is checked against the matmul with a dense weight, in float64."""
        tol = registry.OPS["linear"].tolerances[self.size.dtype]
        rel, floor = (tol.rel, tol.floor) if allowed is None else (allowed, 0.0)
        return Provider(calls, reference.linear(self.x[self.sample], dense), rel, floor, **more)

    def ours(self, facts: Mapping[str, tuple[float, str]] | None = None, **options: Any) -> Provider:
        """Our matmul with the compressed weight."""
        size = self.size
        more: dict[str, Any] = {"facts": facts or {}}
        if size.activation_bits is None:
            whole = self.weights.decoded(size.shape, size.codes, "float32")
            return self.provider([self.call(w, **options) for w in self._packed], whole, **more)
        calls = [self.call(w, activation_bits=size.activation_bits, **options) for w in self._packed]
        tol = registry.OPS["linear"].tolerances[size.dtype]
        expected = reference.linear_int8(self.x[self.sample], self.weights.compressed(size.shape, size.codes))
        return Provider(calls, expected, tol.rel, tol.floor, **more)

    def torch(self) -> dict[str, Provider]:
        """PyTorch's matmul (cuBLAS) with the decoded weight; empty where PyTorch is not there."""
        if self.device.torch is None:
            return {}
        return self.device.baselines(f"linear, {self.size.name}, {self.size.dtype}", self._torch)

    def _torch(self) -> dict[str, Provider]:
        torch = self.device.torch
        dense = self.weights.decoded(self.size.shape, self.size.codes, self.size.dtype)
        x = self.device.tensor(self.x)
        calls = [
            partial(torch.nn.functional.linear, x, self.device.tensor(dense))
            for _ in range(self.device.copies(dense.nbytes))
        ]
        return {TORCH: self.provider(calls, dense, TORCH_TOLERANCE)}

    def case(self, providers: Mapping[str, Provider]) -> Case:
        """The case of these providers."""
        size = self.size
        shape = f"({size.tokens}, {size.shape[1]}) x {size.shape}"
        return Case("linear", size.name, shape, providers, size.dtype, self.sample, baselines=(TORCH,))
