"""The training loop: size and learning rate by schedule, evaluations, checkpoints, and the best state so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from . import checkpoint, interrupts, schedule
from .measures import Measure
from .rate import Rate
from .trainer import Snapshot, Trainer

_EVALUATE_EVERY = 100  # steps
_STEER_EVERY = 10  # steps between two looks at the size, 60 ms each
_CHECKPOINT_SECONDS = 300.0
#: Evaluations without a better one, after which training ends. They count from when the learning rate has fallen to
#: half of its height: at its height a good state to start from gets worse at first, and what follows makes up for it
_PATIENCE = 15
_PATIENT_BELOW = 0.5
_SMOOTHING = 0.95
#: what a checkpoint has of a `Loop`, beside the curve: numbers, and measures
_KEPT = ("index", "elapsed", "loss", "since_best")
_MEASURES = ("training", "held_out", "best_measure", "late_best")
_FITS = 1.0005  # an estimated size may exceed the target by this; what is written may not


class TrainingStatus(NamedTuple):
    """What a progress callback gets after every step.

    Attributes
    ----------
    step : steps done
    loss, training : loss and measure of the training batches, smoothed: of a model that makes vectors the mean
        `Cosine` to the dense model's, of one that predicts tokens the `Divergence`
    held_out : measure on held-out texts, when they were measured last
    best : the best of those of states that fit the target size; None before there is one
    bits : per integer, estimated
    file_bytes : estimated
    done : part of the run, 0 to 1
    seconds_left : estimated
    """

    step: int
    loss: float
    training: Measure
    held_out: Measure
    best: Measure | None
    bits: float
    file_bytes: float
    done: float
    seconds_left: float


class Loop:
    """A run of a trainer.

    Parameters
    ----------
    start_bytes, target_bytes : size of the file at the start, and at most at the end
    steps, minutes : length of the run; one is None
    path : of the checkpoint
    identity : what the checkpoint is of
    """

    def __init__(
        self,
        trainer: Trainer,
        start_bytes: int,
        target_bytes: int,
        steps: int | None,
        minutes: float | None,
        path: Path,
        identity: Mapping[str, str],
    ) -> None:
        self._trainer = trainer
        self._target = target_bytes
        self._start = float(start_bytes)
        self._rate = Rate(trainer.grids, start_bytes)
        self._steps, self._minutes = steps, minutes
        self._path = path
        self._identity = dict(identity)
        self._index = 0
        self._elapsed = 0.0
        self._loss = 0.0
        self._file_bytes = self._rate.file_bytes()
        self._held_out = self._training = trainer.held_out()
        self._best: Snapshot | None = None
        self._best_measure: Measure | None = None
        self._late_best: Measure | None = None  # of the evaluations that count
        self._since_best = 0
        self.curve: list[tuple[int, float, float, Measure]] = [self._point()]
        self._keep_best()

    def resume(self) -> None:
        """Continue from the checkpoint.

        Raises
        ------
        ValueError
            It is of another run.
        """
        facts = checkpoint.read_facts(self._path)
        known = facts.get("identity", {})
        other = [name for name in self._identity if known.get(name) != self._identity[name]]
        if other:
            raise ValueError(
                f"{self._path} is of a run with another {', '.join(other)}; without resume it is replaced"
            )
        self._best = checkpoint.restore(self._path, self._trainer)
        for name in _KEPT:
            setattr(self, f"_{name}", facts[name])
        make = type(self._held_out)
        for name in _MEASURES:
            setattr(self, f"_{name}", None if facts[name] is None else make(*facts[name]))
        self.curve = [(int(p[0]), p[1], p[2], make(*p[3])) for p in facts["curve"]]

    def save(self) -> None:
        facts = {name: getattr(self, f"_{name}") for name in (*_KEPT, *_MEASURES)}
        facts |= {"identity": self._identity, "curve": self.curve}
        checkpoint.write(self._path, self._trainer, self._best, facts)

    def _point(self) -> tuple[int, float, float, Measure]:
        """Steps, minutes, bytes, and the measure on held-out texts."""
        return self._index, self._elapsed / 60, self._file_bytes, self._held_out

    @property
    def fixed_bytes(self) -> float:
        """Bytes of the file beside the integers."""
        return self._rate.fixed

    @property
    def steps(self) -> int:
        """Steps done."""
        return self._index

    @property
    def minutes(self) -> float:
        """Minutes of training, without what was lost between the last checkpoint and a kill."""
        return self._elapsed / 60

    @property
    def _done(self) -> float:
        if self._steps is not None:
            return self._index / self._steps
        assert self._minutes is not None
        return self._elapsed / 60 / self._minutes

    def run(self, progress: Callable[[TrainingStatus], None] | None) -> None:
        """Train to the end. That leaves a checkpoint, and so does an interrupt: of the state after the last whole
        step.
        """
        saved = time.monotonic()
        try:
            while self._done < 1 and self._since_best < _PATIENCE:
                begun = time.monotonic()
                with interrupts.held():
                    self._step()
                    self._elapsed += time.monotonic() - begun
                if progress is not None:
                    progress(self._status())
                if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
            self.save()  # what follows may take as long, and may be interrupted too
        except KeyboardInterrupt:
            self.save()
            raise

    @property
    def _learning_rate(self) -> float:
        """Factor of the learning rates for the next step."""
        return schedule.learning_rate(self._index, self._done, self._start > self._target * _FITS)

    def _step(self) -> None:
        result = self._trainer.step(self._index, self._learning_rate)
        first = self._index == 0
        self._loss = _smoothed(self._loss, result.loss, first)
        pairs = zip(self._training, result.measure, strict=True)
        self._training = type(result.measure)(*(_smoothed(old, new, first) for old, new in pairs))
        self._index += 1
        if self._index % _STEER_EVERY == 0:
            self._steer()
        if self._index % _EVALUATE_EVERY == 0 or self._index == self._steps:
            self._evaluate()

    def _steer(self) -> None:
        self._file_bytes = self._rate.file_bytes()
        wanted = schedule.target_bytes(self._done, self._start, self._target)
        factor = schedule.step_factor(self._rate.bits(self._file_bytes), self._rate.bits(wanted))
        if factor > 1.0:
            self._trainer.coarsen(factor)

    def _evaluate(self) -> None:
        self._file_bytes = self._rate.file_bytes()
        self._held_out = self._trainer.held_out()
        self.curve.append(self._point())
        self._keep_best()
        better = _is_better(self._held_out, self._late_best)
        counts = self._learning_rate <= _PATIENT_BELOW
        self._since_best = self._since_best + 1 if counts and not better else 0
        if counts and better:
            self._late_best = self._held_out

    def _keep_best(self) -> None:
        fits = self._file_bytes <= self._target * _FITS
        if fits and _is_better(self._held_out, self._best_measure):
            self._best, self._best_measure = self._trainer.snapshot(), self._held_out

    def finish(self) -> None:
        """Set the trainer to the best state that fits; without one, to the last."""
        if self.curve[-1][0] != self._index:
            self._evaluate()
        if self._best is not None:
            self._trainer.restore(self._best)

    def _status(self) -> TrainingStatus:
        done = self._done
        left = self._elapsed * (1 / done - 1) if done > 0 else float("inf")
        bits = self._rate.bits(self._file_bytes)
        return TrainingStatus(
            self._index, self._loss, self._training, self._held_out, self._best_measure, bits, self._file_bytes,
            min(done, 1.0), max(left, 0.0),
        )  # fmt: skip


def _smoothed(old: float, new: float, first: bool) -> float:
    return new if first else _SMOOTHING * old + (1 - _SMOOTHING) * new


def _is_better(new: Measure, old: Measure | None) -> bool:
    return old is None or new.score > old.score


def set_threads(count: int) -> None:
    """The threads that PyTorch computes on; the result depends on their number, not on their timing."""
    torch.set_num_threads(count)
