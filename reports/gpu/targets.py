"""What the kernels must reach on a GPU, and what rows say about it: met, missed by how much, or not measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..bench import Row
from .device import OURS

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """A limit for the worst (or, with `best`, the best) of some rows.

    Attributes
    ----------
    rows : which rows of `op`, `provider` and `metric` count
    limit : a least value, or a greatest one where `at_most`
    scale : what values are divided by when they are shown
    gpu : the limit is of this GPU ("H100"); "" for any
    """

    name: str
    op: str
    metric: str
    limit: float
    rows: Callable[[Row], bool] = lambda row: True
    provider: str = OURS
    at_most: bool = False
    best: bool = False
    scale: float = 1.0
    unit: str = ""
    gpu: str = ""


def _linear(least: int, most: int) -> Callable[[Row], bool]:
    """Rows of 4-bit weights and so many tokens."""

    def counts(row: Row) -> bool:
        found = re.fullmatch(r"(\d+)x(\d+), (\d+) tokens, dense-int4", row.case)
        return (
            found is not None and min(int(found[1]), int(found[2])) >= 4096 and least <= int(found[3]) <= most
        )

    return counts


def _attention(kind: str) -> Callable[[Row], bool]:
    def counts(row: Row) -> bool:
        found = re.fullmatch(r"(\d+) tokens, head_dim (64|128), (full|causal)", row.case)
        return found is not None and found[3] == kind and 1024 <= int(found[1]) <= 16384

    return counts


def _large(row: Row) -> bool:
    """Arrays of 64 MB and more."""
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    rows, cols = (int(n) for n in row.shape.strip("()").split(","))
    return rows * cols * sizes[row.dtype] >= 64e6


_COPY = "of a device-to-device copy's bandwidth, 64 MB and more"
TARGETS = (
    *(Target(f"{op}: >= 90% {_COPY}", op, "bandwidth_vs_copy", 0.9, _large, scale=0.01, unit="%")
      for op in ("layer_norm", "rms_norm", "softmax")),
    Target("decode: bytes written >= 80% " + _COPY, "decode", "written_vs_copy", 0.8, _large, scale=0.01, unit="%"),
    *(Target(f"attention, {kind}: {'the best' if best else 'all'} >= {limit} TFLOP/s", "attention", "rate",
             limit * 1e12, _attention(kind), best=best, scale=1e12, unit=" TFLOP/s", gpu="H100")
      for kind, limits in (("full", (306, 370)), ("causal", (260, 335)))
      for best, limit in zip((False, True), limits, strict=True)),
    Target("linear, 4 bits, 1 token: >= 3x cuBLAS f16", "linear", "speed_vs_PyTorch", 3.0, _linear(1, 1), unit="x"),
    Target("linear, 4 bits, 16 tokens: >= 1.5x cuBLAS f16", "linear", "speed_vs_PyTorch", 1.5,
           _linear(16, 16), unit="x"),
    Target("linear, 4 bits, 512 tokens and more: >= 0.9x cuBLAS f16", "linear", "speed_vs_PyTorch", 0.9,
           _linear(512, 1 << 30), unit="x"),
    Target("MiniLM, 64 x 128 tokens: faster than PyTorch eager f16", "model", "speed_vs_PyTorch", 1.0,
           lambda row: row.case == "64 x 128 tokens" and row.dtype == "float16", unit="x"),
    Target("MiniLM, batch 1: graph replay <= 1.2x the sum of its kernels", "model", "graph_vs_kernels", 1.2,
           at_most=True, unit="x"),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a target. `value` is the deciding row's, in the target's unit."""

    target: Target
    status: str
    value: float | None = None
    case: str = ""
    cases: int = 0
    meeting: int = 0

    @property
    def line(self) -> str:
        if self.value is None:
            return f"{NOT_MEASURED}: {self.target.name}"
        which = "best" if self.target.best else "worst"
        return (
            f"{self.status}: {self.target.name}: {which} {self.value:.3g}{self.target.unit} ({self.case}); "
            f"{self.meeting} of {self.cases} cases meet it"
        )


def judge(target: Target, rows: Iterable[Row]) -> Verdict:
    """The verdict over the last row of every case."""
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        if (row.op, row.provider, row.metric) == (target.op, target.provider, target.metric) and target.rows(
            row
        ):
            if target.gpu not in row.device:
                continue
            last[row.case, row.dtype] = row
    if not last:
        return Verdict(target, NOT_MEASURED)
    sign = -1.0 if target.at_most else 1.0
    ordered = sorted(last.values(), key=lambda row: sign * row.p50)
    meeting = sum(sign * row.p50 >= sign * target.limit for row in ordered)
    deciding = ordered[-1 if target.best else 0]
    met = sign * deciding.p50 >= sign * target.limit
    return Verdict(
        target,
        MET if met else MISSED,
        deciding.p50 / target.scale,
        f"{deciding.case}, {deciding.dtype}",
        len(ordered),
        meeting,
    )


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    held = list(rows)
    return [judge(target, held) for target in TARGETS]
