"""The results of quality per byte in sentences: each only where its figures were measured, losses named too."""

from __future__ import annotations

from collections.abc import Sequence

from ..harness.measure import OURS
from ..harness.rows import Results
from ..harness.text import CLOSE, LOSSES, cosine_rating, fixed, listed, megabytes
from .measure import CALIBRATED, DENSE, LINEAR, PLAIN, WHOLE
from .points import (
    BasisTrial,
    Comparison,
    Point,
    baselines,
    basis_trials,
    comparisons,
    measured_tools,
    offered,
    ours,
    point,
    points,
    refusal,
    smallest,
)
from .quantizers import TOOLS


def findings(results: Results) -> list[str]:
    """The page's first section."""
    return [
        *_smallest_file(results),
        *_fewest_bits(results),
        *_against(results, LINEAR, "In the linear layers alone"),
        *_against(results, WHOLE, "In whole files"),
        *_losses(results),
        *_calibration(results),
        *filter(None, [basis_sentence(results)]),
        *_not_measured(results),
    ]


def _quality(p: Point, dense: Point) -> str:
    """Cosine and recall of a file."""
    words = f"mean cosine {fixed(p.cosine_mean)}"
    if p.recall_at_10 is None or dense.recall_at_10 is None:
        return words
    return f"{words}, recall@10 {fixed(p.recall_at_10, 3)} (dense {fixed(dense.recall_at_10, 3)})"


def _smallest_file(results: Results) -> list[str]:
    """The smallest file that is very close to dense, ours and the others'."""
    files, dense = (
        [p for p in points(results, WHOLE) if p.cosine_mean is not None],
        point(results, WHOLE, DENSE),
    )
    own = [p for p in files if p.tool == OURS]
    if dense is None or not own:
        return []
    best = smallest(own, CLOSE)
    if best is None:
        sentences = [f"None of our files stays very close to the dense model (mean cosine {CLOSE} or more)."]
    else:
        sentences = [
            f"The smallest of our files with a mean cosine of {CLOSE} or more is {best.setting}: "
            f"{megabytes(best.bytes, True)} instead of {megabytes(dense.bytes, True)} "
            f"({dense.bytes / best.bytes:.1f} times smaller), {_quality(best, dense)}."
        ]
    others = baselines(files)
    theirs = smallest(others, CLOSE)
    if theirs is not None:
        than = "" if best is None else f", {_size_to_ours(theirs.bytes / best.bytes)}"
        sentences.append(
            f"Of the other tools' files the smallest that reaches it is {theirs.provider}: "
            f"{megabytes(theirs.bytes, True)}{than}, {_quality(theirs, dense)}."
        )
    elif others:
        sentences.append("None of the other tools' files reaches it.")
    return sentences


def _size_to_ours(ratio: float) -> str:
    return (
        f"{ratio:.2f} times as large as ours" if ratio >= 1 else f"smaller than ours ({1 / ratio:.2f} times)"
    )


def _fewest_bits(results: Results) -> list[str]:
    """The same of the linear layers, in bits per weight."""
    layers = [p for p in points(results, LINEAR) if p.bits_per_weight is not None]
    pair = smallest([p for p in layers if p.tool == OURS], CLOSE), smallest(baselines(layers), CLOSE)
    if pair == (None, None):
        return []
    own, theirs = (
        words if p is None else f"{p.provider} at {p.bits_per_weight:.2f} (cosine {fixed(p.cosine_mean)})"
        for p, words in zip(pair, ("no point of ours", "no other tool"), strict=True)
    )
    return [
        f"In the linear layers alone, all else dense, a mean cosine of {CLOSE} takes the fewest bits per weight with "
        f"{own}; of the other tools, with {theirs}."
    ]


def _against(results: Results, case: str, where: str) -> list[str]:
    """How many baselines ours is better than at their own bytes, and which not."""
    every = comparisons(results, case)
    if not every:
        return []
    known = [c for c in every if c.better is not None]
    tools = len({c.baseline.tool for c in every})
    sentences = []
    if known:
        better, n = [c for c in known if c.better], len(known)
        recalls = [c for c in known if c.recall_holds is not None]
        recall = (
            f"Recall@10, measured for {len(recalls)} of them, is not lower by more than noise in "
            f"{sum(bool(c.recall_holds) for c in recalls)}. "
            if recalls
            else "Recall was not measured there. "
        )
        sentences.append(
            f"{where}, {len(every)} settings of {tools} other {'tool' if tools == 1 else 'tools'} were measured; "
            f"{n} of them have a calibrated point of ours of no more bytes to compare with. Ours is closer to the "
            f"dense model in {sum(bool(c.closer) for c in known)} of {n}. {recall}So ours is better than "
            f"{len(better)} of {n}."
        )
        losses = [c for c in known if not c.better]
        if losses:
            sentences.append(f"{where}, ours is not better than: {'; '.join(map(_why, losses))}.")
        within = [c for c in better if c.recall is not None and c.recall < 0]
        if within:
            names = "; ".join(f"{c.baseline.provider} ({_lower_recall(c)})" for c in within)
            sentences.append(
                f"{where}, ours is better although its recall@10 is lower, by less than noise: {names}."
            )
    small = [c.baseline.provider for c in every if c.ours is None]
    if not ours(points(results, case), CALIBRATED):
        sentences.append(
            f"{where}, {len(small)} settings of other tools were measured, and no calibrated point of ours."
        )
    elif small:
        sentences.append(
            f"{where}, not compared, because every point of ours has more bytes: {listed(small)}."
        )
    unknown = [c.baseline.provider for c in every if c.ours is not None and c.better is None]
    if unknown:
        sentences.append(f"{where}, not measured well enough to tell which is better: {listed(unknown)}.")
    return sentences


