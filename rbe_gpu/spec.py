"""What every op promises: signature, equation, output, tolerances with reasons, cases, refused inputs.

`OPS` is the one list of the ops. `tests/test_conformance.py` runs every case of it on every backend against
`rbe_gpu.reference`; `tests/test_tree.py` asks for a kernel, a test and a benchmark of each.

Cases are functions of a `Data` provider of real weights and activations and of a dtype, and return the
arguments of the op as NumPy arrays. Hand-made arrays stand only where an edge is the point: NaN, Inf, masks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import reference
from .blocks import RBEBlocks
from .encode import compress
from .transforms import BLOCK_SIZES, TRANSFORMS

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
FLOATS = tuple(DTYPES)
ROWS = (1, 3, 65)
COLS = (1, 31, 33, 63, 64, 65, 384, 1536)

Args = dict[str, Any]


class Data(Hashable, Protocol):
    """Real weights and activations. The package ships none; the tests pass theirs."""

    def layer(self, index: int, name: str) -> NDArray[np.float32]:
        """A tensor of encoder layer `index`, e.g. "attention.self.query.weight" (384, 384)."""

    def weight(self, name: str) -> NDArray[np.float32]:
        """A tensor by its full name, e.g. "embeddings.word_embeddings.weight" (30522, 384)."""

    def activations(self, rows: int, layer_index: int = 3) -> NDArray[np.float32]:
        """Hidden vectors in front of encoder layer `layer_index`, (rows, 384)."""

    def qkv(self, count: int = 8, layer_index: int = 2) -> tuple[NDArray[Any], ...]:
        """q, k, v (count, seq, 12, 32) of `count` texts, and their lengths (count,) int64."""


@dataclass(frozen=True)
class Tol:
    """Largest ||y - reference|| / ||reference|| (Frobenius) of a result, and why.

    `floor` is subtracted from every element's error first: half the spacing of the dtype's subnormals, below
    which no relative accuracy exists.
    """

    rel: float
    why: str
    floor: float = 0.0


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one call. `make(data, dtype)` gives fresh, writable arrays."""

    name: str
    make: Callable[[Data, np.dtype[Any]], Args]
    dtypes: tuple[str, ...] = FLOATS


@dataclass(frozen=True, eq=False)
class Bad:
    """A call that an op refuses with `error`; the message holds `word`.

    `change` says what differs from the op's `base` arguments: a new value, or a function of the old one. The
    old value of "out" is a right one.

    `not_on_gpu` says why a call with CuPy arrays does not refuse it.
    """

    name: str
    change: dict[str, Any]
    error: type[Exception]
    word: str
    not_on_gpu: str = ""


@dataclass(frozen=True, eq=False)
class Op:
    """One op.

    Attributes
    ----------
    signature : as in `ops.py`, without annotations
    output : shape and dtype of the result, in words
    like : the same as a function of the arguments and the case's dtype
    expected : float64 results by name: "out", those of `outputs` that the op also writes, and what the op returns
        after "out" where it is asked to
    in_place : the argument that `out` may be, or None
    outputs : optional array arguments that the op writes to
    workspace : whether the op takes `workspace=`
    """

    name: str
    signature: str
    equation: str
    output: str
    like: Callable[[Args, np.dtype[Any]], tuple[tuple[int, ...], np.dtype[Any]]]
    expected: Callable[[Args], dict[str, NDArray[np.float64]]]
    tolerances: dict[str, Tol]
    cases: tuple[Case, ...]
    base: Callable[[Data, np.dtype[Any]], Args]
    bad: tuple[Bad, ...]
    in_place: str | None = None
    outputs: tuple[str, ...] = ()
    workspace: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(self.tolerances)

    def bad_args(self, bad: Bad, data: Data) -> Args:
        """The arguments of a refused call."""
        float32 = DTYPES["float32"]
        args = self.base(data, float32)
        right = {**args, "out": np.empty(*self.like(args, float32))}
        return {**args, **{k: v(right[k]) if callable(v) else v for k, v in bad.change.items()}}


