"""The README's tables of quality per byte, generated from rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..harness.measure import OURS
from ..harness.readme import Block, Words, head, line
from ..harness.rows import Results
from ..harness.text import GONE, MISSING, RATINGS, cosine_rating, fixed, megabytes, percent, times
from .measure import CALIBRATED, DENSE, LINEAR, WHOLE
from .page import NOT_POSSIBLE
from .points import Point, baselines, measured_tools, offered, ours, point, points, refusal, texts_of

NEAR = (3.5, 4.75)  # bits per weight of a setting "near 4 bits"
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
    NOT_POSSIBLE.words: "만들 수 없음",
    RATINGS[0][1].words: "원래와 같음",
    RATINGS[1][1].words: "원래와 매우 가까움",
    RATINGS[2][1].words: "작은 차이",
    RATINGS[3][1].words: "눈에 띄는 손실, 쓸 곳에서 시험할 것",
    RATINGS[4][1].words: "품질을 잃음, 쓰지 말 것",
    GONE.words: "품질이 사라짐, 쓸 수 없음",
}


def _tables(results: Results, source: str, words: Words) -> Iterator[str]:
    yield "\n".join(_costs(results, words))
    yield words["near"].format(low=NEAR[0], high=NEAR[1])
    yield "\n".join(_near(results, words))
    yield words["source"].format(texts=texts_of(results.rows) or words[MISSING], name=source)


BLOCK = Block("quality", _tables, ENGLISH, KOREAN)


def _row(cells: Iterable[str], words: Words) -> str:
    return line(words.get(c, c).replace("|", "\\|") for c in cells)


def _costs(results: Results, words: Words) -> list[str]:
    """What a ratio costs: dense, and our files."""
    dense = point(results, WHOLE, DENSE)
    lines = [*head(words["cost"]), _cost(words["dense"], dense, dense, words)]
    for ratio, provider in offered(results):
        name = words["calibrated" if provider.startswith(CALIBRATED) else "plain"].format(ratio=ratio)
        if refusal(results, provider) is not None:
            lines.append(_row([name, *[""] * 8, NOT_POSSIBLE.words], words))
        else:
            lines.append(_cost(name, point(results, WHOLE, provider), dense, words))
    return lines


def _cost(name: str, p: Point | None, dense: Point | None, words: Words) -> str:
    if p is None:
        return _row([name, *[MISSING] * 8, ""], words)
    itself = p is dense
    return _row(
        (
            name, megabytes(p.bytes, True), "1" if itself else times(dense.bytes / p.bytes if dense else None),
            megabytes(p.resident_bytes), fixed(p.cosine_mean), fixed(p.cosine_p1, 3), percent(p.overlap_at_10),
            fixed(p.recall_at_1, 3), fixed(p.recall_at_10, 3), "" if itself else cosine_rating(p.cosine_mean).words,
        ),
        words,
    )  # fmt: skip


def best_near(points: Sequence[Point], low: float = NEAR[0], high: float = NEAR[1]) -> Point | None:
    """The point of the highest cosine among those of so many bits per weight."""
    near = [p for p in points if p.bits_per_weight is not None and low <= p.bits_per_weight <= high]
    return max(
        (p for p in near if p.cosine_mean is not None), key=lambda p: p.cosine_mean or 0.0, default=None
    )


def _near(results: Results, words: Words) -> list[str]:
    """Every tool's best setting near 4 bits; ours first, then by cosine, and tools without one last."""
    layers = points(results, LINEAR)
    best = {t: best_near([p for p in baselines(layers) if p.tool == t]) for t in measured_tools(results)}
    there = sorted((p for p in best.values() if p is not None), key=lambda p: -(p.cosine_mean or 0.0))
    lines = head(words["near_head"])
    lines += [_setting(words["ours"], best_near(ours(layers, CALIBRATED)), results, words)]
    lines += [_setting(p.provider, p, results, words) for p in there]
    lines += [_row([words["absent"].format(tool=t), *[""] * 5], words) for t, p in best.items() if p is None]
    return lines


def _setting(name: str, p: Point | None, results: Results, words: Words) -> str:
    if p is None:
        return _row([name, *[MISSING] * 4, ""], words)
    # our points of the linear layers alone have no file
    whole = point(results, WHOLE, p.provider) if p.tool != OURS else None
    return _row(
        (
            name, f"{p.bits_per_weight:.2f}", fixed(p.cosine_mean), fixed(p.cosine_p1, 3), percent(p.overlap_at_10),
            "" if whole is None else megabytes(whole.bytes, True),
        ),
        words,
    )  # fmt: skip
