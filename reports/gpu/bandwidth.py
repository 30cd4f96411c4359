"""Row and elementwise ops on large arrays: bytes moved per second, beside a device-to-device copy and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu import reference, registry

from ..bench import speeds
from ..inputs import Inputs
from .device import COPY, OURS, TORCH, Device, attempt, sampled
from .stage import Result

NBYTES = 1 << 27  # of x: 128 MiB, more than twice the cache of any GPU that is there
QUICK_NBYTES = 1 << 18
SAMPLE = 16  # rows that are compared with the float64 reference
TORCH_TOLERANCE = 5e-3  # PyTorch adds in float32 and rounds once more in places
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One op on x (rows, cols); `residual` adds one and writes the sum back."""

    op: str
    cols: int
    dtype: str
    residual: bool = False

    @property
    def name(self) -> str:
        return f"{self.cols} columns" + (", residual" if self.residual else "")

    def shape(self, nbytes: int) -> tuple[int, int]:
        return max(1, nbytes // (self.cols * registry.DTYPES[self.dtype].itemsize)), self.cols

    def moved(self, shape: tuple[int, int]) -> int:
        """Bytes that must cross the memory bus: each input read once, each output written once."""
        size: int = shape[0] * shape[1] * registry.DTYPES[self.dtype].itemsize
        if self.op == "swiglu":
            return size + size // 2
        return size * (4 if self.residual else 2)


def cases() -> Iterator[Case]:
    for op in ("layer_norm", "rms_norm", "softmax"):
        for dtype in ("float16", "float32"):
            for cols in (768, 1024, 4096, 16384):
                yield Case(op, cols, dtype)
        yield Case(op, 4096, "bfloat16")
    yield Case("softmax", 131072, "float16")
    for op in ("layer_norm", "rms_norm"):
        yield Case(op, 4096, "float16", residual=True)
    for op in ("gelu", "silu", "swiglu", "dropout"):
        yield Case(op, 4096, "float16")


class Arrays:
    """Real activations of any shape and dtype: MiniLM's, from the start again where they are too few."""

    def __init__(self, inputs: Inputs) -> None:
        self._sums = inputs.rows("2.sum", 2048).reshape(-1)
        self._gain = inputs.folder.tensor("encoder.layer.2.output.LayerNorm.weight")
        self._bias = inputs.folder.tensor("encoder.layer.2.output.LayerNorm.bias")

    def rows(self, shape: tuple[int, int], dtype: str, shift: int = 0) -> NDArray[Any]:
        return np.resize(np.roll(self._sums, shift).astype(registry.DTYPES[dtype]), shape)

    def gain(self, cols: int, dtype: str) -> NDArray[Any]:
        return np.resize(self._gain, cols).astype(registry.DTYPES[dtype])

    def bias(self, cols: int, dtype: str) -> NDArray[Any]:
        return np.resize(self._bias, cols).astype(registry.DTYPES[dtype])


def measure(device: Device, inputs: Inputs, result: Result) -> None:
    """Every case: check, time beside the copy and PyTorch, write rows."""
    arrays = Arrays(inputs)
    nbytes = QUICK_NBYTES if device.quick else NBYTES
    for case in cases():
        name = f"{case.op}, {case.name}, {case.dtype}"
        attempt(device, result, name, partial(one, device, case, arrays, nbytes))


def one(device: Device, case: Case, arrays: Arrays, nbytes: int) -> None:
    shape = case.shape(nbytes)
    host = arrays.rows(shape, case.dtype)
    vectors = arrays.gain(case.cols, case.dtype), arrays.bias(case.cols, case.dtype)
    residual = arrays.rows(shape, case.dtype, 777) if case.residual else None
    sets = [_Set(device, case, host, vectors, residual) for _ in range(device.copies(host.nbytes))]
    sample = sampled(shape[0], SAMPLE)
    expected = _expected(case, host, vectors, residual, sample)
    op = registry.OPS[case.op]
    tol = op.tolerances[case.dtype]
    what = f"{case.op}, {case.name}, {case.dtype}"
    rivals: dict[str, list[Callable[[], Any]]] = {
        COPY: [s.copy for s in sets],
        OURS: [s.ours for s in sets],
    }
    error = device.check(f"{what}: {OURS}", sets[-1].ours(), expected, tol.rel, tol.floor, sample)
    if device.torch is not None and (case.op, case.residual) in _TORCH and case.dtype != "bfloat16":
        rivals[TORCH] = [_torch(device, case, host, vectors, residual) for _ in sets]
        if case.op != "dropout":
            found = rivals[TORCH][-1]()
            found = found[0] if isinstance(found, tuple) else found
            device.check(f"{what}: {TORCH}", found, expected, TORCH_TOLERANCE, sample=sample)
    times = device.times(rivals)
    moved = case.moved(shape)
    copied = 2 * host.nbytes

    def row(provider: str, metric: str, unit: str, values: Any) -> None:
        device.row(case.op, case.name, provider, metric, unit, values, str(shape), case.dtype)

    row(OURS, "relative_error", "", error)
    for provider, seen in times.items():
        by = copied if provider == COPY else moved
        row(provider, "time", "s", seen)
        row(provider, "bandwidth", "B/s", [by / t for t in seen])
    ratio = [moved / t * c / copied for t, c in zip(times[OURS], times[COPY], strict=True)]
    row(OURS, "bandwidth_vs_copy", "", ratio)
    if TORCH in times:
        row(OURS, f"speed_vs_{TORCH}", "x", speeds(times, TORCH)[OURS])


class _Set:
    """The arrays of one call, and the call."""

    def __init__(
        self,
        device: Device,
        case: Case,
        host: NDArray[Any],
        vectors: tuple[NDArray[Any], NDArray[Any]],
        residual: NDArray[Any] | None,
    ) -> None:
        self._device, self._case = device, case
        self._x = device.array(host)
        self._gain, self._bias = (device.array(v) for v in vectors)
        self._residual = None if residual is None else device.array(residual)
        self._sum = None if residual is None else device.array(np.zeros_like(host))
        cols = host.shape[1] // 2 if case.op == "swiglu" else host.shape[1]
        self._out = device.array(np.zeros((host.shape[0], cols), host.dtype))
        self._copied = self._out if cols == host.shape[1] else device.array(np.zeros_like(host))

    def copy(self) -> None:
        self._device.copy(self._copied, self._x)

    def ours(self) -> Any:
        x, out = self._x, self._out
        fused = {} if self._residual is None else {"residual": self._residual, "residual_out": self._sum}
        if self._case.op == "layer_norm":
            return rbe.layer_norm(x, self._gain, self._bias, EPS, out=out, **fused)
        if self._case.op == "rms_norm":
            return rbe.rms_norm(x, self._gain, EPS, out=out, **fused)
        if self._case.op == "dropout":
            return rbe.dropout(x, 0.1, 1234, out=out)
        return getattr(rbe, self._case.op)(x, out=out)


def _expected(
    case: Case,
    host: NDArray[Any],
    vectors: tuple[NDArray[Any], NDArray[Any]],
    residual: NDArray[Any] | None,
    sample: list[int],
) -> NDArray[np.float64]:
    """The sampled rows, in float64."""
    x = host[sample]
    r = None if residual is None else residual[sample]
    gain, bias = vectors
    if case.op == "layer_norm":
        return reference.layer_norm(x, gain, bias, EPS, r)[0]
    if case.op == "rms_norm":
        return reference.rms_norm(x, gain, EPS, r)[0]
    if case.op == "dropout":  # the mask follows the place in the whole array
        cols = host.shape[1]
        words = -(-cols // 4)
        if cols % 4:
            raise ValueError(f"{cols} columns are no whole blocks of Philox")
        rows = [reference.dropout(host[i], 0.1, 1234, i * words) for i in sample]
        return np.stack(rows)
    found: NDArray[np.float64] = getattr(reference, case.op)(x)
    return found


_TORCH = {
    *((op, False) for op in ("layer_norm", "rms_norm", "softmax", "gelu", "silu", "swiglu", "dropout")),
    ("layer_norm", True),
    ("rms_norm", True),
}


def _torch(
    device: Device,
    case: Case,
    host: NDArray[Any],
    vectors: tuple[NDArray[Any], NDArray[Any]],
    residual: NDArray[Any] | None,
) -> Callable[[], Any]:
    """The same in PyTorch, eager, as its documentation has it."""
    f = device.torch.nn.functional
    x = device.tensor(host)
    gain, bias = (device.tensor(v) for v in vectors)
    r = None if residual is None else device.tensor(residual)
    shape = (case.cols,)
    if case.op in ("layer_norm", "rms_norm"):

        def norm(t: Any) -> Any:
            if case.op == "layer_norm":
                return f.layer_norm(t, shape, gain, bias, EPS)
            return f.rms_norm(t, shape, gain, EPS)

        if r is None:
            return lambda: norm(x)

        def fused() -> Any:
            s = x + r
            return norm(s), s

        return fused
    if case.op == "softmax":
        return lambda: f.softmax(x, dim=-1)
    if case.op == "swiglu":
        half = case.cols // 2
        return lambda: f.silu(x[:, :half]) * x[:, half:]
    if case.op == "dropout":
        return lambda: f.dropout(x, 0.1)
    function = getattr(f, case.op)
    return lambda: function(x)
