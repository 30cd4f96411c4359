"""What the kernels must reach on the CPU and on a GPU, and whether the rows pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .harness.measure import NUMPY, ONNX, OURS, TORCH
from .harness.rows import Row
from .harness.text import FAILED, MISSING, PASSED, percent, times
from .speed.cases import DENSE, linear
from .speed.cases.model import CASE, LEAN, MEMORY
from .speed.compression import FAST

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
    counts : which rows of the op and metric count
    unit : of the value as it is shown: "x", "%" or "FLOP/s"
    gpu : the limit holds for this GPU ("H100"); "" for any
    """

    name: str
    op: str
    metric: str
    limit: float
    counts: Callable[[Row], bool]
    at_most: bool = False
    best: bool = False
    unit: str = "x"
    backend: str = "cpu"
    gpu: str = ""

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
    last = {
        (row.case, row.provider, row.dtype): row
        for row in rows
        if (row.backend, row.op, row.metric) == (target.backend, target.op, target.metric)
        and target.gpu in row.device
        and row.provider.startswith(OURS)
        and target.counts(row)
    }
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


# --- the CPU ----------------------------------------------------------------------------------------------


def _linear(provider: str, shapes: str, tokens: str) -> Callable[[Row], bool]:
    """Rows of one provider; shapes and tokens are alternatives of a pattern."""
    pattern = re.compile(f"(?:{shapes}), (?:{tokens}) tokens?")
    return lambda row: row.provider == provider and pattern.fullmatch(row.case) is not None


def _decoded_once(lean: bool) -> Callable[[Row], bool]:
    return lambda row: row.case.endswith(linear.DECODED) and row.provider.endswith(linear.LEAN) is lean


def _dense(fused: bool) -> Callable[[Row], bool]:
    return lambda row: row.provider == DENSE and row.case.endswith(", of a sum") is fused


def _of_model(case: str, provider: str | None = None) -> Callable[[Row], bool]:
    return lambda row: row.case == case and provider in (None, row.provider)


def _long_attention(row: Row) -> bool:
    return row.provider == DENSE and re.match(r"\d+ tokens, ", row.case) is not None


SMALL, LARGE = "768x768|3072x768", "4096x4096"
_NEAR, _FAR = "768x768 and 3072x768, 64 to 512 tokens", "4096x4096, 64 to 128 tokens"
#: share of the coefficients -> speedup over PyTorch that a product is to reach, of small and large weights
KEPT_LIMITS = {0.05: (6.0, 8.0), 0.12: (3.5, 5.0), 0.25: (2.0, 2.2), 0.5: (1.1, 1.1)}
VS_TORCH, VS_NUMPY, VS_ONNX = (f"speed_vs_{baseline}" for baseline in (TORCH, NUMPY, ONNX))

CPU_TARGETS = (
    *(
        Target(f"linear, {kept:.0%} kept, {where}, against {TORCH}'s dense product", "linear", VS_TORCH, limit,
               _linear(linear.sparse(kept), shapes, tokens))
        for kept, limits in KEPT_LIMITS.items()
        for limit, where, shapes, tokens in zip(
            limits, (_NEAR, _FAR), (SMALL, LARGE), ("64|512", "64|128"), strict=True
        )
    ),
    Target(f"linear, 4-bit codes, 768x768, one token, against {TORCH}", "linear", VS_TORCH, 2.0,
           _linear(linear.DENSE4, "768x768", "1")),
    Target(f"linear, 4-bit codes, 4096x4096, one token, against {TORCH}", "linear", VS_TORCH, 4.0,
           _linear(linear.DENSE4, LARGE, "1")),
    Target(f"linear, 5% kept, 4096x4096, one token, against {TORCH}", "linear", VS_TORCH, 5.0,
           _linear(linear.sparse(0.05), LARGE, "1")),
    Target(f"linear, any codes and batch, with a cache, against {NUMPY} with a weight decoded once", "linear",
           VS_NUMPY, 0.95, _decoded_once(False)),
    Target(f"linear, any codes and batch, nothing kept, against {NUMPY} with a weight decoded once", "linear",
           VS_NUMPY, 0.95, _decoded_once(True)),
    *(Target(f"{op}, against {TORCH}", op, VS_TORCH, 1.0, _dense(False))
      for op in ("layer_norm", "rms_norm", "softmax", "gelu")),
    *(Target(f"{op} of a sum, against {TORCH}'s two calls", op, VS_TORCH, 1.5, _dense(True))
      for op in ("layer_norm", "rms_norm")),
    Target(f"attention, 512 to 8192 tokens, heads of 32 and 64, causal and not, against {TORCH}'s fused attention",
           "attention", VS_TORCH, 1.0, _long_attention),
    *(Target(f"MiniLM, dense, sentences per second against {baseline}", "model", metric, 1.0, _of_model(CASE, DENSE))
      for baseline, metric in ((ONNX, VS_ONNX), (TORCH, VS_TORCH))),
    Target(f"MiniLM, {FAST.name}, nothing decoded kept, against the dense model", "model", f"speed_vs_{DENSE}", 2.0,
           _of_model(LEAN, f"{OURS} {FAST.name}")),
    Target("MiniLM, compressed: share of the dense weights that a process holds beside the stored ones", "model",
           "dense_share", 0.05, _of_model(MEMORY), at_most=True, unit="%"),
)  # fmt: skip


