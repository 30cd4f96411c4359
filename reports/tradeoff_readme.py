"""The README's tables of quality per byte, made from rows: between two marks, in the README's language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .bench import Results, Row
from .page import MISSING, VERDICTS, fixed, megabytes, percent, times, verdict
from .readme import Block, head, line
from .tradeoff import CALIBRATED, DENSE, LINEAR, WHOLE
from .tradeoff_points import (
    OURS,
    Point,
    measured_tools,
    of_tool,
    offered,
    peers,
    point,
    points,
    refusal,
    texts_of,
)

BLOCK = Block("quality", "python -m rbe_gpu.reports.tradeoff_page ROWS.csv --readme {readme}")
NEAR = (3.5, 4.75)  # bits per weight of a setting "near 4 bits"
NOT_POSSIBLE = "cannot be made"


Words = Mapping[str, str]
ENGLISH: Words = {
    "cost": "| | on disk | times smaller | in memory | mean cosine | 1st percentile | top-10 overlap | recall@1 "
    "| recall@10 | |",
    "near": "Linear layers alone, all else dense: every tool's best setting of {low:g} to {high:g} bits per weight.",
    "near_head": "| | bits per weight | mean cosine | 1st percentile | top-10 overlap | its whole file |",
    "source": "{texts}. Rows: [{name}](reports/results/{name}).",
    "dense": "dense float32",
    "calibrated": "calibrated, ratio {ratio:g}",
    "plain": "plain, ratio {ratio:g}",
    "ours": "rbe_gpu calibrated",
    "absent": "no setting of {tool} lies there",
    MISSING: MISSING,
}  # fmt: skip
KOREAN: Words = {
    "cost": "| | 디스크 | 배율 | 메모리 | 코사인 평균 | 코사인 하위 1% | 가까운 글 10개 일치 | recall@1 "
    "| recall@10 | |",
    "near": "linear 층만 양자화하고 나머지는 그대로: 도구마다 가중치당 {low:g}~{high:g}비트에서 가장 좋은 설정.",
    "near_head": "| | 가중치당 비트 | 코사인 평균 | 코사인 하위 1% | 가까운 글 10개 일치 | 파일 전체 |",
    "source": "{texts}. 측정값: [{name}](reports/results/{name}).",
    "dense": "원래 모델 float32",
    "calibrated": "보정, ratio {ratio:g}",
    "plain": "보정 없이, ratio {ratio:g}",
    "ours": "rbe_gpu 보정",
    "absent": "{tool}: 이 범위의 설정 없음",
    MISSING: "측정하지 않음",
    NOT_POSSIBLE: "만들 수 없음",
    VERDICTS[0][1].words: "원래와 같음",
    VERDICTS[1][1].words: "원래와 매우 가까움",
    VERDICTS[2][1].words: "작은 차이",
    VERDICTS[3][1].words: "눈에 띄는 손실, 쓸 곳에서 시험할 것",
    VERDICTS[4][1].words: "품질을 잃음, 쓰지 말 것",
    "quality is gone; unusable": "품질이 사라짐, 쓸 수 없음",
}


def language(readme: Path) -> Words:
    """The words of a README, by its name: README.ko.md is Korean."""
    return KOREAN if readme.name.endswith(".ko.md") else ENGLISH


def tables(rows: Iterable[Row], name: str, words: Words = ENGLISH) -> str:
    """The Markdown between the marks.

    name : of the rows file
    """
    results = Results(rows)
    texts = texts_of(results.rows) or words[MISSING]
    return "\n\n".join(
        (
            "\n".join(_costs(results, words)),
            words["near"].format(low=NEAR[0], high=NEAR[1]),
            "\n".join(_near(results, words)),
            words["source"].format(texts=texts, name=name),
        )
    )


def _row(cells: Iterable[str], words: Words) -> str:
    return line(words.get(c, c).replace("|", "\\|") for c in cells)


def _costs(results: Results, words: Words) -> list[str]:
    """What a ratio costs: dense, and our files."""
    dense = point(results, WHOLE, DENSE)
    lines = [*head(words["cost"]), _cost(words["dense"], dense, dense, words)]
    for ratio, provider in offered(results):
        kind = "calibrated" if provider.startswith(CALIBRATED) else "plain"
        name = words[kind].format(ratio=ratio)
        if refusal(results, provider) is not None:
            lines.append(_row([name, *[""] * 8, NOT_POSSIBLE], words))
            continue
        lines.append(_cost(name, point(results, WHOLE, provider), dense, words))
    return lines


def _cost(name: str, found: Point | None, dense: Point | None, words: Words) -> str:
    if found is None:
        return _row([name, *[MISSING] * 8, ""], words)
    itself = found is dense
    return _row(
        (
            name, _mb(found.bytes), "1" if itself else times(dense.bytes / found.bytes if dense else None),
            megabytes(found.resident), fixed(found.cosine), fixed(found.p1, 3), percent(found.overlap),
            fixed(found.recall_1, 3), fixed(found.recall_10, 3), "" if itself else verdict(found.cosine).words,
        ),
        words,
    )  # fmt: skip


def _mb(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value < 10e6 else megabytes(value)


def best_near(found: Sequence[Point], low: float = NEAR[0], high: float = NEAR[1]) -> Point | None:
    """The point of the highest cosine among those of so many bits per weight."""
    near = [p for p in found if p.bits is not None and low <= p.bits <= high and p.cosine is not None]
    return max(near, key=lambda p: p.cosine or 0.0, default=None)


def _near(results: Results, words: Words) -> list[str]:
    """Every tool's best setting near 4 bits; ours first, then by cosine, and tools without one last."""
    found = points(results, LINEAR)
    best = {tool: best_near([p for p in peers(found) if p.tool == tool]) for tool in measured_tools(results)}
    there = sorted((p for p in best.values() if p is not None), key=lambda p: -(p.cosine or 0.0))
    ours = best_near(of_tool(found, CALIBRATED))
    lines = head(words["near_head"])
    lines += [_setting(words["ours"], ours, results, words)]
    lines += [_setting(p.provider, p, results, words) for p in there]
    lines += [_row([words["absent"].format(tool=t), *[""] * 5], words) for t, p in best.items() if p is None]
    return lines


def _setting(name: str, found: Point | None, results: Results, words: Words) -> str:
    if found is None:
        return _row([name, *[MISSING] * 4, ""], words)
    # our points of the linear layers alone have no file
    whole = point(results, WHOLE, found.provider) if found.tool != OURS else None
    return _row(
        (
            name, f"{found.bits:.2f}", fixed(found.cosine), fixed(found.p1, 3), percent(found.overlap),
            "" if whole is None else _mb(whole.bytes),
        ),
        words,
    )  # fmt: skip


def update(readme: Path, rows: Iterable[Row], source: Path) -> bool:
    """Make a README's tables anew. Returns whether that changed it.

    Raises
    ------
    ValueError : it has no marks
    """
    return BLOCK.update(readme, tables(rows, source.name, language(readme)))
