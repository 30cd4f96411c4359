"""Learning rate and size of the file over a run. `done` is the part of the steps or minutes that is over, 0 to 1."""

from __future__ import annotations

import math

_WARM_UP = 30  # steps: Adam's second moments are of few gradients before
#: The size falls between these parts of a run; from then on it is constant, and the learning rate falls
_FALLS = (0.05, 0.5)
#: largest change of the step at once. Bits fall by 0.04 for 3%, which some ten steps of training make good
_COARSEST = 1.03
_SLACK = 0.998  # of the size is used: what is written is not just the estimate


def learning_rate(step: int, done: float, falling: bool) -> float:
    """Factor of the learning rates: a warm-up, constant while the size falls, then a cosine to zero."""
    start = _FALLS[1] if falling else 0.1
    decay = 1.0 if done < start else 0.5 * (1 + math.cos(math.pi * min(1.0, (done - start) / (1 - start))))
    return min(1.0, (step + 1) / _WARM_UP) * decay


def target_bytes(done: float, start: float, end: float) -> float:
    """The size that a file should have by now.

    It falls fast at first, where bits cost little, and slowly near the end, where each costs more.
    """
    first, last = _FALLS
    left = 1 - min(1.0, max(0.0, (done - first) / (last - first)))
    return _SLACK * (end + max(0.0, start - end) * left**2)


def step_factor(bits: float, target_bits: float) -> float:
    """What to multiply all steps by: a doubled step saves a bit of each integer, or less where most are zero.

    1 where bits are within the target. Steps are not made finer to use bits that are left: another step rounds every
    integer anew, and what error feedback and training have put into their roundings is lost.
    """
    return min(_COARSEST, max(1.0, math.pow(2.0, bits - target_bits)))