def relative_error(result: NDArray[Any], expected: NDArray[np.float64], floor: float = 0.0) -> float:
    """||max(|y - expected| - floor, 0)|| / ||expected|| over the finite values.

    Infinite when NaN, +Inf and -Inf do not stand where `expected`, rounded to the result's dtype, has them.
    """
    with np.errstate(over="ignore"):
        rounded = expected.astype(result.dtype).astype(np.float64)
    y = result.astype(np.float64)
    finite = np.isfinite(rounded)
    if not np.array_equal(y[~finite], rounded[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
        return float("inf")
    wrong = np.maximum(np.abs(y[finite] - expected[finite]) - floor, 0.0)
    error, size = float(np.linalg.norm(wrong)), float(np.linalg.norm(expected[finite]))
    return error / size if size else (0.0 if error == 0 else float("inf"))


def _tolerances(float32: float, why: str) -> dict[str, Tol]:
    """`float32`, its reason, and one rounding of the result to the half types."""
    return {
        "float32": Tol(float32, why),
        "float16": Tol(5e-4, "one rounding to 11 bits, 2^-11 = 4.9e-4; the sums are float32", floor=2.0**-25),
        "bfloat16": Tol(4e-3, "one rounding to 8 bits, 2^-8 = 3.9e-3; the sums are float32"),
    }


# --- real arrays --------------------------------------------------------------------------------------


def _rows(data: Data, rows: int, cols: int, dtype: Any, layer_index: int = 3) -> NDArray[Any]:
    """(rows, cols) hidden values, in reading order."""
    values = data.activations(-(-rows * cols // 384), layer_index).reshape(-1)
    return values[: rows * cols].reshape(rows, cols).astype(dtype)


def _vector(data: Data, name: str, count: int, dtype: Any) -> NDArray[Any]:
    """`count` values of a bias or a gain of layer 3, from the start again where it is shorter."""
    return np.resize(data.layer(3, name), count).astype(dtype)


def _gain(data: Data, cols: int, dtype: Any) -> NDArray[Any]:
    return _vector(data, "output.LayerNorm.weight", cols, dtype)


def _bias(data: Data, cols: int, dtype: Any) -> NDArray[Any]:
    return _vector(data, "intermediate.dense.bias", cols, dtype)


def _special(rows: int, cols: int, dtype: Any) -> NDArray[Any]:
    """Hand-made: ordinary values with one NaN, Inf or -Inf per row, row by row in turn, and one clean row."""
    x = np.linspace(-3.0, 3.0, rows * cols).reshape(rows, cols)
    for row, value in enumerate((np.nan, np.inf, -np.inf)):
        x[row, (7 * row + 3) % cols] = value
    return x.astype(dtype)


# --- refused inputs -----------------------------------------------------------------------------------


def _float64(a: NDArray[Any]) -> NDArray[Any]:
    return a.astype(np.float64)


def _float16(a: NDArray[Any]) -> NDArray[Any]:
    return np.empty(a.shape, np.float16)


def _int32(a: NDArray[Any]) -> NDArray[Any]:
    return a.astype(np.int32)


def _shorter(a: NDArray[Any]) -> Any:
    """One less along the first axis."""
    return a[:-1].copy()


def _narrower(a: NDArray[Any]) -> NDArray[Any]:
    """One less along the last axis."""
    return np.ascontiguousarray(a[..., :-1])


def _strided(a: NDArray[Any]) -> Any:
    """The same values, every other one in memory."""
    return np.repeat(a, 2, axis=-1)[..., ::2]


def _scalar(a: NDArray[Any]) -> NDArray[Any]:
    return a.reshape(-1)[:1].reshape(())


def _listed(a: NDArray[Any]) -> Any:
    return a.tolist()


def _read_only(a: NDArray[Any]) -> NDArray[Any]:
    a.flags.writeable = False
    return a


_UNSEEN = "to look at values would mean waiting for the GPU"

_BAD_X = (
    Bad("x float64", {"x": _float64}, TypeError, "float64"),
    Bad("x int32", {"x": _int32}, TypeError, "int32"),
    Bad("x a list", {"x": _listed}, TypeError, "numpy"),
    Bad("x strided", {"x": _strided}, ValueError, "contiguous"),
)
_BAD_RANK = Bad("x 0-D", {"x": _scalar}, ValueError, "axes")
_BAD_OUT = (
    Bad("out float16", {"out": _float16}, TypeError, "float16"),
    Bad("out a list", {"out": _listed}, TypeError, "numpy"),
    Bad("out narrower", {"out": _narrower}, ValueError, "out has shape"),
    Bad("out strided", {"out": _strided}, ValueError, "contiguous"),
    Bad(
        "out read-only", {"out": _read_only}, ValueError, "read-only", "CuPy arrays can always be written to"
    ),
)
_BAD_RESIDUAL = (
    Bad("residual shorter", {"residual": _shorter}, ValueError, "residual has shape"),
    Bad("residual float64", {"residual": _float64}, TypeError, "residual has dtype"),
    Bad("residual strided", {"residual": _strided}, ValueError, "residual is not C-contiguous"),
)
_BAD_BIAS = (
    Bad("bias narrower", {"bias": _narrower}, ValueError, "bias has shape"),
    Bad("bias float64", {"bias": _float64}, TypeError, "bias has dtype"),
    Bad("bias strided", {"bias": _strided}, ValueError, "bias is not C-contiguous"),
)


# --- compressed weights -------------------------------------------------------------------------------

_SOURCES: dict[str, Callable[[Data], NDArray[np.float32]]] = {
    "100x150": lambda data: data.layer(0, "attention.self.query.weight")[:100, :150],
    "33x65": lambda data: data.layer(1, "attention.self.key.weight")[:33, :65],
    "1x384": lambda data: data.layer(1, "attention.self.value.weight")[:1],
    "64x384": lambda data: data.layer(2, "attention.output.dense.weight")[:64],
    "384x384": lambda data: data.layer(2, "attention.self.query.weight"),
    "200x1536": lambda data: data.layer(2, "output.dense.weight")[:200],
    "words 30x384": lambda data: data.weight("embeddings.word_embeddings.weight")[2000:2030],
    "words 30x100": lambda data: data.weight("embeddings.word_embeddings.weight")[2000:2030, :100],
    "vector 384": lambda data: data.weight("embeddings.word_embeddings.weight")[1996],
    "vector 1000": lambda data: data.weight("embeddings.word_embeddings.weight").reshape(-1)[7000:8000],
}


@lru_cache(maxsize=256)
def _compressed(data: Data, source: str, kind: str, settings: tuple[tuple[str, Any], ...]) -> RBEBlocks:
    return compress(np.ascontiguousarray(_SOURCES[source](data)), kind=kind, **dict(settings))


@dataclass(frozen=True)
class Weight:
    """A compressed weight of the cases: a slice of a real one, its kind, and the encoder's settings."""

    source: str
    kind: str
    block: int
    transform: str
    codes: str
    kept: float | None
    basis: bool

    @property
    def name(self) -> str:
        kept = "" if self.kept is None else f" kept {self.kept:g}"
        basis = " basis" if self.basis else ""
        return f"{self.kind} {self.source} {self.transform} {self.block} {self.codes}{kept}{basis}"

    def blocks(self, data: Data) -> RBEBlocks:
        settings = {
            "block": self.block,
            "transform": self.transform,
            "codes": self.codes,
            "basis": self.basis,
        }
        if self.kept is not None:
            settings["kept"] = self.kept
        return _compressed(data, self.source, self.kind, tuple(settings.items()))


def _weights() -> tuple[Weight, ...]:
    """Every transform with every block size, every code, every index, with and without basis, both kinds."""
    found = []
    for i, transform in enumerate(TRANSFORMS):
        for j, block in enumerate(BLOCK_SIZES):
            basis = (i + j) % 2 == 0
            found.append(Weight("100x150", "matrix", block, transform, "sparse-int8", 0.3, basis))
            found.append(Weight("words 30x100", "vectors", block, transform, "sparse-int4", 0.3, not basis))
    for bits in range(2, 9):
        found.append(Weight("64x384", "matrix", 64, "dct", f"dense-int{bits}", None, bits % 2 == 0))
        found.append(Weight("words 30x384", "vectors", 64, "dct", f"dense-int{bits}", None, bits % 2 == 1))
    for values in ("f32", "f16", "int8", "int4"):
        for kept in (0.04, 0.3, 1.0):  # delta, bitmap and full index
            found.append(Weight("100x150", "matrix", 32, "dct", f"sparse-{values}", kept, False))
            found.append(Weight("words 30x384", "vectors", 64, "dct", f"sparse-{values}", kept, True))
    for source in ("33x65", "1x384"):
        found.append(Weight(source, "matrix", 64, "dct", "dense-int4", None, True))
        found.append(Weight(source, "vectors", 32, "dct", "sparse-int2", 0.2, False))
    return tuple(found)


WEIGHTS = _weights()
VECTORS = (
    Weight("vector 384", "vectors", 64, "dct", "dense-int4", None, True),
    Weight("vector 1000", "vectors", 128, "dwt-db2", "sparse-f16", 0.2, False),
)
MATRICES = (
    Weight("384x384", "matrix", 32, "dct", "sparse-int4", 0.25, False),
    Weight("384x384", "matrix", 64, "dct", "dense-int4", None, True),
    Weight("384x384", "matrix", 128, "dwt-db2", "sparse-f16", 0.05, True),
    Weight("200x1536", "matrix", 64, "none", "dense-int3", None, False),
    Weight("200x1536", "matrix", 64, "dwt-bior3.1", "sparse-int8", 0.1, True),
    Weight("words 30x384", "vectors", 64, "dct", "dense-int4", None, True),
)


# --- decode -------------------------------------------------------------------------------------------


def _decode_case(weight: Weight, dtypes: tuple[str, ...]) -> Case:
    return Case(weight.name, lambda data, dtype: {"weight": weight.blocks(data), "dtype": dtype}, dtypes)


DECODE = Op(
    name="decode",
    signature="decode(weight, dtype=float32, out=None, workspace=None)",
    equation="W = gain * (S_r C S_c^T + sum_k p_k Phi_k)",
    output="weight.shape, dtype",
    like=lambda args, dtype: (tuple(args["weight"].shape), dtype),
    expected=lambda args: {"out": reference.decode(args["weight"])},
    tolerances=_tolerances(
        2e-6, "float32 transforms of up to 128 x 128: two sums of 128 products, and the rounding of S itself"
    ),
    # the storage type is one more store at the end: a few weights in all three
    cases=tuple(_decode_case(w, ("float32",)) for w in WEIGHTS)
    + tuple(_decode_case(w, FLOATS) for w in VECTORS + MATRICES),
    base=lambda data, dtype: {"weight": MATRICES[0].blocks(data)},
    bad=(
        Bad("an array", {"weight": np.ones((3, 4), np.float32)}, TypeError, "RBEMatrix"),
        Bad("dtype float64", {"dtype": np.dtype(np.float64)}, TypeError, "float64"),
        Bad("out float64", {"out": _float64}, TypeError, "float64"),
        *_BAD_OUT[1:],
    ),
    workspace=True,
)


# --- linear -------------------------------------------------------------------------------------------


def _linear_args(
    data: Data,
    dtype: Any,
    weight: Any,
    rows: int | tuple[int, ...],
    bias: bool = True,
    activation: str | None = None,
    residual: bool = False,
    bias_dtype: Any = None,
    method: str | None = None,
) -> Args:
    out_features, in_features = weight.shape
    lead = (rows,) if isinstance(rows, int) else rows
    count = int(np.prod(lead))
    args: Args = {"x": _rows(data, count, in_features, dtype).reshape(*lead, in_features), "weight": weight}
    if bias:
        args["bias"] = _bias(data, out_features, bias_dtype or dtype)
    if activation:
        args["activation"] = activation
    if residual:
        args["residual"] = _rows(data, count, out_features, dtype, 2).reshape(*lead, out_features)
    if method:
        args["method"] = method
    return args


def _dense_weight(data: Data, out_features: int, in_features: int, dtype: Any) -> NDArray[Any]:
    name = "intermediate.dense.weight" if in_features <= 384 else "output.dense.weight"
    return np.ascontiguousarray(data.layer(2, name)[:out_features, :in_features]).astype(dtype)


def _linear_cases() -> tuple[Case, ...]:
    def dense(shape: tuple[int, int], rows: Any, **options: Any) -> Callable[..., Args]:
        return lambda data, dtype: _linear_args(
            data, dtype, _dense_weight(data, *shape, dtype), rows, **options
        )

    def coded(weight: Weight, rows: Any, **options: Any) -> Callable[..., Args]:
        return lambda data, dtype: _linear_args(data, dtype, weight.blocks(data), rows, **options)

    cases = [
        Case(f"dense {n}x{k} rows {rows}", dense((n, k), rows, bias=rows != 3))
        for (n, k), rows in zip(
            ((1, 1), (31, 33), (63, 64), (65, 31), (384, 384), (200, 1536)), (3, 65, 1, 3, 65, 3), strict=True
        )
    ]
    for i, activation in enumerate(("relu", "gelu", "gelu_tanh", "silu")):
        residual = i % 2 == 0
        name = f"dense {activation}" + (" residual" if residual else "")
        cases.append(Case(name, dense((65, 384), 3, activation=activation, residual=residual)))
    cases += [
        Case("dense plain", dense((65, 384), 3, bias=False)),
        Case("dense x 1-D", dense((65, 384), ())),
        Case("dense x 3-D", dense((65, 384), (2, 3), residual=True)),
        Case("dense no rows", dense((65, 384), 0)),
        Case("dense float32 bias", dense((65, 384), 3, bias_dtype=np.float32), ("float16", "bfloat16")),
        Case(
            "dense float32 weight",
            lambda data, dtype: _linear_args(data, dtype, _dense_weight(data, 65, 384, np.float32), 3),
            ("float16", "bfloat16"),
        ),
        Case(
            "dense NaN and Inf",
            lambda data, dtype: {
                "x": _special(4, 64, dtype),
                "weight": np.abs(_dense_weight(data, 33, 64, dtype)) + np.asarray(0.01, dtype),
            },
        ),
    ]
    for w in WEIGHTS:
        cases.append(Case(f"{w.name} rows 3", coded(w, 3), ("float32",)))
    for i, w in enumerate(MATRICES):
        for rows in ROWS:
            cases.append(Case(f"{w.name} rows {rows}", coded(w, rows, residual=rows == 3)))
        act = (None, "relu", "gelu", "gelu_tanh", "silu")[i % 5]
        cases.append(Case(f"{w.name} {act}", coded(w, (2, 3), activation=act, residual=True), ("float32",)))
        cases.append(
            Case(f"{w.name} rows 65, transform", coded(w, 65, residual=i % 2 == 0, method="transform"))
        )
    cases += [
        Case("compressed plain", coded(MATRICES[0], 3, bias=False)),
        Case("compressed x 1-D", coded(MATRICES[0], ())),
        Case("compressed no rows", coded(MATRICES[0], 0)),
        Case(
            "compressed NaN and Inf",
            # a NaN reaches every result of its row, and so does an Inf unless it meets an exact zero
            lambda data, dtype: {"x": _special(4, 384, dtype)[[0, 3]], "weight": MATRICES[1].blocks(data)},
        ),
    ]
    return tuple(cases)


_MEMORY = np.ones(3 * 384 + 3 * 65, np.float32)
_OVERLAP = (_MEMORY[: 3 * 384].reshape(3, 384), _MEMORY[3 * 384 - 1 : -1].reshape(3, 65))  # one shared value

LINEAR = Op(
    name="linear",
    signature="linear(x, weight, bias=None, activation=None, residual=None, out=None, workspace=None, "
    "cache=None, method=None)",
    equation="y = activation(x W^T + bias) + residual",
    output="(*x.shape[:-1], out_features), dtype of x",
    like=lambda args, dtype: ((*args["x"].shape[:-1], args["weight"].shape[0]), args["x"].dtype),
    # the way that a product takes changes nothing that is promised
    expected=lambda args: {"out": reference.linear(**{k: v for k, v in args.items() if k != "method"})},
    tolerances=_tolerances(
        5e-6,
        "float32 sums of up to 1536 products whose terms cancel to a few percent, over a decoded float32 W",
    ),
    cases=_linear_cases(),
    base=lambda data, dtype: _linear_args(data, dtype, _dense_weight(data, 65, 384, dtype), 3, residual=True),
    bad=(
        *_BAD_X,
        _BAD_RANK,
        Bad("x narrower", {"x": _narrower}, ValueError, "features"),
        Bad("weight 1-D", {"weight": lambda a: a[0].copy()}, ValueError, "weight has shape"),
        Bad("weight int32", {"weight": _int32}, TypeError, "weight has dtype"),
        Bad("weight a list", {"weight": _listed}, TypeError, "numpy"),
        Bad("weight strided", {"weight": _strided}, ValueError, "weight is not C-contiguous"),
        Bad("activation", {"activation": "tanh"}, ValueError, "tanh"),
        Bad("out over x", {"x": _OVERLAP[0], "out": _OVERLAP[1]}, ValueError, "memory"),
        *_BAD_BIAS,
        *_BAD_RESIDUAL,
        *_BAD_OUT,
    ),
    workspace=True,
)


# --- embedding ----------------------------------------------------------------------------------------


def _ids(rows: int, shape: tuple[int, ...], dtype: Any = np.int64) -> NDArray[Any]:
    """Row numbers with repeats, the first and the last row among them."""
    ids = np.arange(int(np.prod(shape))) * 7 % rows
    ids[-1:] = rows - 1
    return ids.reshape(shape).astype(dtype)


def _embedding_case(weight: Weight, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Case:
    def make(data: Data, dtype: Any) -> Args:
        blocks = weight.blocks(data)
        return {"ids": _ids(blocks.rows, shape), "weight": blocks, "dtype": dtype}

    return Case(f"{weight.name} ids {shape}", make, dtypes)


def _words(data: Data, dtype: Any = np.float32) -> NDArray[Any]:
    return data.weight("embeddings.word_embeddings.weight")[2000:2030].astype(dtype)


def _embedding_dense(name: str, shape: tuple[int, ...], ids: Any = np.int64, cols: int = 384) -> Case:
    def make(data: Data, dtype: Any) -> Args:
        weight = np.ascontiguousarray(_words(data, dtype)[:, :cols])
        return {"ids": _ids(30, shape, ids), "weight": weight}

    return Case(name, make)


_ROW_WEIGHTS = tuple(w for w in WEIGHTS if w.kind == "vectors")
_BLOCK_WEIGHTS = tuple(w for w in WEIGHTS if w.kind == "matrix")

EMBEDDING = Op(
    name="embedding",
    signature="embedding(ids, weight, dtype=float32, out=None, workspace=None)",
    equation="y[..., :] = W[ids[...], :]",
    output="(*ids.shape, cols), dtype (of the weight where it is dense)",
    like=lambda args, dtype: ((*args["ids"].shape, args["weight"].shape[1]), dtype),
    expected=lambda args: {"out": reference.embedding(args["ids"], args["weight"])},
    tolerances=_tolerances(2e-6, "as decode: float32 transforms of up to 128 values a side"),
    cases=(
        _embedding_dense("dense", (65,)),
        _embedding_dense("dense one id", ()),
        _embedding_dense("dense 3-D ids", (2, 3, 5)),
        _embedding_dense("dense no ids", (0,)),
        _embedding_dense("dense int32 ids", (33,), np.int32),
        _embedding_dense("dense uint8 ids", (33,), np.uint8),
        _embedding_dense("dense 63 columns", (31,), cols=63),
        _embedding_dense("dense 1 column", (31,), cols=1),
        *(_embedding_case(w, (33,), ("float32",)) for w in _ROW_WEIGHTS),
        *(_embedding_case(w, (9,), ("float32",)) for w in _BLOCK_WEIGHTS),
        *(_embedding_case(w, (2, 33), FLOATS) for w in (*_ROW_WEIGHTS[:2], MATRICES[0], MATRICES[1])),
        _embedding_case(_ROW_WEIGHTS[0], (), FLOATS),
        _embedding_case(_ROW_WEIGHTS[0], (0,), FLOATS),
    ),
    base=lambda data, dtype: {"ids": _ids(30, (3,)), "weight": _words(data, dtype)},
    bad=(
        Bad("ids float", {"ids": np.zeros(3, np.float32)}, TypeError, "integers"),
        Bad("ids a list", {"ids": [0, 1, 2]}, TypeError, "numpy"),
        Bad("id too large", {"ids": np.array([0, 30])}, IndexError, "30", _UNSEEN),
        Bad("id negative", {"ids": np.array([-1, 3])}, IndexError, "-1", _UNSEEN),
        Bad("weight int32", {"weight": _int32}, TypeError, "int32"),
        Bad("weight 1-D", {"weight": lambda a: a[0].copy()}, ValueError, "weight has shape"),
        Bad("weight strided", {"weight": _strided}, ValueError, "contiguous"),
        *_BAD_OUT,
    ),
    workspace=True,
)


# --- attention ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _qkv(data: Data) -> tuple[NDArray[Any], ...]:
    return data.qkv(4)


def _heads(
    data: Data, which: int, batch: int, seq: int, heads: int, head_dim: int, dtype: Any
) -> NDArray[Any]:
    """Real q, k or v values (which = 0, 1, 2), read in another shape where head_dim is not 32."""
    return np.resize(_qkv(data)[which], (batch, seq, heads, head_dim)).astype(dtype)


def _attend(
    batch: int = 2,
    seq_q: int = 33,
    seq_k: int | None = None,
    heads: int = 3,
    kv_heads: int | None = None,
    head_dim: int = 32,
    mask: Callable[[int, int, int, int], NDArray[Any]] | None = None,
    lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> Callable[[Data, Any], Args]:
    def make(data: Data, dtype: Any) -> Args:
        keys, kv = seq_q if seq_k is None else seq_k, kv_heads or heads
        args: Args = {
            "q": _heads(data, 0, batch, seq_q, heads, head_dim, dtype),
            "k": _heads(data, 1, batch, keys, kv, head_dim, dtype),
            "v": _heads(data, 2, batch, keys, kv, head_dim, dtype),
            **options,
        }
        if mask is not None:
            args["mask"] = mask(batch, heads, seq_q, keys)
        if lengths is not None:
            args["lengths"] = np.array(lengths, np.int64)
        return args

    return make


def _alibi(batch: int, heads: int, seq_q: int, seq_k: int) -> Any:
    """Press, Smith and Lewis 2021: -slope * distance, one slope per head. (1, heads, seq_q, seq_k)."""
    distance = np.abs(np.arange(seq_q)[:, None] + seq_k - seq_q - np.arange(seq_k)[None, :])
    return -(distance / 2.0 ** np.arange(1, heads + 1)[:, None, None])[None].astype(np.float32)


def _holes(batch: int, heads: int, seq_q: int, seq_k: int) -> Any:
    """(batch, 1, seq_q, seq_k) keeping about two thirds; query 1 sees nothing."""
    b, i, j = np.ogrid[:batch, :seq_q, :seq_k]
    return (((b + 3 * i + 5 * j) % 7 > 1) & (i != 1))[:, None]


def _padding(batch: int, heads: int, seq_q: int, seq_k: int) -> NDArray[np.bool_]:
    """(batch, 1, 1, seq_k): the last keys of each sequence are padding."""
    return (np.arange(seq_k)[None, :] < seq_k - 3 - np.arange(batch)[:, None])[:, None, None]


def _minus_inf(batch: int, heads: int, seq_q: int, seq_k: int) -> NDArray[np.float32]:
    """(seq_q, seq_k): -inf above the diagonal, and query 2 sees nothing."""
    mask = np.triu(np.full((seq_q, seq_k), -np.inf, np.float32), 1)
    mask[2] = -np.inf
    return mask


def _packed_qkv(data: Data, dtype: Any) -> Args:
    """q, k, v as views of one (batch, seq, 3, heads, head_dim) array, as a fused projection leaves them."""
    packed = np.stack([_heads(data, which, 2, 31, 3, 32, dtype) for which in range(3)], axis=2)
    return {"q": packed[:, :, 0], "k": packed[:, :, 1], "v": packed[:, :, 2]}


def _head_major(data: Data, dtype: Any) -> Args:
    """(batch, heads, seq, head_dim) arrays seen as (batch, seq, heads, head_dim)."""
    arrays = (np.ascontiguousarray(_heads(data, i, 2, 31, 3, 32, dtype).swapaxes(1, 2)) for i in range(3))
    return {name: a.swapaxes(1, 2) for name, a in zip("qkv", arrays, strict=True)}


def _attention_special(data: Data, dtype: Any) -> Args:
    """NaN in one query, one key and one value; behind the length they must not be seen."""
    args = _attend(seq_q=5, seq_k=9, lengths=(9, 6))(data, dtype)
    args["q"][0, 2, 0, 3] = np.nan
    args["k"][0, 4, 1, 3] = np.nan
    args["v"][0, 5, 2, 7] = np.nan
    for name in "kv":
        args[name][1, 6:] = np.nan
    return args


def _varlen(
    lengths: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    heads: int = 3,
    kv_heads: int | None = None,
    head_dim: int = 32,
    ends: Any = np.int64,
    **options: Any,
) -> Callable[[Data, Any], Args]:
    """Packed sequences of these lengths; keys of `lengths_k`, or of the same."""

    def make(data: Data, dtype: Any) -> Args:
        own = lengths if lengths_k is None else lengths_k
        args: Args = {
            "q": _heads(data, 0, 1, sum(lengths), heads, head_dim, dtype)[0],
            "k": _heads(data, 1, 1, sum(own), kv_heads or heads, head_dim, dtype)[0],
            "v": _heads(data, 2, 1, sum(own), kv_heads or heads, head_dim, dtype)[0],
            "cu_seqlens_q": np.cumsum((0, *lengths), dtype=ends),
            **options,
        }
        if lengths_k is not None:
            args["cu_seqlens_k"] = np.cumsum((0, *lengths_k), dtype=ends)
        return args

    return make


def _varlen_special(data: Data, dtype: Any) -> Args:
    """NaN in one query, one key and one value: none leaves its sequence."""
    args = _varlen((9, 5, 0, 7), return_lse=True)(data, dtype)
    args["q"][10, 0, 3] = np.nan
    args["k"][3, 1, 3] = np.nan
    args["v"][20, 2, 7] = np.nan
    return args


def _attention_expected(args: Args) -> dict[str, NDArray[np.float64]]:
    o, lse = reference.attention(**{**args, "return_lse": True})
    return {"out": o, "lse": lse} if args.get("return_lse") else {"out": o}


def _packed_base(**change: Any) -> dict[str, Any]:
    """Changes that make the base arguments packed: 10 queries and 14 keys."""
    ends = {"cu_seqlens_q": np.array([0, 5, 10]), "cu_seqlens_k": np.array([0, 7, 14])}
    return {**{n: lambda a: a.reshape(-1, *a.shape[2:]) for n in ("q", "k", "v", "out")}, **ends, **change}


ATTENTION = Op(
    name="attention",
    signature="attention(q, k, v, causal=False, scale=None, mask=None, lengths=None, window=None, out=None, "
    "workspace=None, cu_seqlens_q=None, cu_seqlens_k=None, return_lse=False)",
    equation="o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j], j over the keys that query i sees",
    output="shape and dtype of q; return_lse: also (batch, num_heads, seq_q) float32, packed (num_heads, total_q)",
    like=lambda args, dtype: (args["q"].shape, args["q"].dtype),
    expected=_attention_expected,
    tolerances=_tolerances(
        2e-6, "scores of up to 30 round to 30 * 2^-24 = 2e-6, which exp passes on as a relative error"
    ),
    cases=(
        Case("plain", _attend()),
        *(Case(f"head_dim {d}", _attend(heads=2, head_dim=d, seq_q=31)) for d in (1, 31, 33, 64, 128, 256)),
        *(Case(f"seq {n}", _attend(seq_q=n, heads=1, batch=1), ("float32",)) for n in (1, 63, 64, 65, 130)),
        Case("causal", _attend(causal=True)),
        Case("causal, more keys", _attend(seq_q=5, seq_k=65, causal=True)),
        Case("causal, more queries", _attend(seq_q=33, seq_k=20, causal=True)),
        Case("one query", _attend(seq_q=1, seq_k=65)),
        Case("one key", _attend(seq_q=33, seq_k=1)),
        Case("lengths", _attend(lengths=(33, 7))),
        Case("lengths 0", _attend(lengths=(0, 12))),
        Case("causal lengths", _attend(lengths=(30, 7), causal=True), ("float32",)),
        Case("window", _attend(window=(4, 2))),
        Case("window left", _attend(window=(4, -1)), ("float32",)),
        Case("window right", _attend(window=(-1, 0)), ("float32",)),
        Case("window causal", _attend(window=(4, 4), causal=True), ("float32",)),
        Case("window, more keys", _attend(seq_q=9, seq_k=65, window=(3, 0)), ("float32",)),
        Case("mask ALiBi", _attend(mask=_alibi), ("float32", "float16")),
        Case("mask with holes", _attend(mask=_holes), ("float32", "bfloat16")),
        Case("mask padding", _attend(mask=_padding), ("float32",)),
        Case("mask -inf", _attend(mask=_minus_inf), ("float32",)),
        Case(
            "mask and causal and lengths", _attend(mask=_holes, causal=True, lengths=(33, 20)), ("float32",)
        ),
        Case("grouped", _attend(heads=6, kv_heads=2)),
        Case("multi-query", _attend(heads=6, kv_heads=1)),
        Case(
            "grouped causal lengths",
            _attend(heads=4, kv_heads=2, causal=True, lengths=(11, 33)),
            ("float32",),
        ),
        Case("scale", _attend(scale=0.05)),
        Case("scale negative", _attend(scale=-0.1), ("float32",)),
        Case("packed", _packed_qkv),
        Case("head-major", _head_major),
        Case("no sequence", _attend(batch=0)),
        Case("no query", _attend(seq_q=0, seq_k=5)),
        Case("NaN", _attention_special),
        Case("lse", _attend(return_lse=True)),
        Case("lse, lengths 0", _attend(lengths=(0, 12), return_lse=True), ("float32",)),
        Case("lse, causal, more queries", _attend(seq_q=33, seq_k=20, causal=True, return_lse=True)),
        Case(
            "lse, mask ALiBi, grouped",
            _attend(heads=4, kv_heads=2, mask=_alibi, return_lse=True),
            ("float32",),
        ),
        Case("lse, mask -inf", _attend(mask=_minus_inf, return_lse=True), ("float32",)),
        Case("lse, NaN", lambda data, dtype: {**_attention_special(data, dtype), "return_lse": True}),
        Case("lse, no keys", _attend(seq_q=3, seq_k=0, return_lse=True), ("float32",)),
        Case("varlen", _varlen((33, 7, 20))),
        Case("varlen, causal, lse", _varlen((33, 7, 20), causal=True, return_lse=True)),
        Case("varlen, int32, empty sequences", _varlen((0, 5, 0, 0, 64, 1, 0), ends=np.int32)),
        Case("varlen, one sequence", _varlen((65,), causal=True), ("float32",)),
        Case("varlen, other keys", _varlen((5, 0, 20, 3), (30, 4, 0, 65), return_lse=True)),
        Case("varlen, other keys, causal", _varlen((5, 33, 1), (30, 20, 65), causal=True, return_lse=True)),
        Case("varlen, window", _varlen((33, 7, 70), window=(4, 2)), ("float32",)),
        Case("varlen, grouped", _varlen((33, 7), heads=6, kv_heads=2, head_dim=64, causal=True)),
        Case(
            "varlen, several tiles",
            _varlen((300, 17, 130), heads=2, causal=True, return_lse=True),
            ("float32",),
        ),
        Case("varlen, no sequence", _varlen((), return_lse=True)),
        Case("varlen, no tokens", _varlen((0, 0), return_lse=True), ("float32",)),
        Case("varlen, NaN", _varlen_special),
    ),
    base=_attend(seq_q=5, seq_k=7, heads=4),
    bad=(
        Bad("q 3-D", {"q": lambda a: a[0]}, ValueError, "axes"),
        Bad("q float64", {"q": _float64}, TypeError, "float64"),
        Bad("q a list", {"q": _listed}, TypeError, "numpy"),
        Bad("q strided", {"q": _strided}, ValueError, "contiguous"),
        Bad("k of another dtype", {"k": _float16}, TypeError, "k has dtype"),
        Bad("k of another batch", {"k": _shorter}, ValueError, "k has shape"),
        Bad("v of fewer keys", {"v": lambda a: a[:, :6]}, ValueError, "v has shape"),
        Bad("v of another head_dim", {"v": _narrower}, ValueError, "v has shape"),
        Bad("heads no multiple", {n: lambda a: a[:, :, :3] for n in "kv"}, ValueError, "multiple"),
        Bad("head_dim 257", {n: lambda a: np.resize(a, (1, 2, 1, 257)) for n in "qkv"}, ValueError, "257"),
        Bad("mask shape", {"mask": np.ones((5, 6), bool)}, ValueError, "mask has shape"),
        Bad("mask float64", {"mask": np.ones((5, 7))}, TypeError, "mask has dtype"),
        Bad("mask int64", {"mask": np.ones((5, 7), np.int64)}, TypeError, "mask has dtype"),
        Bad("lengths float", {"lengths": np.ones(2, np.float32)}, TypeError, "integers"),
        Bad("lengths count", {"lengths": np.ones(3, np.int64)}, ValueError, "lengths has shape"),
        Bad("lengths too long", {"lengths": np.array([3, 8])}, ValueError, "seq_k=7", _UNSEEN),
        Bad("lengths negative", {"lengths": np.array([3, -1])}, ValueError, "seq_k=7", _UNSEEN),
        Bad("window", {"window": (-2, 0)}, ValueError, "window"),
        Bad("packed with 4 axes", {"cu_seqlens_q": np.array([0, 5])}, ValueError, "axes"),
        Bad("packed with lengths", _packed_base(lengths=np.array([5, 7])), ValueError, "lengths"),
        Bad("packed with a mask", _packed_base(mask=np.ones((10, 14), bool)), ValueError, "mask"),
        Bad("packed keys alone", {"cu_seqlens_k": np.array([0, 7])}, ValueError, "cu_seqlens_q"),
        Bad("packed, keys not said", _packed_base(cu_seqlens_k=None), ValueError, "cu_seqlens_k"),
        Bad(
            "cu_seqlens_q float",
            _packed_base(cu_seqlens_q=np.array([0.0, 5.0, 10.0])),
            TypeError,
            "cu_seqlens_q",
        ),
        Bad(
            "cu_seqlens_q 2-D", _packed_base(cu_seqlens_q=np.array([[0, 5, 10]])), ValueError, "cu_seqlens_q"
        ),
        Bad(
            "cu_seqlens_q empty",
            _packed_base(cu_seqlens_q=np.array([], np.int64)),
            ValueError,
            "cu_seqlens_q",
        ),
        Bad(
            "cu_seqlens_q from 1",
            _packed_base(cu_seqlens_q=np.array([1, 5, 10])),
            ValueError,
            "cu_seqlens_q",
            _UNSEEN,
        ),
        Bad(
            "cu_seqlens_q falls",
            _packed_base(cu_seqlens_q=np.array([0, 11, 10])),
            ValueError,
            "cu_seqlens_q",
            _UNSEEN,
        ),
        Bad(
            "cu_seqlens_q short",
            _packed_base(cu_seqlens_q=np.array([0, 5, 9])),
            ValueError,
            "cu_seqlens_q",
            _UNSEEN,
        ),
        Bad(
            "cu_seqlens_k long",
            _packed_base(cu_seqlens_k=np.array([0, 5, 15])),
            ValueError,
            "cu_seqlens_k",
            _UNSEEN,
        ),
        Bad(
            "cu_seqlens_k of fewer", _packed_base(cu_seqlens_k=np.array([0, 14])), ValueError, "cu_seqlens_k"
        ),
        *_BAD_OUT,
    ),
    workspace=True,
)


# --- rows ---------------------------------------------------------------------------------------------


def _softmax_args(
    rows: int, cols: int, mask: Callable[[int, int], NDArray[Any]] | None = None, **options: Any
) -> Any:
    def make(data: Data, dtype: Any) -> Args:
        args: Args = {"x": _rows(data, rows, cols, dtype), **options}
        if mask is not None:
            args["mask"] = mask(rows, cols)
        return args

    return make


def _added(rows: int, cols: int) -> Any:
    """-slope * distance: (rows, cols) float32."""
    return -np.abs(np.arange(rows)[:, None] - np.arange(cols)[None, :]).astype(np.float32) / 8


def _kept(rows: int, cols: int) -> Any:
    """(rows, cols) keeping about two thirds; row 1 keeps nothing."""
    i, j = np.ogrid[:rows, :cols]
    return ((3 * i + 5 * j) % 7 > 1) & (i != 1)


def _all_minus_inf(data: Data, dtype: Any) -> Args:
    x = _rows(data, 3, 65, dtype)
    x[1] = -np.inf
    return {"x": x}


SOFTMAX = Op(
    name="softmax",
    signature="softmax(x, scale=1.0, mask=None, out=None)",
    equation="y[r,c] = exp(s[r,c] - max s[r]) / sum_c exp(s[r,c] - max s[r]), s = scale * x + mask",
    output="shape and dtype of x",
    like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.softmax(**args)},
    tolerances=_tolerances(
        1e-6,
        "scores of up to 10 below the largest round to 10 * 2^-24 = 6e-7; exp passes that on, and adds 2 ulp",
    ),
    cases=(
        *(Case(f"3 x {cols}", _softmax_args(3, cols)) for cols in COLS),
        Case("1 x 384", _softmax_args(1, 384)),
        Case("65 x 1536", _softmax_args(65, 1536)),
        Case("3 x 5000", _softmax_args(3, 5000)),
        Case("scale", _softmax_args(3, 65, scale=0.125)),
        Case("scale negative", _softmax_args(3, 65, scale=-2.0)),
        Case("mask added", _softmax_args(3, 65, _added)),
        Case("mask bool", _softmax_args(3, 65, _kept)),
        Case("mask added, scale, 65 x 1536", _softmax_args(65, 1536, _added, scale=0.5), ("float32",)),
        Case("mask bool, 65 x 1536", _softmax_args(65, 1536, _kept), ("float32",)),
        Case("mask bool, 3 x 5000", _softmax_args(3, 5000, _kept), ("float32",)),
        Case("mask of one row", _softmax_args(3, 65, lambda r, c: _added(1, c)[0]), ("float32",)),
        Case("mask of one column", _softmax_args(3, 65, lambda rows, cols: _kept(rows, 1)), ("float32",)),
        Case("mask bool strided", _softmax_args(3, 65, lambda r, c: _kept(r, 2 * c)[:, ::2]), ("float32",)),
        Case("x 1-D", lambda data, dtype: {"x": _rows(data, 1, 65, dtype)[0]}),
        Case("x 3-D", lambda data, dtype: {"x": _rows(data, 6, 33, dtype).reshape(2, 3, 33)}),
        Case(
            "x 3-D, mask of one sequence",
            lambda data, dtype: {
                "x": _rows(data, 6, 33, dtype).reshape(2, 3, 33),
                "mask": np.ascontiguousarray(_kept(2, 33)[:, None]),
            },
            ("float32",),
        ),
        Case("no rows", lambda data, dtype: {"x": np.empty((0, 64), dtype)}),
        Case("NaN and Inf", lambda data, dtype: {"x": _special(4, 65, dtype)}),
        Case("row of -inf", _all_minus_inf),
    ),
    base=_softmax_args(3, 64),
    bad=(
        *_BAD_X,
        _BAD_RANK,
        Bad("mask shape", {"mask": np.ones((2, 64), bool)}, ValueError, "mask has shape"),
        Bad("mask float64", {"mask": np.ones((3, 64))}, TypeError, "mask has dtype"),
        Bad("mask int32", {"mask": np.ones((3, 64), np.int32)}, TypeError, "mask has dtype"),
        *_BAD_OUT,
    ),
    in_place="x",
)


def _norm_args(
    op: str,
    rows: int | tuple[int, ...],
    cols: int,
    bias: bool = False,
    residual: bool = False,
    residual_out: bool = False,
    vector_dtype: Any = None,
    **options: Any,
) -> Callable[[Data, Any], Args]:
    lead = (rows,) if isinstance(rows, int) else rows
    count = int(np.prod(lead))

    def make(data: Data, dtype: Any) -> Args:
        x = _rows(data, count, cols, dtype).reshape(*lead, cols)
        args: Args = {"x": x, "weight": _gain(data, cols, vector_dtype or dtype), **options}
        if bias and op == "layer_norm":
            args["bias"] = _bias(data, cols, vector_dtype or dtype)
        if residual:
            args["residual"] = _rows(data, count, cols, dtype, 2).reshape(x.shape)
        if residual_out:
            args["residual_out"] = np.full_like(x, np.nan)
        return args

    return make


_FULL = {"bias": True, "residual": True, "residual_out": True}


def _norm_cases(op: str) -> tuple[Case, ...]:
    cases = [Case(f"3 x {cols}", _norm_args(op, 3, cols, bias=True)) for cols in COLS]
    cases += [
        Case("1 x 384", _norm_args(op, 1, 384, bias=True)),
        Case("65 x 1536", _norm_args(op, 65, 1536, bias=True)),
        Case("3 x 5000", _norm_args(op, 3, 5000, bias=True)),
        Case("eps", _norm_args(op, 3, 384, bias=True, eps=0.5)),
        Case("residual", _norm_args(op, 3, 65, bias=True, residual=True), ("float32",)),
        Case("residual and residual_out", _norm_args(op, 3, 65, **_FULL)),
        Case("residual and residual_out, 65 x 1536", _norm_args(op, 65, 1536, **_FULL), ("float32",)),
        Case("residual_out alone", _norm_args(op, 3, 65, bias=True, residual_out=True), ("float32",)),
        Case(
            "float32 weight",
            _norm_args(op, 3, 65, bias=True, vector_dtype=np.float32),
            ("float16", "bfloat16"),
        ),
        Case("x 1-D", _norm_args(op, (), 65, bias=True)),
        Case("x 3-D", _norm_args(op, (2, 3), 33, **_FULL)),
        Case("no rows", _norm_args(op, 0, 64, **_FULL)),
        Case(
            "NaN and Inf",
            lambda data, dtype: {"x": _special(4, 65, dtype), "weight": _gain(data, 65, dtype)},
        ),
        Case(
            "row of zeros",
            lambda data, dtype: {"x": np.zeros((2, 33), dtype), "weight": _gain(data, 33, dtype)},
        ),
    ]
    if op == "layer_norm":
        cases.append(Case("no bias", _norm_args(op, 3, 384)))
    return tuple(cases)


_BAD_NORM = (
    *_BAD_X,
    _BAD_RANK,
    Bad("weight narrower", {"weight": _narrower}, ValueError, "weight has shape"),
    Bad("weight 2-D", {"weight": lambda a: a[None]}, ValueError, "weight has shape"),
    Bad("weight float64", {"weight": _float64}, TypeError, "weight has dtype"),
    Bad("weight strided", {"weight": _strided}, ValueError, "weight is not C-contiguous"),
    Bad("eps negative", {"eps": -1e-5}, ValueError, "eps"),
    Bad("residual of another dtype", {"residual": _float16}, TypeError, "residual has dtype"),
    Bad("residual_out float16", {"residual_out": _float16}, TypeError, "residual_out has dtype"),
    Bad("residual_out narrower", {"residual_out": _narrower}, ValueError, "residual_out has shape"),
    *_BAD_RESIDUAL,
    *_BAD_OUT,
)


def _norm_expected(op: Callable[..., Any]) -> Callable[[Args], dict[str, NDArray[np.float64]]]:
    def expected(args: Args) -> dict[str, NDArray[np.float64]]:
        y, s = op(**{k: v for k, v in args.items() if k != "residual_out"})
        return {"out": y, "residual_out": s}

    return expected


_NORM_WHY = "a float32 sum in 32 lanes, then four roundings per element (2^-24 each)"

LAYER_NORM = Op(
    name="layer_norm",
    signature="layer_norm(x, weight, bias=None, eps=1e-05, residual=None, out=None, residual_out=None)",
    equation="y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, s = x + residual, over the last axis",
    output="shape and dtype of x; residual_out receives s",
    like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=_norm_expected(reference.layer_norm),
    tolerances=_tolerances(5e-7, _NORM_WHY),
    cases=_norm_cases("layer_norm"),
    base=_norm_args("layer_norm", 3, 64, **_FULL),
    bad=(*_BAD_NORM, *_BAD_BIAS),
    in_place="x",
    outputs=("residual_out",),
)

RMS_NORM = Op(
    name="rms_norm",
    signature="rms_norm(x, weight, eps=1e-06, residual=None, out=None, residual_out=None)",
    equation="y = s / sqrt(mean(s^2) + eps) * weight, s = x + residual, over the last axis",
    output="shape and dtype of x; residual_out receives s",
    like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=_norm_expected(reference.rms_norm),
    tolerances=_tolerances(5e-7, _NORM_WHY),
    cases=_norm_cases("rms_norm"),
    base=_norm_args("rms_norm", 3, 64, **_FULL),
    bad=_BAD_NORM,
    in_place="x",
    outputs=("residual_out",),
)


# --- elementwise --------------------------------------------------------------------------------------


def _element_args(
    rows: int | tuple[int, ...], cols: int, bias: Any = False, **options: Any
) -> Callable[..., Args]:
    """x (rows, cols), and a bias in x's dtype (True) or in a dtype of its own."""
    lead = (rows,) if isinstance(rows, int) else rows
    count = int(np.prod(lead))

    def make(data: Data, dtype: Any) -> Args:
        args: Args = {"x": _rows(data, count, cols, dtype).reshape(*lead, cols), **options}
        if bias:
            args["bias"] = _bias(data, cols, dtype if bias is True else bias)
        return args

    return make


def _element_special(cols: int, **options: Any) -> Callable[[Data, Any], Args]:
    """Hand-made: every pair of {NaN, Inf, -Inf, 0, 1} and large values, in both halves of the columns."""
    values = (np.nan, np.inf, -np.inf, 0.0, 1.0, -1.0, 60.0, -60.0, 3e4, -3e4)

    def make(data: Data, dtype: Any) -> Args:
        left, right = np.meshgrid(values, values)
        x = np.concatenate([left, right], axis=1)
        return {"x": np.resize(x, (len(values), cols)).astype(dtype), **options}

    return make


def _element_cases(step: int = 1, **options: Any) -> tuple[Case, ...]:
    """`step` 2 for the op that needs an even number of columns."""
    cases = [Case(f"3 x {step * cols}", _element_args(3, step * cols, **options)) for cols in COLS]
    cases += [
        Case(f"1 x {step * 384}", _element_args(1, step * 384, **options)),
        Case(f"65 x {step * 1536}", _element_args(65, step * 1536, **options)),
        Case(f"bias, 3 x {step * 65}", _element_args(3, step * 65, bias=True, **options)),
        Case(f"bias, 65 x {step}", _element_args(65, step, bias=True, **options), ("float32",)),
        Case(f"bias, 65 x {step * 1537}", _element_args(65, step * 1537, bias=True, **options), ("float32",)),
        Case(
            "float32 bias", _element_args(3, step * 65, bias=np.float32, **options), ("float16", "bfloat16")
        ),
        Case("x 1-D", _element_args((), step * 65, **options)),
        Case("x 3-D", _element_args((2, 3), step * 33, bias=True, **options)),
        Case("no rows", _element_args(0, step * 64, bias=True, **options)),
        Case("NaN and Inf", _element_special(20, **options)),
    ]
    return tuple(cases)


_BAD_ELEMENT = (*_BAD_X, _BAD_RANK, *_BAD_BIAS, *_BAD_OUT)

GELU = Op(
    name="gelu",
    signature="gelu(x, bias=None, approximate='none', out=None)",
    equation="y = t/2 (1 + erf(t/sqrt 2)), or t/2 (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))), t = x + bias",
    output="shape and dtype of x",
    like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.gelu(**args)},
    tolerances=_tolerances(5e-7, "erf or exp to 2 ulp and four roundings; 1 + erf cancels where t < 0"),
    cases=(
        *_element_cases(),
        Case("tanh 3 x 65", _element_args(3, 65, approximate="tanh")),
        Case("tanh bias, 3 x 65", _element_args(3, 65, bias=True, approximate="tanh")),
        Case("tanh NaN and Inf", _element_special(20, approximate="tanh")),
    ),
    base=_element_args(3, 64, bias=True),
    bad=(*_BAD_ELEMENT, Bad("approximate", {"approximate": "erf"}, ValueError, "approximate")),
    in_place="x",
)

SILU = Op(
    name="silu",
    signature="silu(x, bias=None, out=None)",
    equation="y = t / (1 + exp(-t)), t = x + bias",
    output="shape and dtype of x",
    like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.silu(**args)},
    tolerances=_tolerances(3e-7, "exp to 2 ulp and three roundings"),
    cases=_element_cases(),
    base=_element_args(3, 64, bias=True),
    bad=_BAD_ELEMENT,
    in_place="x",
)

SWIGLU = Op(
    name="swiglu",
    signature="swiglu(x, bias=None, out=None)",
    equation="y = silu(gate) * up, x + bias = [gate | up] along the last axis",
    output="(*x.shape[:-1], x.shape[-1] // 2), dtype of x",
    like=lambda args, dtype: ((*args["x"].shape[:-1], args["x"].shape[-1] // 2), args["x"].dtype),
    expected=lambda args: {"out": reference.swiglu(**args)},
    tolerances=_tolerances(5e-7, "exp to 2 ulp and five roundings, two of them of x + bias"),
    cases=_element_cases(step=2),
    base=_element_args(3, 64, bias=True),
    bad=(*_BAD_ELEMENT, Bad("odd columns", {"x": _narrower}, ValueError, "even")),
)


# --- dropout ------------------------------------------------------------------------------------------


def _dropout_args(
    shape: tuple[int, ...], p: float, residual: bool = False, **options: Any
) -> Callable[..., Args]:
    count = int(np.prod(shape))

    def make(data: Data, dtype: Any) -> Args:
        args: Args = {"x": _rows(data, 1, count, dtype).reshape(shape), "p": p, "seed": 1234, **options}
        if residual:
            args["residual"] = _rows(data, 1, count, dtype, 2).reshape(shape)
        return args

    return make


def _dropout_special(p: float) -> Callable[[Data, Any], Args]:
    """Hand-made: a dropped NaN or Inf is 0."""
    return lambda data, dtype: {
        "x": np.resize([np.nan, np.inf, -np.inf, 1.0], 64).astype(dtype),
        "p": p,
        "seed": 5,
    }


DROPOUT = Op(
    name="dropout",
    signature="dropout(x, p, seed, offset=0, residual=None, out=None)",
    equation="y[i] = x[i] / (1 - p) + residual[i], or residual[i] where word i % 4 of Philox4x32-10 block "
    "offset + i // 4 is below floor(p 2^32)",
    output="shape and dtype of x",
    like=lambda args, dtype: (args["x"].shape, args["x"].dtype),
    expected=lambda args: {"out": reference.dropout(**args)},
    tolerances=_tolerances(2e-7, "a product and a sum, 2^-24 each; the mask is exact"),
    cases=(
        *(Case(f"3 x {cols}", _dropout_args((3, cols), 0.1)) for cols in COLS),
        Case("65 x 384", _dropout_args((65, 384), 0.5)),
        Case("residual", _dropout_args((3, 65), 0.1, residual=True)),
        Case("residual, 65 x 384", _dropout_args((65, 384), 0.3, residual=True), ("float32",)),
        Case("p 0", _dropout_args((3, 65), 0.0)),
        Case("p 0, residual", _dropout_args((3, 65), 0.0, residual=True)),
        Case("p 1", _dropout_args((3, 65), 1.0)),
        Case("p 1, residual", _dropout_args((3, 65), 1.0, residual=True)),
        Case("64-bit seed and offset", _dropout_args((3, 65), 0.5, seed=2**64 - 2, offset=2**64 - 9)),
        Case("offset across 2^32", _dropout_args((3, 65), 0.5, offset=2**32 - 9)),
        Case("x 1-D", _dropout_args((1027,), 0.5)),
        Case("x 0-D", _dropout_args((), 0.5)),
        Case("x 3-D", _dropout_args((2, 3, 33), 0.5)),
        Case("no rows", _dropout_args((0, 64), 0.5, residual=True)),
        Case("NaN and Inf", _dropout_special(0.5)),
        Case("NaN and Inf, p 1", _dropout_special(1.0)),
    ),
    base=_dropout_args((3, 64), 0.1, residual=True),
    bad=(
        *_BAD_X,
        Bad("p negative", {"p": -0.1}, ValueError, "p=-0.1"),
        Bad("p above 1", {"p": 1.1}, ValueError, "p=1.1"),
        Bad("p NaN", {"p": float("nan")}, ValueError, "p=nan"),
        Bad("seed negative", {"seed": -1}, ValueError, "seed"),
        Bad("seed too large", {"seed": 2**64}, ValueError, "seed"),
        Bad("offset too large", {"offset": 2**64}, ValueError, "offset"),
        *_BAD_RESIDUAL,
        *_BAD_OUT,
    ),
    in_place="x",
)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        DECODE,
        LINEAR,
        EMBEDDING,
        ATTENTION,
        LAYER_NORM,
        RMS_NORM,
        SOFTMAX,
        GELU,
        SILU,
        SWIGLU,
        DROPOUT,
    )
}
