"""NaN, infinities, zeros of both signs, the largest and the smallest numbers, in every array of every op.

The result has NaN, +Inf and -Inf exactly where the float64 definition has them, row by row, and finite values within
the op's tolerance. Elementwise ops are compared element by element over all pairs of special values.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import ops, reference, registry

from . import real
from .cases import CASES, Args
from .conftest import TestBackend

F32 = np.finfo(np.float32)


def largest(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def smallest(dtype: Any) -> float:
    """The smallest subnormal."""
    return float(ml_dtypes.finfo(dtype).smallest_subnormal)


#: name: value of a dtype
SPECIAL = {
    "nan": lambda dtype: np.nan,
    "inf": lambda dtype: np.inf,
    "-inf": lambda dtype: -np.inf,
    "-0": lambda dtype: -0.0,
    "largest": largest,
    "-largest": lambda dtype: -largest(dtype),
    "smallest": smallest,
}


def floats_of(op: registry.Op, args: Args) -> list[str]:
    """The op's float arrays."""
    return [
        name
        for name, value in args.items()
        if isinstance(value, np.ndarray) and value.dtype.kind not in "biu" and name not in op.outputs
    ]


def cases() -> Iterator[Any]:
    for op in registry.OPS.values():
        names = floats_of(op, CASES[op.name].valid_args(real, np.dtype(np.float32)))
        for name, special, dtype in product(names, SPECIAL, op.dtypes):
            if op.name == "attention" and name in "qk" and "largest" in special:
                continue  # scores beyond float32, or rounded by more than the tolerance: see below
            yield pytest.param(op, name, special, dtype, id=f"{op.name}-{name}-{special}-{dtype}")


def rows(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1, a.shape[-1])


