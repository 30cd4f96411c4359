"""One step of training after the other: weights, gradients, optimisers, and everything that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..blocks import RBEBlocks
from ..models.compress_tasks import halved
from .batches import Batch, Batches, in_order
from .measures import Measure
from .quantizer import Grid
from .task import Ids, Pass, Task

_SLOW = 0.1  # of the learning rate is that of logarithms of column scales, biases and norms
_BETAS = (0.9, 0.98)


class RowAdam:
    """Adam for rows of a table: the moments of a row change only when it is in a batch.

    Kingma and Ba 2015; lazy as in TensorFlow's `LazyAdam`.
    """

    def __init__(self, rows: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(rows), torch.zeros_like(rows)
        self.count = torch.zeros(len(rows), 1, device=rows.device)

    def update(self, rows: Tensor, index: Tensor, gradient: Tensor, rate: float) -> None:
        """Change `rows[index]`, all different, by their gradient."""
        first, second = _BETAS
        count = self.count[index] + 1
        mean = torch.lerp(gradient, self.mean[index], first)
        square = torch.lerp(gradient.square(), self.square[index], second)
        self.count[index], self.mean[index], self.square[index] = count, mean, square
        spread = (square / (1 - second**count)).sqrt_().add_(1e-12)
        rows[index] -= rate * (mean / (1 - first**count)) / spread


class Snapshot(NamedTuple):
    """The weights of the student: latents and factors of its grids, and the dense tensors."""

    latents: dict[str, Tensor]
    factors: dict[str, Tensor]
    dense: dict[str, Tensor]


class Step(NamedTuple):
    """The result of one step."""

    loss: float
    measure: Measure


class Trainer:
    """A student in training beside its teacher.

    Parameters
    ----------
    task : the dense model as a teacher
    tensors : those of the file that training starts from, by canonical name: grid codes, or float arrays
    fixed : float arrays that the student reads and that are not trained
    sequences : token ids of the training texts
    held_out : token ids of the texts that the student is measured on
    batch_size : sequences of a step, and of held-out texts at a time
    precision : of the matmuls, "float32" or "bfloat16"; logits are float32
    learning_rate : of the latents, in steps of the grid per step of training
    """

    def __init__(
        self,
        task: Task,
        tensors: Mapping[str, Any],
        fixed: Mapping[str, Any],
        sequences: Sequence[Ids],
        held_out: Sequence[Ids],
        batch_size: int,
        seed: int,
        device: str,
        precision: str,
        learning_rate: float,
    ) -> None:
        self.learning_rate = learning_rate
        self.task = task
        self.device = device
        self.dtype = getattr(torch, precision)
        self._batches = Batches(sequences, batch_size, seed, device)
        self._teacher = {
            name: torch.from_numpy(np.array(values, np.float32)).to(device)
            for name, values in task.model.tensors().items()
        }
        self._fixed = {
            name: torch.from_numpy(np.array(values, np.float32)).to(device) for name, values in fixed.items()
        }
        self.grids: dict[str, Grid] = {}
        self.dense: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if isinstance(value, RBEBlocks):
                dense = self._teacher[name].cpu().numpy()
                try:
                    self.grids[name] = Grid(value, dense, device)
                except ValueError as problem:
                    raise ValueError(f"{name}: {problem}; start from a calibrated file") from None
            else:
                values = torch.from_numpy(np.array(value, np.float32)).to(device)
                self.dense[name] = values.requires_grad_()
        self._table = self.grids.get(task.words) if task.reads_rows else None
        latents = [grid.latents.requires_grad_() for grid in self.grids.values() if grid is not self._table]
        slow = [*self.dense.values(), *(grid.factor for grid in self.grids.values())]
        groups: list[dict[str, Any]] = [
            {"params": p, "lr": r} for p, r in ((latents, learning_rate), (slow, _SLOW * learning_rate)) if p
        ]
        self._adam = torch.optim.Adam(groups, betas=_BETAS, eps=1e-12, fused=True)
        self._rates = [group["lr"] for group in groups]
        self._rows = None if self._table is None else RowAdam(self._table.latents)
        self._held_out: list[tuple[Batch, Tensor]] = []
        with torch.no_grad():
            for _, batch in in_order(held_out, batch_size, device):
                self._held_out.append((batch, self._taught(batch).outputs))

    # --- forward ----------------------------------------------------------------------------------------

    def _pass(self, weights: Mapping[str, Tensor], words: Tensor, batch: Batch) -> Pass:
        with torch.autocast(self.device.partition(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            states = self.task.student.states(weights, words, batch.text)
        return Pass(weights, states, self.task.outputs(states[-1], batch.text, weights))

    def _taught(self, batch: Batch) -> Pass:
        """The pass of the teacher."""
        return self._pass(
            self._teacher, functional.embedding(batch.ids, self._teacher[self.task.words]), batch
        )

    def _weights(self) -> dict[str, Tensor]:
        """All weights but a table of which only rows are trained."""
        grids = {name: grid.weight() for name, grid in self.grids.items() if grid is not self._table}
        return {**self._fixed, **self.dense, **grids}

    def held_out(self) -> Measure:
        """The measure of the student on held-out texts."""
        with torch.no_grad():
            weights = self._weights()
            totals: list[float] = []
            for batch, taught in self._held_out:
                if self._table is None:
                    words = functional.embedding(batch.ids, weights[self.task.words])
                else:
                    used, local = torch.unique(batch.ids, return_inverse=True)
                    words = functional.embedding(local, self._table.rows(used, self._table.latents[used]))
                outputs = self._pass(weights, words, batch).outputs
                measure = self.task.compared(outputs, taught, weights, self._teacher)
                part = [len(outputs) * value for value in measure]
                totals = [a + b for a, b in zip(totals, part, strict=True)] if totals else part
        count = sum(len(taught) for _, taught in self._held_out)
        result: Measure = self.task.measure(*(total / count for total in totals))
        return result

    # --- training ---------------------------------------------------------------------------------------

    def step(self, index: int, rate: float) -> Step:
        """One step; `rate` is a factor of all learning rates."""
        batch = self._batches.at(index)
        with torch.no_grad():
            teacher = self._taught(batch)
        weights = self._weights()
        if self._table is None:
            words = functional.embedding(batch.ids, weights[self.task.words])
        else:
            used, local = torch.unique(batch.ids, return_inverse=True)
            latents = self._table.latents[used].requires_grad_()
            words = functional.embedding(local, self._table.rows(used, latents))
        total, measure = self.task.loss(self._pass(weights, words, batch), teacher, batch.text)
        self._adam.zero_grad(set_to_none=True)
        total.backward()
        for group, base in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        self._adam.step()
        if self._table is not None and self._rows is not None:
            self._rows.update(self._table.latents, used, latents.grad, self.learning_rate * rate)
        return Step(float(total.detach()), measure)

    def coarsen(self, by: float) -> None:
        """Multiply all steps of the grids by `by`, and their gradients' moments to fit."""
        for grid in self.grids.values():
            grid.coarsen(by)
            moments = self._adam.state.get(grid.latents)
            if moments:
                moments["exp_avg"].mul_(by)
                moments["exp_avg_sq"].mul_(by * by)
        if self._rows is not None:
            self._rows.mean.mul_(by)
            self._rows.square.mul_(by * by)

    # --- states -----------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return Snapshot(
            {name: grid.latents.detach().clone() for name, grid in self.grids.items()},
            {name: grid.factor.detach().clone() for name, grid in self.grids.items()},
            {name: values.detach().clone() for name, values in self.dense.items()},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Set the weights to those of a snapshot. Optimiser states are not restored, so training must end here."""
        with torch.no_grad():
            for name, grid in self.grids.items():
                grid.latents.copy_(snapshot.latents[name])
                grid.factor.copy_(snapshot.factors[name])
            for name, values in self.dense.items():
                values.copy_(snapshot.dense[name])

    def tensors(self) -> dict[str, Any]:
        """The weights as a file holds them, by canonical name; dense ones as float16, if that has their range."""
        dense = {name: halved(values.detach().cpu().numpy()) for name, values in self.dense.items()}
        return {**dense, **{name: grid.stored() for name, grid in self.grids.items()}}

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that the next step depends on, by name: to be kept, or to be copied into."""
        for name, grid in self.grids.items():
            yield f"{name}.latents", grid.latents.detach()
            yield f"{name}.factor", grid.factor.detach()
        for name, values in self.dense.items():
            yield name, values.detach()
        if self._rows is not None:
            for name in ("mean", "square", "count"):
                yield f"rows.{name}", getattr(self._rows, name)
        parameters = (p for group in self._adam.param_groups for p in group["params"])
        for i, parameter in enumerate(parameters):
            moments = self._adam.state[parameter]
            if not moments:  # before the first step, as Adam would make them there
                moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            for name in ("step", "exp_avg", "exp_avg_sq"):
                yield f"adam.{i}.{name}", moments[name]
