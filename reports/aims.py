"""What the CPU kernels are to reach, and what the rows of a report say about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .bench import Row
from .cases import DENSE, NUMPY, ONNX, TORCH, linear
from .cases.model import CASE, LEAN, MEMORY
from .quality import FAST, OURS

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Aim:
    """A limit for the worst of some rows.

    Attributes
    ----------
    what : the aim in words, without the limit
    rows : which rows of `op` and `metric` count
    limit : the least value, or the greatest where `at_most`
    """

    what: str
    op: str
    metric: str
    limit: float
    rows: Callable[[Row], bool]
    at_most: bool = False

    @property
    def limit_in_words(self) -> str:
        """E.g. ≥ 6×, ≤ 5%."""
        return f"≤ {self.limit:.0%}" if self.at_most else f"≥ {self.limit:g}×"


def _products(provider: str, shapes: str, tokens: str) -> Callable[[Row], bool]:
    """Rows of one provider; shapes and tokens are alternatives of a pattern."""
    wanted = re.compile(f"(?:{shapes}), (?:{tokens}) tokens?")
    return lambda row: row.provider == provider and wanted.fullmatch(row.case) is not None


def _decoded_once(lean: bool) -> Callable[[Row], bool]:
    return lambda row: row.case.endswith(linear.DECODED) and row.provider.endswith(linear.LEAN) is lean


def _dense(fused: bool) -> Callable[[Row], bool]:
    return lambda row: row.provider == DENSE and row.case.endswith(", of a sum") is fused


def _of_model(case: str, provider: str | None = None) -> Callable[[Row], bool]:
    return lambda row: row.case == case and provider in (None, row.provider)


SMALL, LARGE = "768x768|3072x768", "4096x4096"
_NEAR, _FAR = "768x768 and 3072x768, 64 to 512 tokens", "4096x4096, 64 to 128 tokens"
#: share of the coefficients -> how many times as fast as PyTorch a product is to be, at either size
KEPT_LIMITS = {0.05: (6.0, 8.0), 0.12: (3.5, 5.0), 0.25: (2.0, 2.2), 0.5: (1.1, 1.1)}
AGAINST_TORCH, AGAINST_NUMPY, AGAINST_ONNX = (f"speed_vs_{peer}" for peer in (TORCH, NUMPY, ONNX))

AIMS = (
    *(
        Aim(f"linear, {kept:.0%} kept, {where}, against {TORCH}'s dense product", "linear", AGAINST_TORCH, limit,
            _products(linear.sparse(kept), shapes, tokens))
        for kept, limits in KEPT_LIMITS.items()
        for limit, where, shapes, tokens in zip(
            limits, (_NEAR, _FAR), (SMALL, LARGE), ("64|512", "64|128"), strict=True
        )
    ),
    Aim(f"linear, 4-bit codes, 768x768, one token, against {TORCH}", "linear", AGAINST_TORCH, 2.0,
        _products(linear.DENSE4, "768x768", "1")),
    Aim(f"linear, 4-bit codes, 4096x4096, one token, against {TORCH}", "linear", AGAINST_TORCH, 4.0,
        _products(linear.DENSE4, LARGE, "1")),
    Aim(f"linear, 5% kept, 4096x4096, one token, against {TORCH}", "linear", AGAINST_TORCH, 5.0,
        _products(linear.sparse(0.05), LARGE, "1")),
    Aim(f"linear, any codes and batch, with a cache, against {NUMPY} with a weight decoded once", "linear",
        AGAINST_NUMPY, 0.95, _decoded_once(False)),
    Aim(f"linear, any codes and batch, nothing kept, against {NUMPY} with a weight decoded once", "linear",
        AGAINST_NUMPY, 0.95, _decoded_once(True)),
    *(Aim(f"{op}, against {TORCH}", op, AGAINST_TORCH, 1.0, _dense(False))
      for op in ("layer_norm", "rms_norm", "softmax", "gelu")),
    *(Aim(f"{op} of a sum, against {TORCH}'s two calls", op, AGAINST_TORCH, 1.5, _dense(True))
      for op in ("layer_norm", "rms_norm")),
    Aim(f"attention, 512 to 8192 tokens, heads of 32 and 64, causal and not, against {TORCH}'s fused attention",
        "attention", AGAINST_TORCH, 1.0,
        lambda row: row.provider == DENSE and re.match(r"\d+ tokens, ", row.case) is not None),
    *(Aim(f"MiniLM, dense, sentences per second against {peer}", "model", metric, 1.0, _of_model(CASE, DENSE))
      for peer, metric in ((ONNX, AGAINST_ONNX), (TORCH, AGAINST_TORCH))),
    Aim(f"MiniLM, {FAST.name}, nothing decoded kept, against the dense model", "model", f"speed_vs_{DENSE}", 2.0,
        _of_model(LEAN, f"{OURS} {FAST.name}")),
    Aim("MiniLM, compressed: share of the dense weights that a process holds beside the stored ones", "model",
        "dense_share", 0.05, _of_model(MEMORY), at_most=True),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the rows say of an aim. `value` and `where` are those of the worst case."""

    aim: Aim
    status: str
    value: float | None = None
    where: str = ""
    cases: int = 0
    meeting: int = 0


def judge(aim: Aim, rows: Iterable[Row]) -> Verdict:
    """The verdict over the last row of every case and provider."""
    last = {
        (row.case, row.provider): row
        for row in rows
        if (row.op, row.metric) == (aim.op, aim.metric) and row.provider.startswith(OURS) and aim.rows(row)
    }
    if not last:
        return Verdict(aim, NOT_MEASURED)
    sign = -1.0 if aim.at_most else 1.0
    worst = min(last.values(), key=lambda row: sign * row.p50)
    meeting = sum(sign * row.p50 >= sign * aim.limit for row in last.values())
    where = worst.case
    if len({provider for _, provider in last}) > 1:
        where += f", {worst.provider.removeprefix(OURS).strip()}"
    return Verdict(aim, MET if meeting == len(last) else MISSED, worst.p50, where, len(last), meeting)


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Of all aims, in their order."""
    held = list(rows)
    return [judge(aim, held) for aim in AIMS]
