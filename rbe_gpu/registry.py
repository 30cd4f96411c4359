"""The ops: signature, equation, result and tolerances of each.

`OPS` is the one list of them. `dispatch.Backend` offers each op of it on every backend, `ops` has its function,
`reference` its definition in float64, and `tests/cases/<op>.py` its test cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Tol:
    """Largest allowed relative error of a result, as `relative_error` computes it, and the reason for it.

    `floor` is subtracted from the absolute error of every element first: half the spacing of the dtype's subnormal
    numbers, below which no relative accuracy exists.
    """

    rel: float
    why: str
    floor: float = 0.0


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes
    ----------
    signature : as in `ops.py`, without annotations
    equation : what it computes
    output : shape and dtype of the result, in words
    tolerances : by name of the result's dtype
    in_place : name of the argument that `out` may be, or None
    outputs : names of optional array arguments that the op writes to
    workspace : whether the op takes `workspace=`
    """

    name: str
    signature: str
    equation: str
    output: str
    tolerances: dict[str, Tol]
    in_place: str | None = None
    outputs: tuple[str, ...] = ()
    workspace: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(self.tolerances)


def relative_error(result: NDArray[Any], expected: NDArray[np.float64], floor: float = 0.0) -> float:
    """||max(|y - expected| - floor, 0)|| / ||expected|| (Frobenius norms) over the finite values.

    Infinite unless NaN, +Inf and -Inf are exactly where `expected`, rounded to the result's dtype, has them.
    """
    with np.errstate(over="ignore"):
        rounded = expected.astype(result.dtype).astype(np.float64)
    y = result.astype(np.float64)
    finite = np.isfinite(rounded)
    if not np.array_equal(y[~finite], rounded[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
        return float("inf")
    excess = np.maximum(np.abs(y[finite] - expected[finite]) - floor, 0.0)
    error, norm = float(np.linalg.norm(excess)), float(np.linalg.norm(expected[finite]))
    return error / norm if norm else (0.0 if error == 0 else float("inf"))


def _tolerances(float32: float, why: str) -> dict[str, Tol]:
    """`float32` for its reason; the half types add one rounding of the result."""
    return {
        "float32": Tol(float32, why),
        "float16": Tol(5e-4, "one rounding to 11 bits, 2^-11 = 4.9e-4; the sums are float32", floor=2.0**-25),
        "bfloat16": Tol(4e-3, "one rounding to 8 bits, 2^-8 = 3.9e-3; the sums are float32"),
    }


_NORM = _tolerances(5e-7, "a float32 sum in 32 lanes, then four roundings per element (2^-24 each)")

_ALL = (
    Op(
        name="decode",
        signature="decode(weight, dtype=float32, out=None, workspace=None)",
        equation="W = gain * (S_r C S_c^T + sum_k p_k Phi_k)",
        output="weight.shape, dtype",
        tolerances=_tolerances(
            2e-6,
            "float32 transforms of up to 128 x 128: two sums of 128 products, and the rounding of S itself",
        ),
        workspace=True,
    ),
    Op(
        name="linear",
        signature="linear(x, weight, bias=None, activation=None, residual=None, out=None, workspace=None, "
        "cache=None, method=None, activation_bits=None)",
        equation="y = activation(x W^T + bias) + residual",
        output="(*x.shape[:-1], out_features), dtype of x",
        tolerances=_tolerances(
            5e-6,
            "float32 sums of up to 1536 products whose terms cancel to a few percent, over a decoded float32 W",
        ),
        workspace=True,
    ),
    Op(
        name="embedding",
        signature="embedding(ids, weight, dtype=float32, out=None, workspace=None)",
        equation="y[..., :] = W[ids[...], :]",
        output="(*ids.shape, cols), dtype (of the weight where it is dense)",
        tolerances=_tolerances(2e-6, "as decode: float32 transforms of up to 128 values a side"),
        workspace=True,
    ),
    Op(
        name="attention",
        signature="attention(q, k, v, causal=False, scale=None, mask=None, lengths=None, window=None, out=None, "
        "workspace=None, cu_seqlens_q=None, cu_seqlens_k=None, return_lse=False, softcap=None)",
        equation="o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j], j over the keys that query i sees",
        output="shape and dtype of q; return_lse: also (batch, num_heads, seq_q) float32, "
        "packed (num_heads, total_q)",
        tolerances=_tolerances(
            2e-6, "scores of up to 30 round to 30 * 2^-24 = 2e-6, which exp passes on as a relative error"
        ),
        workspace=True,
    ),
    Op(
        name="layer_norm",
        signature="layer_norm(x, weight, bias=None, eps=1e-05, residual=None, out=None, residual_out=None)",
        equation="y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, s = x + residual, over the last axis",
        output="shape and dtype of x; residual_out receives s",
        tolerances=_NORM,
        in_place="x",
        outputs=("residual_out",),
    ),
    Op(
        name="rms_norm",
        signature="rms_norm(x, weight, eps=1e-06, residual=None, out=None, residual_out=None)",
        equation="y = s / sqrt(mean(s^2) + eps) * weight, s = x + residual, over the last axis",
        output="shape and dtype of x; residual_out receives s",
        tolerances=_NORM,
        in_place="x",
        outputs=("residual_out",),
    ),
    Op(
        name="softmax",
        signature="softmax(x, scale=1.0, mask=None, out=None)",
        equation="y[r,c] = exp(s[r,c] - max s[r]) / sum_c exp(s[r,c] - max s[r]), s = scale * x + mask",
        output="shape and dtype of x",
        tolerances=_tolerances(
            1e-6,
            "scores of up to 10 below the largest round to 10 * 2^-24 = 6e-7; exp passes that on, and adds 2 ulp",
        ),
        in_place="x",
    ),
    Op(
        name="l2_normalize",
        signature="l2_normalize(x, eps=1e-12, out=None)",
        equation="y = x / max(||x||_2, eps) over the last axis",
        output="shape and dtype of x",
        tolerances=_tolerances(
            3e-7, "a pairwise float32 sum, its root and one division per element (2^-24 each)"
        ),
        in_place="x",
    ),
    Op(
        name="mean_pool",
        signature="mean_pool(x, lengths=None, cu_seqlens=None, dtype=None, out=None)",
        equation="y[b] = mean of x over the tokens of sequence b, zeros where it has none",
        output="(batch, cols), dtype (of x by default)",
        tolerances=_tolerances(1e-6, "one float32 sum per column over up to 300 tokens, whose terms cancel"),
    ),
    Op(
        name="gelu",
        signature="gelu(x, bias=None, approximate='none', out=None)",
        equation="y = t/2 (1 + erf(t/sqrt 2)), or t/2 (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))), t = x + bias",
        output="shape and dtype of x",
        tolerances=_tolerances(5e-7, "erf or exp to 2 ulp and four roundings; 1 + erf cancels where t < 0"),
        in_place="x",
    ),
    Op(
        name="silu",
        signature="silu(x, bias=None, out=None)",
        equation="y = t / (1 + exp(-t)), t = x + bias",
        output="shape and dtype of x",
        tolerances=_tolerances(3e-7, "exp to 2 ulp and three roundings"),
        in_place="x",
    ),
    Op(
        name="swiglu",
        signature="swiglu(x, bias=None, out=None)",
        equation="y = silu(gate) * up, x + bias = [gate | up] along the last axis",
        output="(*x.shape[:-1], x.shape[-1] // 2), dtype of x",
        tolerances=_tolerances(5e-7, "exp to 2 ulp and six roundings, two of them of x + bias"),
    ),
    Op(
        name="rope",
        signature="rope(x, cos, sin, positions=None, interleaved=False, out=None)",
        equation="y[a] = x[a] c[j] - x[b] s[j], y[b] = x[b] c[j] + x[a] s[j], c = cos[p], s = sin[p], of a token at "
        "p; (a, b) = (j, j + half), or (2j, 2j + 1) interleaved, for j < half = cos.shape[1]",
        output="shape and dtype of x",
        tolerances=_tolerances(2e-7, "two products and a sum, 2^-24 each"),
        in_place="x",
    ),
    Op(
        name="dropout",
        signature="dropout(x, p, seed, offset=0, residual=None, out=None)",
        equation="y[i] = x[i] / (1 - p) + residual[i], or residual[i] where word i % 4 of Philox4x32-10 block "
        "offset + i // 4 is below floor(p 2^32)",
        output="shape and dtype of x",
        tolerances=_tolerances(2e-7, "a product and a sum, 2^-24 each; the mask is exact"),
        in_place="x",
    ),
    Op(
        name="add",
        signature="add(x, residual, out=None)",
        equation="y = x + residual",
        output="shape and dtype of x",
        tolerances=_tolerances(6e-8, "one rounding, 2^-24"),
        in_place="x",
    ),
)
OPS: dict[str, Op] = {op.name: op for op in _ALL}
