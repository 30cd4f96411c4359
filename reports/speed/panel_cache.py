"""The cache of decoded panels, from none to one with room for every decoded weight: hit rate, time, bytes.

hit rate of a pass = panels that fit / panels that are looked up          (nothing is evicted)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import rbe_gpu as rbe
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.container import load_file

from ..harness.baselines import F32
from ..harness.inputs import Inputs
from ..harness.measure import OURS
from ..harness.row_names import DENSE
from ..harness.rows import Results, Row, Session
from ..harness.text import megabytes, percent, seconds
from ..harness.timing import paired_times

OP = "panel_cache"
HIT_RATE, HELD = "hit_rate", "panel_bytes"
#: budgets as shares of the bytes of all decoded weights
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
QUICK_SHARES = (0.0, 0.5, 1.0)
TOKENS = 64
#: cases without a budget: the decoded weights, and the algorithm that is chosen where there is no cache
DECODED, NO_CACHE = "decoded weights", "no cache, chosen algorithm"


def case(share: float) -> str:
    """The case of a budget."""
    return f"cache of {100 * share:g}% of the dense bytes"


def measure(
    file: Path, setting: str, inputs: Inputs, session: Session, batch_seconds: float, least: int, quick: bool
) -> Iterator[Row]:
    """Rows of a pass through every linear weight of a model, one after the other as in the model, by budget.

    file : compressed model; `setting` is the name of its setting
    """
    tensors, _ = load_file(file)
    parts = (
        *(f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")),
        *("intermediate.dense", "output.dense"),
    )
    names = (
        f"encoder.layer.{i}.{part}.weight"
        for i in range(inputs.folder.config["num_hidden_layers"])
        for part in parts
    )
    weights = [m for name in names if isinstance(m := tensors[name], RBEBlocks)]
    x = {rows.shape[1]: rows for rows in (inputs.rows("1.x", TOKENS), inputs.rows("1.middle", TOKENS))}
    out = {m.shape[0]: np.empty((TOKENS, m.shape[0]), np.float32) for m in weights}
    workspace = rbe.Workspace()

    def run(matrices: list[Any], **options: Any) -> None:
        for m in matrices:
            rows, cols = m.shape
            rbe.linear(x[cols], m, out=out[rows], workspace=workspace, **options)

    dense: list[F32] = [m.decode() for m in weights]
    total = sum(d.nbytes for d in dense)
    caches = {share: rbe.PanelCache(round(share * total)) for share in (QUICK_SHARES if quick else SHARES)}
    calls: dict[str, list[Callable[[], None]]] = {
        DECODED: [partial(run, dense)],
        NO_CACHE: [partial(run, weights)],
        **{case(s): [partial(run, weights, method="cache", cache=c)] for s, c in caches.items()},
    }
    measured = paired_times(calls, seconds=batch_seconds, least=least)
    shape = f"{len(weights)} weights, {TOKENS} tokens, {total} B decoded"
    for label, times in measured.items():
        provider = DENSE if label == DECODED else f"{OURS} {setting}"
        yield session.row(OP, label, provider, "time", "s", times, shape=shape)
    for share, cache in caches.items():
        hits, misses = cache.hits, cache.misses
        run(weights, method="cache", cache=cache)
        hits, misses = cache.hits - hits, cache.misses - misses
        for metric, unit, value in ((HIT_RATE, "", hits / (hits + misses)), (HELD, "B", float(cache.nbytes))):
            yield session.row(OP, case(share), f"{OURS} {setting}", metric, unit, value, shape=shape)


def budgets(results: Results) -> list[tuple[float, Row, Row, Row]]:
    """(share of the dense bytes, rows of the time, the hit rate and the bytes held), by share."""
    rows = {(r.case, r.metric): r for r in results.rows if r.op == OP and r.case not in (DECODED, NO_CACHE)}
    made = []
    for label in dict.fromkeys(label for label, _ in rows):
        time, rate, held = (rows.get((label, metric)) for metric in ("time", HIT_RATE, HELD))
        if time is not None and rate is not None and held is not None:
            made.append((float(label.split()[2].rstrip("%")) / 100, time, rate, held))
    return sorted(made, key=lambda entry: entry[0])


def sentence(results: Results) -> str | None:
    """What the sweep says; None without rows of it."""
    swept = budgets(results)
    if len(swept) < 2:
        return None
    (_, none, _, _), (_, full, rate, held) = swept[0], swept[-1]
    others = {r.case: r for r in results.rows if (r.op, r.metric) == (OP, "time")}
    compared = [
        f"{words} {seconds(others[label].p50)}"
        for label, words in (
            (DECODED, "with the decoded weights themselves"),
            (NO_CACHE, "with the algorithm chosen without a cache"),
        )
        if label in others
    ]
    name = none.provider.removeprefix(OURS).strip()
    return (
        f"A pass through {none.shape.split(',', 1)[0]} of {name} ({TOKENS} tokens) takes "
        f"{seconds(none.p50)} where every panel is decoded again, {seconds(full.p50)} with a cache of "
        f"{megabytes(held.p50)}, where {percent(rate.p50)} of the lookups hit"
        + (f"; {', '.join(compared)}." if compared else ".")
    )
