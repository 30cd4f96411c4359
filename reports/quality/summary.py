"""What a person reads first of quality per byte: five findings, each with its number, and where ours loses."""

from __future__ import annotations

from ..harness.measure import OURS
from ..harness.page import MOST_FINDINGS, Finding
from ..harness.rows import Results
from ..harness.text import CLOSE, cosine_rating, fixed, listed, megabytes
from .measure import DENSE, LINEAR, WHOLE
from .points import Comparison, Point, baselines, comparisons, offered, point, points, refusal, smallest

#: most baselines that are named of those that ours is not better than
WORST = 3
_WHERE = {LINEAR: "in the linear layers alone", WHOLE: "in whole files"}


def findings(results: Results) -> list[Finding]:
    """At most five, each only where its figures were measured."""
    files, dense = points(results, WHOLE), point(results, WHOLE, DENSE)
    own = smallest([p for p in files if p.tool == OURS], CLOSE)
    theirs = smallest(baselines(files), CLOSE)
    made = [
        *_file(own, dense),
        *_their_file(own, theirs),
        *_bits(results),
        *(f for case in (LINEAR, WHOLE) for f in _better(results, case)),
    ]
    return made[:MOST_FINDINGS]


def _file(own: Point | None, dense: Point | None) -> list[Finding]:
    if own is None or dense is None:
        return []
    return [
        Finding(
            f"{dense.bytes / own.bytes:.1f}× smaller",
            f"{own.setting} is our smallest file very close to the dense model: {megabytes(own.bytes, True)} instead "
            f"of {megabytes(dense.bytes, True)}, mean cosine {fixed(own.cosine_mean)}.",
        )
    ]


def _their_file(own: Point | None, theirs: Point | None) -> list[Finding]:
    if own is None or theirs is None:
        return []
    ratio = theirs.bytes / own.bytes
    return [
        Finding(
            f"{ratio:.2f}×",
            f"{theirs.provider} is the smallest file of another tool that is as close ("
            f"{megabytes(theirs.bytes, True)}, mean cosine {fixed(theirs.cosine_mean)}): {ratio:.2f} times our size.",
        )
    ]


def _bits(results: Results) -> list[Finding]:
    layers = [p for p in points(results, LINEAR) if p.bits_per_weight is not None]
    own = smallest([p for p in layers if p.tool == OURS], CLOSE)
    theirs = smallest(baselines(layers), CLOSE)
    if own is None:
        return []
    other = (
        "no other tool reaches it"
        if theirs is None
        else f"the other tools take {theirs.bits_per_weight:.2f} bits ({theirs.provider})"
    )
    return [
        Finding(
            f"{own.bits_per_weight:.2f} bits",
            f"per weight of the linear layers are enough for a mean cosine of {CLOSE} (calibrated); {other}.",
        )
    ]


def _better(results: Results, case: str) -> list[Finding]:
    known = [c for c in comparisons(results, case) if c.better is not None]
    if not known:
        return []
    tools = {c.baseline.tool for c in known}
    return [
        Finding(
            f"{sum(bool(c.better) for c in known)} of {len(known)}",
            f"settings of {listed(sorted(tools))} are worse than ours at their own bytes, {_WHERE[case]}.",
        )
    ]


# --- losses -----------------------------------------------------------------------------------------------


def losses(results: Results) -> list[Finding]:
    """Baselines that ours is not better than, ratios that lose quality, and those that cannot be made."""
    lost = []
    for case, where in _WHERE.items():
        known = [c for c in comparisons(results, case) if c.better is not None]
        not_better = sorted((c for c in known if not c.better), key=_margin)
        if not_better:
            named = "; ".join(c.baseline.provider for c in not_better[:WORST])
            more = f" and {len(not_better) - WORST} more" if len(not_better) > WORST else ""
            lost.append(
                Finding(
                    f"{len(not_better)} of {len(known)}",
                    f"settings of other tools are not worse than ours at their own bytes, {where}: {named}{more}.",
                )
            )
    files = [p for _, name in offered(results) if (p := point(results, WHOLE, name)) is not None]
    gone = [
        f"{p.setting} ({fixed(p.cosine_mean)})"
        for p in files
        if cosine_rating(p.cosine_mean).level in ("lost", "gone")
    ]
    if gone:
        lost.append(
            Finding(
                f"{len(gone)} of {len(files)} files",
                f"lose the model's quality (mean cosine): {listed(gone)}.",
            )
        )
    refused = [
        name.removeprefix(OURS).strip() for _, name in offered(results) if refusal(results, name) is not None
    ]
    if refused:
        lost.append(
            Finding(f"{len(refused)} of {len(offered(results))} files", f"cannot be made: {listed(refused)}.")
        )
    return lost


def _margin(c: Comparison) -> float:
    """Our cosine less the baseline's."""
    return c.cosine or 0.0
