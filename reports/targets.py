"""What the kernels must reach on the CPU and on a GPU, and whether the rows pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .harness import row_names
from .harness.measure import NUMPY, ONNX, OURS, TORCH
from .harness.rows import Row
from .harness.text import FAILED, MISSING, PASSED, percent, times

#: unit -> how a value is shown
_SHOWN: dict[str, Callable[[float], str]] = {
    "x": times, "%": percent, "FLOP/s": lambda value: f"{value / 1e12:.3g} TFLOP/s",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A limit for the worst (with `best`: the best) of some rows of a metric.

    Attributes
    ----------
    name : what is limited, without the limit
    limit : the least value, or the greatest where `at_most`
    provider, case : patterns of the rows that count
    least_bytes : only rows of arrays, (rows, cols), of so many bytes
    unit : of the value as it is shown: "x", "%" or "FLOP/s"
    architecture : the limit holds for GPUs of this one ("sm_90"); "" for any
    """

    name: str
    op: str
    metric: str
    limit: float
    provider: str
    case: str = ".*"
    dtype: str = ".*"
    least_bytes: float = 0.0
    at_most: bool = False
    best: bool = False
    unit: str = "x"
    backend: str = "cpu"
    architecture: str = ""

    def counts(self, row: Row) -> bool:
        """Whether a row is one of those."""
        patterns = ((self.provider, row.provider), (self.case, row.case), (self.dtype, row.dtype))
        return (
            (row.backend, row.op, row.metric) == (self.backend, self.op, self.metric)
            and self.architecture in row.device
            and all(re.fullmatch(pattern, value) for pattern, value in patterns)
            and (not self.least_bytes or _array_bytes(row) >= self.least_bytes)
        )

    def shown(self, value: float) -> str:
        """A value in the target's unit."""
        return _SHOWN[self.unit](value)

    @property
    def limit_text(self) -> str:
        """E.g. ≥ 6×, ≤ 5%."""
        value = f"{self.limit:g}×" if self.unit == "x" else self.shown(self.limit)
        return f"{'≤' if self.at_most else '≥'} {value}"

    def passes(self, value: float) -> bool:
        """Whether a value is within the limit."""
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True)
class Outcome:
    """Whether a target is reached. `value` and `case` are those of the deciding row, the worst or the best."""

    target: Target
    status: str = MISSING
    value: float | None = None
    case: str = ""
    cases: int = 0
    passing: int = 0

    @property
    def line(self) -> str:
        """The outcome in one line."""
        target = self.target
        if self.value is None:
            return f"{MISSING}: {target.name}: {target.limit_text}"
        return (
            f"{self.status}: {target.name}: {target.limit_text}, {'best' if target.best else 'worst'} "
            f"{target.shown(self.value)} ({self.case}); {self.passing} of {self.cases} cases pass"
        )


def outcome(target: Target, rows: Iterable[Row]) -> Outcome:
    """The outcome over the last row of every case, provider and dtype."""
    last = {(row.case, row.provider, row.dtype): row for row in rows if target.counts(row)}
    if not last:
        return Outcome(target)
    ordered = sorted(last.values(), key=lambda row: -row.p50 if target.at_most else row.p50)
    row = ordered[-1 if target.best else 0]
    case = row.case
    if len({r.provider for r in ordered}) > 1:
        case += f", {row.provider.removeprefix(OURS).strip()}"
    if target.backend != "cpu":
        case += f", {row.dtype}"
    passing = sum(target.passes(r.p50) for r in ordered)
    status = PASSED if target.passes(row.p50) else FAILED
    return Outcome(target, status, row.p50, case, len(ordered), passing)


def outcomes(rows: Iterable[Row], backend: str) -> list[Outcome]:
    """The outcomes of all targets of a backend, in their order."""
    rows = list(rows)
    return [outcome(target, rows) for target in TARGETS if target.backend == backend]


def _array_bytes(row: Row) -> float:
    rows, cols = map(int, row.shape.strip("()").split(","))
    return rows * cols * {"float32": 4, "float16": 2, "bfloat16": 2}[row.dtype]


# --- the CPU ----------------------------------------------------------------------------------------------

VS_TORCH, VS_NUMPY, VS_ONNX = (f"speed_vs_{baseline}" for baseline in (TORCH, NUMPY, ONNX))
SMALL, LARGE = "768x768|3072x768", "4096x4096"
#: density -> target speedup over PyTorch's dense matmul, of small and large weights
DENSITY_LIMITS = {0.05: (6.0, 8.0), 0.12: (3.5, 5.0), 0.25: (2.0, 2.2), 0.5: (1.1, 1.1)}
_SIZES = (
    ("768x768 and 3072x768, 64 to 512 tokens", f"({SMALL}), (64|512) tokens"),
    ("4096x4096, 64 to 128 tokens", f"({LARGE}), (64|128) tokens"),
)
_COMPRESSED = f"{OURS} ((?!{row_names.LEAN}).)*"