# --- a GPU ------------------------------------------------------------------------------------------------


def _matmul(least: int, most: int) -> Callable[[Row], bool]:
    """Rows of large 4-bit weights and so many tokens."""

    def counts(row: Row) -> bool:
        case = re.fullmatch(r"(\d+)x(\d+), (\d+) tokens, dense-int4", row.case)
        if case is None or row.provider != OURS:
            return False
        rows, cols, tokens = map(int, case.groups())
        return min(rows, cols) >= 4096 and least <= tokens <= most

    return counts


def _attention(mask: str) -> Callable[[Row], bool]:
    def counts(row: Row) -> bool:
        case = re.fullmatch(r"(\d+) tokens, head_dim (64|128), (full|causal)", row.case)
        return case is not None and case[3] == mask and 1024 <= int(case[1]) <= 16384

    return counts


def _large(row: Row) -> bool:
    """Arrays of 64 MB and more."""
    rows, cols = (int(n) for n in row.shape.strip("()").split(","))
    return (
        row.provider == OURS and rows * cols * {"float32": 4, "float16": 2, "bfloat16": 2}[row.dtype] >= 64e6
    )


def _on_gpu(
    name: str, op: str, metric: str, limit: float, counts: Callable[[Row], bool], **more: Any
) -> Target:
    return Target(name, op, metric, limit, counts, backend="cuda", **more)


_COPY = "against a device-to-device copy's bandwidth, 64 MB and more"
GPU_TARGETS = (
    *(_on_gpu(f"{op}, {_COPY}", op, "bandwidth_vs_copy", 0.9, _large, unit="%")
      for op in ("layer_norm", "rms_norm", "softmax")),
    _on_gpu(f"decode, bytes written, {_COPY}", "decode", "written_vs_copy", 0.8, _large, unit="%"),
    *(_on_gpu(f"attention, {mask}, {'the best case' if best else 'all cases'}", "attention", "rate", limit * 1e12,
              _attention(mask), best=best, unit="FLOP/s", gpu="H100")
      for mask, limits in (("full", (306, 370)), ("causal", (260, 335)))
      for best, limit in zip((False, True), limits, strict=True)),
    _on_gpu("linear, 4 bits, 1 token, against cuBLAS f16", "linear", VS_TORCH, 3.0, _matmul(1, 1)),
    _on_gpu("linear, 4 bits, 16 tokens, against cuBLAS f16", "linear", VS_TORCH, 1.5, _matmul(16, 16)),
    _on_gpu("linear, 4 bits, 512 tokens and more, against cuBLAS f16", "linear", VS_TORCH, 0.9,
            _matmul(512, 1 << 30)),
    _on_gpu("MiniLM, 64 x 128 tokens, against PyTorch eager f16", "model", VS_TORCH, 1.0,
            lambda row: (row.case, row.provider, row.dtype) == ("64 x 128 tokens", OURS, "float16")),
    _on_gpu("MiniLM, batch 1, graph replay against the sum of its kernels", "model", "graph_vs_kernels", 1.2,
            lambda row: row.provider == OURS, at_most=True),
)  # fmt: skip
TARGETS = (*CPU_TARGETS, *GPU_TARGETS)