def _lower_recall(c: Comparison) -> str:
    return f"recall@10 lower by {-(c.recall or 0):.3f}, noise {c.noise:.3f}"


def _why(c: Comparison) -> str:
    """A baseline that ours is not better than, and in what."""
    reasons = []
    if not c.closer and c.ours is not None:
        reasons.append(
            f"{'the same cosine' if c.cosine == 0 else 'its cosine is higher'}, {fixed(c.baseline.cosine_mean, 6)} "
            f"against {fixed(c.ours.cosine_mean, 6)}"
        )
    if c.recall_holds is False:
        reasons.append(f"our {_lower_recall(c)}")
    return f"{c.baseline.provider} ({'; '.join(reasons)})"


def _losses(results: Results) -> list[str]:
    """The ratios at which a file is not to be used."""
    files = [p for _, provider in offered(results) if (p := point(results, WHOLE, provider)) is not None]
    sentences = []
    for level, words in (("lost", "Quality is lost"), ("gone", "Quality is gone")):
        names = [
            f"{p.setting} ({fixed(p.cosine_mean)})"
            for p in files
            if cosine_rating(p.cosine_mean).level == level
        ]
        if names:
            sentences.append(f"{words} (mean cosine {LOSSES[level]}) at {listed(names)}.")
    for _, provider in offered(results):
        why = refusal(results, provider)
        if why is not None:
            sentences.append(f"No file can be made at {provider.removeprefix(OURS).strip()}: {why}.")
    return sentences


def _calibration(results: Results) -> list[str]:
    """Calibrated against plain files of the same ratio."""
    gains, losses = [], []
    for ratio in dict.fromkeys(ratio for ratio, _ in offered(results)):
        calibrated, plain = (
            results.value("quality", WHOLE, f"{prefix} ratio {ratio:g}", "cosine_mean")
            for prefix in (CALIBRATED, PLAIN)
        )
        if calibrated is None or plain is None:
            continue
        if calibrated > plain:
            gains.append(f"{ratio:g} from {fixed(plain)} to {fixed(calibrated)}")
        else:
            losses.append(f"{ratio:g} ({fixed(plain)} to {fixed(calibrated)})")
    sentences = []
    if gains:
        sentences.append(f"Calibration raises the mean cosine at ratio {listed(gains)}.")
    if losses:
        sentences.append(f"Calibration does not raise it at ratio {listed(losses)}.")
    return sentences


def basis_sentence(results: Results) -> str:
    """Where basis parameters pay for their bytes and where not; "" where it was not measured."""
    known = [t for t in basis_trials(results) if t.pays is not None]
    if not known:
        return ""
    pays, not_pays = [t for t in known if t.pays], [t for t in known if not t.pays]
    what = "Basis parameters, at equal bytes and without calibration,"
    if not pays:
        worst = max(t.change or 0.0 for t in known)
        return (
            f"{what} pay nowhere: in all {len(known)} pairs of weights and transform the weight error is no lower "
            f"with them than without, and up to {100 * worst:.2f}% higher."
        )
    if not not_pays:
        return f"{what} lower the weight error in all {len(known)} pairs tried: {_changes(pays)}."
    return (
        f"{what} lower the weight error in {len(pays)} of {len(known)} pairs of weights and transform: "
        f"{_changes(pays)}. They do not pay in {_changes(not_pays)}."
    )


def _changes(trials: Sequence[BasisTrial]) -> str:
    """By group: transforms and what the basis changes."""
    groups: dict[str, list[str]] = {}
    for t in trials:
        groups.setdefault(t.group, []).append(f"{t.transform} {100 * (t.change or 0):+.2f}%")
    return "; ".join(f"{group} ({', '.join(changes)})" for group, changes in groups.items())


def _not_measured(results: Results) -> list[str]:
    """Tools that have no rows."""
    absent = [t.name for t in TOOLS if t.name not in measured_tools(results)]
    return [f"Not measured here: {listed(absent)}."] if absent else []
