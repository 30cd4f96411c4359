"""Row and elementwise ops on large arrays: bytes moved per second, beside a device-to-device copy and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu import reference, registry

from ..harness.baselines import Folder
from ..harness.inputs import Inputs
from ..harness.measure import OURS, TORCH, Case, Provider
from ..harness.timing import speedups
from .device import COPY, Device, run_cases, sampled
from .stage import Result

NBYTES = 1 << 27  # of x: 128 MiB, more than twice the cache of any GPU
QUICK_NBYTES = 1 << 14
SAMPLE = 16  # rows that are compared with the float64 reference
TORCH_TOLERANCE = 5e-3  # PyTorch adds in float32 and rounds once more in places
EPS = 1e-5
TOKENS = 128  # of a sequence of mean_pool and rope
HEAD_DIM, THETA = 128, 10000.0  # of rope


@dataclass(frozen=True)
class Pass:
    """One pass over x (rows, cols) by an op; `residual` adds one and writes the sum back.

    Of mean_pool x is (batch, TOKENS, cols), of rope that with cols as heads of HEAD_DIM.
    """

    op: str
    cols: int
    dtype: str
    residual: bool = False

    @property
    def name(self) -> str:
        return f"{self.cols} columns" + (", residual" if self.residual else "")

    def shape(self, nbytes: int) -> tuple[int, ...]:
        """That of x, of about so many bytes."""
        rows = max(1, nbytes // (self.cols * registry.DTYPES[self.dtype].itemsize))
        if self.op == "rope":
            return max(1, rows // TOKENS), TOKENS, self.cols // HEAD_DIM, HEAD_DIM
        return (max(1, rows // TOKENS), TOKENS, self.cols) if self.op == "mean_pool" else (rows, self.cols)

    def result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.op == "rope":
            return shape
        return shape[0], self.cols // 2 if self.op == "swiglu" else self.cols


def cases(quick: bool = False) -> Iterator[Pass]:
    """In the order of their worth: first every op once, then what targets name.

    quick : every op once, and one addition of a residual
    """
    every = list(_all_cases())
    first = {case.op: case for case in reversed(every) if (case.cols, case.dtype) == (4096, "float16")}
    yield from (first[op] for op in OURS_OF)
    if quick:
        yield Pass("layer_norm", 4096, "float16", residual=True)
        return
    yield from sorted(
        (case for case in every if case not in first.values()),
        key=lambda case: (case.dtype != "float16", case.op not in TARGETED),
    )


TARGETED = ("layer_norm", "rms_norm", "softmax")  # of which targets.py says what they must reach


def _all_cases() -> Iterator[Pass]:
    for op in ("layer_norm", "rms_norm", "softmax", "l2_normalize"):
        for dtype in ("float16", "float32"):
            for cols in (768, 1024, 4096, 16384, 32768):
                yield Pass(op, cols, dtype)
        yield Pass(op, 4096, "bfloat16")
    yield Pass("softmax", 131072, "float16")
    for op in ("layer_norm", "rms_norm"):
        yield Pass(op, 4096, "float16", residual=True)
    for op in ("gelu", "silu", "swiglu", "rope", "dropout", "add", "mean_pool", "embedding"):
        yield Pass(op, 4096, "float16")


class Arrays:
    """Real values in any shape and dtype, repeated from the start where they are too few."""

    def __init__(self, values: NDArray[np.float32], folder: Folder) -> None:
        """values : of x, any shape"""
        self._values = values.reshape(-1)
        self._gain = folder.tensor("encoder.layer.0.output.LayerNorm.weight")
        self._bias = folder.tensor("encoder.layer.0.output.LayerNorm.bias")

    def rows(self, shape: tuple[int, ...], dtype: str, shift: int = 0) -> NDArray[Any]:
        return np.resize(np.roll(self._values, shift).astype(registry.DTYPES[dtype]), shape)

    def gain(self, cols: int, dtype: str) -> NDArray[Any]:
        return np.resize(self._gain, cols).astype(registry.DTYPES[dtype])

    def bias(self, cols: int, dtype: str) -> NDArray[Any]:
        return np.resize(self._bias, cols).astype(registry.DTYPES[dtype])


@dataclass(frozen=True)
class Operands:
    """x as `Pass.shape` has it, and what an op needs beside it, all on the host, of CuPy or of PyTorch.

    Attributes
    ----------
    cos, sin : tables of rope, (TOKENS, HEAD_DIM / 2)
    both_cos, both_sin : the same for PyTorch, (TOKENS, 1, HEAD_DIM) of the dtype of x: cos twice, -sin and sin
    """

    x: Any
    out: Any
    gain: Any = None
    bias: Any = None
    residual: Any = None
    residual_out: Any = None
    ids: Any = None
    cos: Any = None
    sin: Any = None
    both_cos: Any = None
    both_sin: Any = None

    @property
    def fused(self) -> dict[str, Any]:
        """Keyword arguments of an addition before the norm."""
        return {} if self.residual is None else {"residual": self.residual, "residual_out": self.residual_out}

    @property
    def moved(self) -> int:
        """Bytes that must cross the memory bus: each large input read once, each output written once."""
        large = (self.x, self.out, self.residual, self.residual_out)
        return sum(a.nbytes for a in large if a is not None)

    def moved_to(self, to: Callable[[NDArray[Any]], Any]) -> Operands:
        """Copies of all arrays."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: to(a) for name, a in arrays.items() if a is not None})

    @property
    def summed(self) -> Any:
        return self.x if self.residual is None else self.x + self.residual