@pytest.mark.parametrize(("op", "name", "special", "dtype"), list(cases()))
def test_in_one_element(backend: TestBackend, op: registry.Op, name: str, special: str, dtype: str) -> None:
    """One element of an argument, in its middle, is the special value."""
    args = CASES[op.name].valid_args(real, registry.DTYPES[dtype])
    changed = args[name].copy()
    changed.reshape(-1)[changed.size // 2] = SPECIAL[special](changed.dtype)
    args[name] = changed
    with np.errstate(all="ignore"):
        expected = CASES[op.name].expected(args)["out"]
    result = backend.op(op.name)(**backend.put_all(args))
    out = backend.get(result[0] if isinstance(result, tuple) else result)
    tol = op.tolerances[next(n for n, d in registry.DTYPES.items() if d == out.dtype)]
    for row, (y, want) in enumerate(zip(rows(out), rows(expected), strict=True)):
        error = registry.relative_error(y, want, tol.floor)
        assert error <= tol.rel, f"row {row}: relative error {error:.3g} > {tol.rel:g} ({tol.why})"


#: of silu, gelu and swiglu: where exp(t) and exp(-t) leave the range of float32, and of float64
EDGES = (0.0, 0.5, 1, 3, 10, 20, 50, 80, 86.9, 87.1, 88.7, 88.8, 90, 100, 103, 105, 120, 150, 173, 175, 700, 800,
         6e4, 1e10, 1e19, 1e30, float(F32.max), float(F32.tiny), np.inf)  # fmt: skip
SUBNORMAL = (1e-40, 1e-45)


def edges(dtype: Any, backend: TestBackend) -> np.ndarray:
    """Special values of both signs. CUDA sources are compiled with -ftz=true: no float32 subnormals there."""
    positive = (*EDGES, *SUBNORMAL) if backend.name == "cpu" else EDGES
    with np.errstate(over="ignore"):
        return np.array([*positive, *(-e for e in positive), np.nan], np.float32).astype(dtype)


def assert_elements(y: np.ndarray, want: np.ndarray, rel: float, floor: float | np.ndarray) -> None:
    """Non-finite values exactly, finite ones within rel of their own size and `floor`."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = want.astype(y.dtype).astype(np.float64)
        y64 = y.astype(np.float64)
        same = (y64 == rounded) | (np.isnan(y64) & np.isnan(rounded))
        near = np.isfinite(rounded) & (np.abs(y64 - want) <= rel * np.abs(want) + floor)
    wrong = np.argwhere(~(same | near))
    assert not wrong.size, f"{wrong[0]}: {y64[tuple(wrong[0])]} for {want[tuple(wrong[0])]}"


#: float32: 8 roundings and exp's 2 ulp; half types: one rounding of the result
REL = {"float32": 10 * 2.0**-24, "float16": 2.0**-11 + 1e-6, "bfloat16": 2.0**-8 + 1e-6}


def floor_of(dtype: str, backend: TestBackend, float32: float) -> float:
    """`float32`, or half of the smallest number that the dtype has on the backend."""
    flushed = 0.0 if backend.name == "cpu" else float(F32.tiny)
    return max(float32, flushed, 0.51 * smallest(registry.DTYPES[dtype]))


DTYPES = pytest.mark.parametrize("dtype", registry.DTYPES)


@DTYPES
@pytest.mark.parametrize("op", [registry.OPS["add"], registry.OPS["swiglu"]], ids=lambda op: op.name)
def test_pairs(backend: TestBackend, op: registry.Op, dtype: str) -> None:
    """Every special value with every other one."""
    first, second = (
        np.ascontiguousarray(a) for a in np.meshgrid(*[edges(registry.DTYPES[dtype], backend)] * 2)
    )
    if op.name == "swiglu":
        args = {"x": np.concatenate([first, second], axis=1)}
        # a gate below -174 counts as -174, whose product with the largest number is 1.6e-35
        floor = floor_of(dtype, backend, 1.7e-35)
    else:
        args, floor = {"x": first, "residual": second}, floor_of(dtype, backend, 0.0)
    with np.errstate(all="ignore"):
        want = getattr(reference, op.name)(**args)
    y = backend.get(backend.op(op.name)(**backend.put_all(args)))
    assert_elements(y, want, REL[dtype], floor)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("op", [registry.OPS["rope"]], ids=lambda op: op.name)
def test_rotated_pairs(backend: TestBackend, op: registry.Op, interleaved: bool, dtype: str) -> None:
    """Every special value with every other one; an Inf or a NaN concerns its pair alone."""
    values = edges(registry.DTYPES[dtype], backend)
    pairs = np.stack(np.meshgrid(values, values), axis=-1)
    pairs = np.resize(pairs, (-(-pairs.size // 24), 1, 12, 2))

    def heads(a: np.ndarray) -> np.ndarray:
        """(tokens, 1, 12, 2) as heads of 24 features."""
        return (a if interleaved else a.swapaxes(2, 3)).reshape(-1, 1, 24)

    angles = np.resize([1.0, -1.0], (len(pairs), 12))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    args = {"x": heads(pairs), "cos": cos, "sin": sin, "interleaved": interleaved}
    y = backend.get(backend.op(op.name)(**backend.put_all(args)))
    # the two products may cancel: their roundings are relative to them, not to the result
    largest_of_pair = heads(np.abs(pairs.astype(np.float64)).max(axis=-1, keepdims=True).repeat(2, axis=-1))
    products = np.where(np.isfinite(largest_of_pair), largest_of_pair, 0.0) * 2.0**-23
    rounding = (
        2.0**-150 if backend.name == "cpu" else float(F32.tiny)
    )  # of a subnormal: two products and their sum
    assert_elements(y, reference.rope(**args), REL[dtype], floor_of(dtype, backend, 3 * rounding) + products)


@pytest.mark.parametrize("up", [np.inf, -np.inf])
@pytest.mark.parametrize("gate", [-1e-45, -1.0, -88.0, -100.0, -1000.0, -1e30, float(F32.min)])
@pytest.mark.one_order
def test_an_infinite_up_counts_however_small_the_gate(gate: float, up: float) -> None:
    assert ops.swiglu(np.array([[gate, up]], np.float32)) == -up


#: 1 / (1 + exp(-t)) and Phi(t) become 0 a little before float32 does; gelu's absolute error is 1.1e-7 max(1, |y|)
ACTIVATION_FLOOR = {"silu": 3e-37, "gelu": 1.2e-7, "gelu_tanh": 1.2e-7, "relu": 0.0, None: 0.0}


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activation(backend: TestBackend, activation: str, dtype: str) -> None:
    x = edges(registry.DTYPES[dtype], backend)
    name, _, tanh = activation.partition("_")
    args = {"x": x, **({"approximate": "tanh"} if tanh else {})}
    y = backend.get(backend.op(name)(**backend.put_all(args)))
    floor = floor_of(dtype, backend, ACTIVATION_FLOOR[activation])
    assert_elements(y, reference.ACTIVATIONS[activation](x.astype(np.float64)), REL[dtype], floor)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 3, 61])
@pytest.mark.parametrize("codes", [None, "sparse-f32", "dense-int8"])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "gelu_tanh"])
def test_activation_in_linear(
    backend: TestBackend, activation: str | None, codes: str | None, tokens: int, dtype: str
) -> None:
    """x W^T is 0 and the bias is the special value, so that the activation sees it as it is."""
    bias = edges(registry.DTYPES[dtype], backend)
    weight: Any = real.layer(0, "attention.self.query.weight")[: bias.size, :64]
    if codes is not None:
        weight = rbe.compress(np.ascontiguousarray(weight), codes=codes, transform="none", block=32)
    else:
        weight = weight.astype(registry.DTYPES[dtype])
    x = np.zeros((tokens, 64), registry.DTYPES[dtype])
    args = {"x": x, "weight": weight, "bias": bias, "activation": activation}
    y = backend.get(backend.op("linear")(**backend.put_all(args)))
    want = reference.ACTIVATIONS[activation](np.tile(bias.astype(np.float64), (tokens, 1)))
    assert_elements(y, want, REL[dtype], floor_of(dtype, backend, ACTIVATION_FLOOR[activation]))


@DTYPES
def test_attention_at_scores_that_only_differences_bear(backend: TestBackend, dtype: str) -> None:
    """Scores of 1e9 and more: one key, or several of the same score, takes all of the weight."""
    size = {"float16": 16384.0, "bfloat16": 2.0**16, "float32": 2.0**16}[dtype]  # every sum is exact
    rng = np.random.default_rng(0)
    q, k = ((size * rng.choice([-1.0, 1.0], (2, 64, 2, 64))).astype(registry.DTYPES[dtype]) for _ in range(2))
    v = np.resize(real.activations(22), q.shape).astype(q.dtype)
    for options in ({}, {"causal": True}, {"scale": -0.125}, {"mask": np.ones((1, 1, 64, 64), bool)}):
        args = {"q": q, "k": k, "v": v, "scale": 0.125, **options}
        y = backend.get(backend.op("attention")(**backend.put_all(args)))
        want = reference.attention(**args)
        tol = registry.OPS["attention"].tolerances[dtype]
        assert registry.relative_error(y, want, tol.floor) <= tol.rel, options


@pytest.mark.parametrize("largest_score", [1e2, 1e3, 1e4])
def test_error_of_attention_is_that_of_its_scores(backend: TestBackend, largest_score: float) -> None:
    """Every output within the bound that the rounding of float32 scores gives."""
    q, k, v, _ = real.qkv(1)
    scores = np.einsum("bihd,bjhd->bhij", q, k, dtype=np.float64) / np.sqrt(q.shape[-1])
    q = (q * (largest_score / np.abs(scores).max())).astype(np.float32)
    y = backend.get(backend.op("attention")(**backend.put_all({"q": q, "k": k, "v": v})))
    size = np.einsum("bihd,bjhd->bihj", np.abs(q), np.abs(k), dtype=np.float64) / np.sqrt(q.shape[-1])
    off = 2 * q.shape[-1] * 2.0**-24 * size.max(axis=-1, keepdims=True)  # of the score and of the largest one
    # weights of 1 +- off, in the numerator and in the sum, times values of at most |v|
    bound = 2 * np.expm1(off) * np.abs(v).max() + 2e-6 * np.abs(v).max()
    assert (np.abs(y - reference.attention(q, k, v)) <= bound).all()