CPU_TARGETS = (
    *(
        Target(f"linear, density {density:.0%}, {where}, against {TORCH}'s dense matmul", "linear", VS_TORCH, limit,
               row_names.sparse(density), case)
        for density, limits in DENSITY_LIMITS.items()
        for limit, (where, case) in zip(limits, _SIZES, strict=True)
    ),
    *(
        Target(f"linear, {codes}, {shape}, one token, against {TORCH}", "linear", VS_TORCH, limit, provider,
               f"{shape}, 1 token")
        for codes, provider, shape, limit in (
            ("4-bit codes", row_names.DENSE4, "768x768", 2.0),
            ("4-bit codes", row_names.DENSE4, LARGE, 4.0),
            ("density 5%", row_names.sparse(0.05), LARGE, 5.0),
        )
    ),
    *(
        Target(f"linear, any codes and batch, {cache}, against {NUMPY} with a weight decoded once", "linear",
               VS_NUMPY, 0.95, provider, f".*{row_names.DECODED}")
        for cache, provider in (("with a cache", _COMPRESSED), ("no decoded weights", f"{OURS} .*{row_names.LEAN}"))
    ),
    *(Target(f"{op}, against {TORCH}", op, VS_TORCH, 1.0, row_names.DENSE, "((?!, of a sum).)*")
      for op in ("layer_norm", "rms_norm", "softmax", "gelu")),
    *(Target(f"{op} of a sum, against {TORCH}'s two calls", op, VS_TORCH, 1.5, row_names.DENSE, ".*, of a sum")
      for op in ("layer_norm", "rms_norm")),
    Target(f"attention, 512 to 8192 tokens, heads of 32 and 64, causal and not, against {TORCH}'s fused attention",
           "attention", VS_TORCH, 1.0, row_names.DENSE, r"\d+ tokens, .*"),
    *(Target(f"MiniLM, dense, sentences per second against {baseline}", "model", metric, 1.0, row_names.DENSE,
             row_names.MODEL)
      for baseline, metric in ((ONNX, VS_ONNX), (TORCH, VS_TORCH))),
    Target(f"MiniLM, density {row_names.FAST_DENSITY:.0%}, no decoded weights, against the dense model", "model",
           f"speed_vs_{row_names.DENSE}", 2.0, f"{OURS} {row_names.FAST}", row_names.MODEL_LEAN),
    Target("MiniLM, compressed: share of the dense weights that a process holds beside the stored ones", "model",
           "dense_share", 0.05, f"{OURS}.*", row_names.MODEL_MEMORY, at_most=True, unit="%"),
)  # fmt: skip


# --- a GPU ------------------------------------------------------------------------------------------------

_COPY = "against a device-to-device copy's bandwidth, 64 MB and more"


def _on_gpu(name: str, op: str, metric: str, limit: float, case: str = ".*", **more: Any) -> Target:
    return Target(name, op, metric, limit, OURS, case, backend="cuda", **more)


GPU_TARGETS = (
    *(_on_gpu(f"{op}, {_COPY}", op, "bandwidth_vs_copy", 0.9, least_bytes=64e6, unit="%")
      for op in ("layer_norm", "rms_norm", "softmax")),
    _on_gpu(f"decode, bytes written, {_COPY}", "decode", "written_vs_copy", 0.8, least_bytes=64e6, unit="%"),
    *(_on_gpu(f"attention, {mask}, 8192 tokens, head_dim 128", "attention", "rate", limit * 1e12,
              f"8192 tokens, head_dim 128, {mask}", unit="FLOP/s", architecture="sm_90")
      for mask, limit in (("full", 500), ("causal", 400))),
    *(_on_gpu(f"linear, 4 bits, 4096x4096, {words}, against cuBLAS f16", "linear", VS_TORCH, limit,
              f"4096x4096, {tokens} tokens, dense-int4")
      for words, tokens, limit in (("1 token", 1, 2.5), ("16 tokens", 16, 1.5), ("2048 tokens", 2048, 0.85))),
    _on_gpu("MiniLM, 64 x 128 tokens, against PyTorch eager f16", "model", VS_TORCH, 1.0, "64 x 128 tokens",
            dtype="float16"),
    _on_gpu("MiniLM, batch 1, graph replay against the sum of its kernels", "model", "graph_vs_kernels", 1.2,
            at_most=True),
)  # fmt: skip
TARGETS = (*CPU_TARGETS, *GPU_TARGETS)
