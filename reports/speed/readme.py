"""The README's tables of speed, generated from the rows of a report."""

from __future__ import annotations

from collections.abc import Iterator

from ..harness import row_names
from ..harness.measure import OURS
from ..harness.readme import Block, Words, head, line
from ..harness.rows import Results
from ..harness.text import MISSING
from .cases import DENSE, TORCH
from .cases.model import BASELINES
from .compression import FAST

SHAPES = tuple(
    f"{shape}, {tokens}"
    for shape, counts in (
        ("768x768", ("1 token", "64 tokens", "512 tokens")),
        ("3072x768", ("64 tokens", "512 tokens")),
        ("4096x4096", ("1 token", "64 tokens", "128 tokens")),
    )
    for tokens in counts
)
FORMS = (*(row_names.sparse(density) for density in row_names.DENSITIES), row_names.DENSE4, DENSE)
GRADES = tuple(f"grade {letter}" for letter in "SABC")
#: metric of a grade -> format of its value
_COLUMNS = {
    "file_bytes": lambda v: f"{v / 1e6:.1f} MB",
    "bits_per_weight": lambda v: f"{v:.2f}",
    "weight_error": lambda v: f"{v:.2g}",
    "cosine_mean": lambda v: f"{v:.4f}",
    "cosine_min": lambda v: f"{v:.3f}",
}
ENGLISH: Words = {
    "matmuls": "| speed, PyTorch's dense matmul = 1 | density 5% | 12% | 25% | 50% | 4-bit codes "
    "| dense |",
    "encoder": "Sentences per second, 32 texts, tokenizer included: {values}. Measured separately, {fast} without "
    "decoded weights: {ratio} of dense.",
    "grades": "| | file | bits/weight | weight error | mean cosine | lowest cosine | 32 texts | with decoded "
    "weights cached |",
    "source": "{device}; {threads} threads. Rows: [{name}](reports/results/{name}).",
}  # fmt: skip
KOREAN: Words = {
    "matmuls": "| 속도(PyTorch 밀집 행렬곱 = 1) | 밀도 5% | 12% | 25% | 50% | 4비트 코드 | 밀집 |",
    "encoder": "초당 문장 수, 글 32개, 토크나이저 포함: {values}. 디코딩한 가중치 없이 따로 잰 "
    "{fast}: 밀집 모델의 {ratio}.",
    "grades": "| | 파일 | 비트/가중치 | 가중치 오차 | 코사인 평균 | 코사인 최소 | 글 32개 | 디코딩한 "
    "가중치를 보관하면 |",
    "source": "{device}, 스레드 {threads}개. 측정값: [{name}](reports/results/{name}).",
}  # fmt: skip


def _tables(results: Results, source: str, words: Words) -> Iterator[str]:
    first = results.rows[0]
    yield "\n".join(_matmuls(results, words))
    yield words["encoder"].format(values=_sentences(results), fast=row_names.FAST, ratio=_fast(results))
    yield "\n".join(_grades(results, words))
    yield words["source"].format(device=first.device, threads=first.threads, name=source)


BLOCK = Block("speed", _tables, ENGLISH, KOREAN)


def _matmuls(results: Results, words: Words) -> list[str]:
    lines = head(words["matmuls"])
    for case in SHAPES:
        speeds = [results.value("linear", case, form, f"speed_vs_{TORCH}") for form in FORMS]
        lines.append(line([case, *(MISSING if v is None else f"{v:.2f}×" for v in speeds)]))
    return lines


def _sentences(results: Results) -> str:
    """Sentences per second of all models of one run, the fastest last."""
    rates = {
        provider: rate
        for provider in (*BASELINES, DENSE, f"{OURS} {FAST.name}")
        if (rate := results.value("model", row_names.MODEL, provider, "sentences_per_second")) is not None
    }
    return ", ".join(
        f"{provider} {rates[provider]:.0f}" for provider in sorted(rates, key=lambda p: rates[p])
    )


def _fast(results: Results) -> str:
    value = results.value("model", row_names.MODEL_LEAN, f"{OURS} {FAST.name}", f"speed_vs_{DENSE}")
    return MISSING if value is None else f"{value:.2f}×"


def _grades(results: Results, words: Words) -> list[str]:
    def milliseconds(case: str, provider: str) -> str:
        value = results.value("model", case, provider, "time")
        return MISSING if value is None else f"{1e3 * value:.0f} ms"

    lines = head(words["grades"])
    size = _COLUMNS["file_bytes"](results.value("model", "dense", OURS, "file_bytes") or 0.0)
    dense = [
        milliseconds(case, DENSE) for case in (row_names.MODEL_LEAN, row_names.MODEL)
    ]  # each in the rounds of its column
    lines.append(line(["dense float32", size, "32", "0", "1", "1", *dense]))
    for grade in GRADES:
        values = {metric: results.value("model", grade, OURS, metric) for metric in _COLUMNS}
        cells = [MISSING if v is None else _COLUMNS[metric](v) for metric, v in values.items()]
        lines.append(
            line(
                [
                    grade,
                    *cells,
                    *(
                        milliseconds(case, f"{OURS} {grade}")
                        for case in (row_names.MODEL_LEAN, row_names.MODEL)
                    ),
                ]
            )
        )
    return lines