RATE, SEED = 0.1, 1234  # of dropout
OURS_OF: dict[str, Callable[[Operands], Any]] = {
    "layer_norm": lambda a: rbe.layer_norm(a.x, a.gain, a.bias, EPS, out=a.out, **a.fused),
    "rms_norm": lambda a: rbe.rms_norm(a.x, a.gain, EPS, out=a.out, **a.fused),
    "softmax": lambda a: rbe.softmax(a.x, out=a.out),
    "gelu": lambda a: rbe.gelu(a.x, out=a.out),
    "silu": lambda a: rbe.silu(a.x, out=a.out),
    "swiglu": lambda a: rbe.swiglu(a.x, out=a.out),
    "rope": lambda a: rbe.rope(a.x, a.cos, a.sin, out=a.out),
    "dropout": lambda a: rbe.dropout(a.x, RATE, SEED, out=a.out),
    "add": lambda a: rbe.add(a.x, a.residual, out=a.out),
    "l2_normalize": lambda a: rbe.l2_normalize(a.x, out=a.out),
    "mean_pool": lambda a: rbe.mean_pool(a.x, out=a.out),
    "embedding": lambda a: rbe.embedding(a.ids, a.x, out=a.out),
}
#: eager PyTorch, as its documentation shows it: (torch.nn.functional, operands)
TORCH_OF: dict[str, Callable[[Any, Operands], Any]] = {
    "layer_norm": lambda f, a: f.layer_norm(a.summed, a.gain.shape, a.gain, a.bias, EPS),
    "rms_norm": lambda f, a: f.rms_norm(a.summed, a.gain.shape, a.gain, EPS),
    "softmax": lambda f, a: f.softmax(a.x, dim=-1),
    "gelu": lambda f, a: f.gelu(a.x),
    "silu": lambda f, a: f.silu(a.x),
    "swiglu": lambda f, a: f.silu(a.x[:, : a.x.shape[1] // 2]) * a.x[:, a.x.shape[1] // 2 :],
    "rope": lambda f, a: a.x * a.both_cos + a.x.roll(HEAD_DIM // 2, -1) * a.both_sin,
    "dropout": lambda f, a: f.dropout(a.x, RATE),
    "add": lambda f, a: a.x + a.residual,
    "l2_normalize": lambda f, a: f.normalize(a.x, dim=-1),
    "mean_pool": lambda f, a: a.x.mean(1),
    "embedding": lambda f, a: f.embedding(a.ids, a.x),
}


def host_operands(op: Pass, arrays: Arrays, nbytes: int) -> Operands:
    """The operands of an op, of real values; x has about `nbytes`."""
    shape = op.shape(nbytes)
    x = arrays.rows(shape, op.dtype)
    a = Operands(x, np.zeros(op.result_shape(shape), x.dtype))
    if op.op in ("layer_norm", "rms_norm"):
        a = replace(a, gain=arrays.gain(op.cols, op.dtype), bias=arrays.bias(op.cols, op.dtype))
    if op.residual or op.op == "add":
        a = replace(a, residual=arrays.rows(shape, op.dtype, 777))
    if op.residual:
        a = replace(a, residual_out=np.zeros_like(x))
    if op.op == "rope":
        angles = np.outer(np.arange(TOKENS), THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        both = (
            np.concatenate(halves, axis=1)[:, None].astype(x.dtype) for halves in ((cos, cos), (-sin, sin))
        )
        a = replace(a, cos=cos, sin=sin, **dict(zip(("both_cos", "both_sin"), both, strict=True)))
    if op.op == "embedding":  # every row once
        a = replace(a, ids=np.random.default_rng(SEED).permutation(shape[0]))
    return a


def expected_rows(op: str, a: Operands, sample: list[int]) -> NDArray[np.float64]:
    """The sampled rows, in float64."""
    if op == "embedding":
        return reference.embedding(a.ids[sample], a.x)
    if op == "rope":
        return reference.rope(a.x[sample], a.cos, a.sin)
    x, residual = a.x[sample], None if a.residual is None else a.residual[sample]
    if op == "layer_norm":
        return reference.layer_norm(x, a.gain, a.bias, EPS, residual)[0]
    if op == "rms_norm":
        return reference.rms_norm(x, a.gain, EPS, residual)[0]
    if op == "dropout":  # the mask depends on the position in the whole array
        words, rest = divmod(x.shape[1], 4)
        if rest:
            raise ValueError(f"{x.shape[1]} columns are not whole blocks of Philox")
        rows = zip(sample, x, strict=True)
        return np.stack([reference.dropout(row, RATE, SEED, i * words) for i, row in rows])
    expected: NDArray[np.float64] = getattr(reference, op)(x, *(() if residual is None else (residual,)))
    return expected


def measure(device: Device, inputs: Inputs, result: Result) -> None:
    """Every case: check, time beside the copy and PyTorch, write rows."""
    arrays = Arrays(inputs.rows("2.sum", 2048), inputs.folder)
    nbytes = QUICK_NBYTES if device.quick else NBYTES
    run_cases(
        device,
        result,
        [
            (f"{case.op}, {case.name}, {case.dtype}", partial(one, device, case, arrays, nbytes))
            for case in cases(device.quick)
        ],
    )


def one(device: Device, op: Pass, arrays: Arrays, nbytes: int) -> None:
    host = host_operands(op, arrays, nbytes)
    shape, x_bytes = host.x.shape, host.x.nbytes
    sets = [host.moved_to(device.array) for _ in range(device.copies(x_bytes))]
    copies = [a.out if a.out.shape == shape else device.array(np.zeros_like(host.x)) for a in sets]
    sample = sampled(len(host.out), SAMPLE)
    expected = expected_rows(op.op, host, sample)
    tol = registry.OPS[op.op].tolerances[op.dtype]
    providers = {
        COPY: Provider([partial(device.copy, to, a.x) for to, a in zip(copies, sets, strict=True)]),
        OURS: Provider([partial(OURS_OF[op.op], a) for a in sets], expected, tol.rel, tol.floor),
    }
    if device.torch is not None and op.dtype != "bfloat16":

        def torch() -> dict[str, Provider]:
            call, f = TORCH_OF[op.op], device.torch.nn.functional
            calls = [partial(call, f, host.moved_to(device.tensor)) for _ in sets]
            return {TORCH: Provider(calls, None if op.op == "dropout" else expected, TORCH_TOLERANCE)}

        providers |= device.baselines(f"{op.op}, {op.name}, {op.dtype}", torch)
    case = Case(op.op, op.name, str(shape), providers, op.dtype, sample, baselines=())
    times = device.measure(case)
    moved = {p: 2 * x_bytes if p == COPY else host.moved for p in times}
    bandwidth = {p: [moved[p] / t for t in seconds] for p, seconds in times.items()}
    device.rows(case, "bandwidth", "B/s", bandwidth)
    ratios = [a / b for a, b in zip(bandwidth[OURS], bandwidth[COPY], strict=True)]
    device.row(case, OURS, "bandwidth_vs_copy", "", ratios)
    if TORCH in times:
        device.row(case, OURS, f"speed_vs_{TORCH}", "x", speedups(times, TORCH)[OURS])
