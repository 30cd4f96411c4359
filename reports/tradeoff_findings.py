"""What quality per byte comes to, in sentences: each only when its figures were measured, losses by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .bench import Results
from .page import LIMITS, VERDICTS, fixed, verdict
from .quantizers import TOOLS
from .tradeoff import CALIBRATED, DENSE, LINEAR, PLAIN, WHOLE
from .tradeoff_points import (
    OURS,
    BasisTrial,
    Duel,
    Point,
    basis_trials,
    duels,
    least_bytes,
    measured_tools,
    of_tool,
    offered,
    peers,
    point,
    points,
    refusal,
)

CLOSE = VERDICTS[1][0]  # least mean cosine of what is very close to dense


def findings(results: Results) -> list[str]:
    """The page's first section."""
    return [
        *_smallest_file(results),
        *_fewest_bits(results),
        *_against(results, LINEAR, "In the linear layers alone"),
        *_against(results, WHOLE, "In whole files"),
        *_what_is_lost(results),
        *_what_calibration_gives(results),
        *filter(None, [basis_sentence(results)]),
        *_not_measured(results),
    ]


def _listed(words: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _mb(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value < 10e6 else f"{value / 1e6:.1f} MB"


def _recalls(found: Point, dense: Point) -> str:
    if found.recall_10 is None or dense.recall_10 is None:
        return ""
    return f", recall@10 {fixed(found.recall_10, 3)} (dense {fixed(dense.recall_10, 3)})"


def _smallest_file(results: Results) -> list[str]:
    """The smallest file that is very close to dense, ours and the others'."""
    found, dense = points(results, WHOLE), point(results, WHOLE, DENSE)
    ours = [p for p in found if p.tool == OURS and p.cosine is not None]
    if dense is None or not ours:
        return []
    said = []
    best = least_bytes(ours, CLOSE)
    if best is None:
        said.append(f"None of our files stays very close to the dense model (mean cosine {CLOSE} or more).")
    else:
        said.append(
            f"The smallest of our files with a mean cosine of {CLOSE} or more is {best.setting}: {_mb(best.bytes)} "
            f"instead of {_mb(dense.bytes)} ({dense.bytes / best.bytes:.1f} times smaller), mean cosine "
            f"{fixed(best.cosine)}{_recalls(best, dense)}."
        )
    others = [p for p in peers(found) if p.cosine is not None]
    theirs = least_bytes(others, CLOSE)
    if theirs is not None:
        than = "" if best is None else f", {_times_as_large(theirs.bytes, best.bytes)}"
        said.append(
            f"Of the other tools' files the smallest that reaches it is {theirs.provider}: {_mb(theirs.bytes)}"
            f"{than}, mean cosine {fixed(theirs.cosine)}{_recalls(theirs, dense)}."
        )
    elif others:
        said.append("None of the other tools' files reaches it.")
    return said


def _times_as_large(theirs: float, ours: float) -> str:
    if theirs >= ours:
        return f"{theirs / ours:.2f} times as large as ours"
    return f"smaller than ours ({ours / theirs:.2f} times)"


def _fewest_bits(results: Results) -> list[str]:
    """The same of the linear layers, in bits per weight."""
    found = [p for p in points(results, LINEAR) if p.bits is not None]
    ours = least_bytes([p for p in found if p.tool == OURS], CLOSE)
    theirs = least_bytes(peers(found), CLOSE)
    if ours is None and theirs is None:
        return []
    said = [
        f"{found.provider} at {found.bits:.2f} (cosine {fixed(found.cosine)})" if found is not None else words
        for found, words in ((ours, "no point of ours"), (theirs, "no other tool"))
    ]
    return [
        f"In the linear layers alone, all else dense, a mean cosine of {CLOSE} takes the fewest bits per weight with "
        f"{said[0]}; of the other tools, with {said[1]}."
    ]


def _against(results: Results, case: str, where: str) -> list[str]:
    """How many peers are beaten at their own bytes, and which are not."""
    found = duels(results, case)
    if not found:
        return []
    met = [d for d in found if d.beaten is not None]
    tools = len({d.peer.tool for d in found})
    said = []
    if met:
        nearer, beaten = [d for d in met if d.nearer], [d for d in met if d.beaten]
        asked = [d for d in met if d.finds_as_much is not None]
        finds = [d for d in asked if d.finds_as_much]
        recall = (
            f"Recall@10, measured of {len(asked)} of them, is not lower by more than noise in {len(finds)}. "
            if asked
            else "Recall was not measured there. "
        )
        said.append(
            f"{where}, {len(found)} settings of {tools} other {'tool' if tools == 1 else 'tools'} were measured; "
            f"{len(met)} of them have a calibrated point of ours of no more bytes beside them. Ours is nearer to the "
            f"dense model in {len(nearer)} of {len(met)}. {recall}So {len(beaten)} of {len(met)} are beaten."
        )
        lost = [d for d in met if not d.beaten]
        if lost:
            said.append(f"{where}, not beaten: {'; '.join(_why(d) for d in lost)}.")
        within = [d for d in beaten if d.recall is not None and d.recall < 0]
        if within:
            named = "; ".join(f"{d.peer.provider} ({_recall_words(d)})" for d in within)
            said.append(f"{where}, beaten although our recall@10 is lower, by less than noise: {named}.")
    small = [d.peer.provider for d in found if d.ours is None]
    if not of_tool(points(results, case), CALIBRATED):
        said.append(
            f"{where}, {len(small)} settings of other tools were measured, and no calibrated point of ours."
        )
    elif small:
        said.append(f"{where}, not compared, because every point of ours has more bytes: {_listed(small)}.")
    unknown = [d.peer.provider for d in found if d.ours is not None and d.beaten is None]
    if unknown:
        said.append(f"{where}, not measured well enough to say who wins: {_listed(unknown)}.")
    return said


def _recall_words(d: Duel) -> str:
    assert d.recall is not None
    assert d.noise is not None
    return f"recall@10 lower by {-d.recall:.3f}, noise {d.noise:.3f}"


def _why(d: Duel) -> str:
    """A setting that is not beaten, and by what it is not."""
    reasons = []
    if not d.nearer:
        assert d.ours is not None
        even = d.cosine == 0
        reasons.append(
            f"{'the same cosine' if even else 'its cosine is higher'}, {fixed(d.peer.cosine, 6)} against "
            f"{fixed(d.ours.cosine, 6)}"
        )
    if d.finds_as_much is False:
        reasons.append(f"our {_recall_words(d)}")
    return f"{d.peer.provider} ({'; '.join(reasons)})"


def _what_is_lost(results: Results) -> list[str]:
    """The ratios at which a file is not to be used."""
    said = []
    ours = [(provider, point(results, WHOLE, provider)) for _, provider in offered(results)]
    for level, words in (("lost", "Quality is lost"), ("gone", "Quality is gone")):
        named = [
            f"{p.setting} ({fixed(p.cosine)})"
            for _, p in ours
            if p is not None and p.cosine is not None and verdict(p.cosine).level == level
        ]
        if named:
            least, most = LIMITS[level]
            said.append(f"{words} (mean cosine {least}{most}) at {_listed(named)}.")
    for _, provider in offered(results):
        why = refusal(results, provider)
        if why is not None:
            said.append(f"No file can be made at {provider.removeprefix(OURS).strip()}: {why}.")
    return said


def _pairs(results: Results) -> list[tuple[float, Point, Point]]:
    """(ratio, calibrated, plain) where both were measured."""
    found = []
    for ratio in dict.fromkeys(ratio for ratio, _ in offered(results)):
        pair = [point(results, WHOLE, f"{kind} ratio {ratio:g}") for kind in (CALIBRATED, PLAIN)]
        if all(p is not None and p.cosine is not None for p in pair):
            found.append((ratio, *[p for p in pair if p is not None]))
    return found  # type: ignore[return-value]


def _what_calibration_gives(results: Results) -> list[str]:
    """Calibrated against plain files of the same ratio."""
    pairs = _pairs(results)
    if not pairs:
        return []
    gains = [f"{r:g} from {fixed(b.cosine)} to {fixed(a.cosine)}" for r, a, b in pairs if _gain(a, b) > 0]
    said = []
    if gains:
        said.append(f"Calibration lifts the mean cosine at ratio {_listed(gains)}.")
    losses = [f"{r:g} ({fixed(b.cosine)} to {fixed(a.cosine)})" for r, a, b in pairs if _gain(a, b) <= 0]
    if losses:
        said.append(f"Calibration does not lift it at ratio {_listed(losses)}.")
    return said


def _gain(calibrated: Point, plain: Point) -> float:
    return (calibrated.cosine or 0.0) - (plain.cosine or 0.0)


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
    seen = measured_tools(results)
    absent = [t.name for t in TOOLS if t.name not in seen]
    return [f"Not measured here: {_listed(absent)}."] if absent else []
