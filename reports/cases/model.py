"""A whole encoder: 32 texts in, 32 sentence vectors out, tokenizer included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .. import text
from ..bench import Row, Session, paired_times, speeds
from ..inputs import Inputs
from ..peers import F32, NumpyBert, TorchBert, torch_or_none
from ..quality import vector_rows
from . import DENSE, NUMPY, TORCH, relative_error

BATCH = 32
#: two float32 implementations of six layers, sums in another order
TOLERANCE = 1e-4
CASE = f"{BATCH} texts"
#: the same with models that keep no decoded weight between batches
LEAN = f"{CASE}, nothing kept"


def batch(inputs: Inputs, texts: list[str]) -> list[str]:
    """The middle 32 of `texts` by length: batched as sentence-transformers does, with little padding."""
    order = sorted(texts, key=lambda t: len(inputs.folder.tokenizer.encode(t).ids))
    start = max(0, (len(order) - BATCH) // 2)
    return order[start : start + BATCH]


def peers(inputs: Inputs) -> dict[str, NumpyBert | TorchBert]:
    """The encoders that rbe_gpu is compared with."""
    found: dict[str, NumpyBert | TorchBert] = {NUMPY: inputs.numpy}
    torch = torch_or_none()
    if torch is not None:
        found[TORCH] = TorchBert(inputs.folder, torch)
    return found


def check(dense: Any, others: Mapping[str, Any], texts: list[str], session: Session) -> Iterator[Row]:
    """The dense encoder's vectors against those of the peers, before anything is timed.

    Raises
    ------
    RuntimeError : they differ by more than `TOLERANCE`
    """
    ours = dense.embed(texts)
    for name, model in others.items():
        theirs = model.embed(texts)
        error = relative_error(ours, theirs)
        if not error <= TOLERANCE:
            raise RuntimeError(f"the dense encoder is off {name}'s by {error:.2g} (allowed {TOLERANCE})")
        yield session.row("model", "dense", name, "relative_error", "", error, shape=f"{len(texts)} texts")
        yield from vector_rows(ours, theirs, "dense", session, name)


def times(
    inputs: Inputs,
    case: str,
    models: Mapping[str, Any],
    session: Session,
    seconds: float,
    least: int,
    on_round: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Time per batch of every model in turn, and the memory that ours hold for weights and decoded panels.

    models : provider -> object with `embed(texts)`
    """
    texts = batch(inputs, text.held_out(512))
    tokens = int(inputs.folder.batch(texts)[1].sum())
    shape = f"{tokens} tokens"
    rivals: dict[str, Callable[[], F32]] = {
        name: (lambda m=m: np.asarray(m.embed(texts)))  # type: ignore[misc]
        for name, m in models.items()
    }
    # no warm-up: every model has embedded texts before
    seen = paired_times(rivals, seconds=seconds, least=least, warm_up=0, on_round=on_round)
    for name, measured in seen.items():
        yield session.row("model", case, name, "time", "s", measured, shape=shape)
    for peer in (DENSE, TORCH, NUMPY):
        if peer in seen:
            for name, ratio in speeds(seen, peer).items():
                if name != peer and name not in (TORCH, NUMPY):
                    yield session.row("model", case, name, f"speed_vs_{peer}", "x", ratio, shape=shape)
    for name, model in models.items():
        if hasattr(model, "cache"):
            held = float(model.nbytes + model.cache.nbytes)
            yield session.row("model", case, name, "weights_held", "B", held, shape=shape)
