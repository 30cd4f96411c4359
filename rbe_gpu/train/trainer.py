"""One step of training after the other: weights, gradients, optimisers, and everything that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..blocks import RBEBlocks
from ..models.bert import BertEncoder
from ..models.compress_tasks import halved
from .batches import Batch, Batches, in_order
from .objective import Loss, loss
from .quantizer import Grid
from .student import Student

WORDS = "embeddings.word_embeddings.weight"
_SLOW = 0.1  # of the learning rate is that of logarithms of column scales, biases and norms
_BETAS = (0.9, 0.98)
_EVALUATED = 64  # held-out texts at a time


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


class Trainer:
    """A student in training beside its teacher.

    Parameters
    ----------
    teacher : the dense model
    tensors : those of the file that training starts from, by canonical name: grid codes, or float arrays
    sequences : token ids of the training texts
    held_out : token ids of the texts that the student is measured on
    batch_size : texts of a step
    precision : of the matmuls, "float32" or "bfloat16"
    learning_rate : of the latents, in steps of the grid per step of training
    """

    def __init__(
        self,
        teacher: BertEncoder,
        tensors: Mapping[str, Any],
        sequences: Sequence[NDArray[np.int32]],
        held_out: Sequence[NDArray[np.int32]],
        batch_size: int,
        seed: int,
        device: str,
        precision: str,
        learning_rate: float,
    ) -> None:
        self.learning_rate = learning_rate
        self.student = Student.of(teacher)
        self.device = device
        self.dtype = getattr(torch, precision)
        self._batches = Batches(sequences, batch_size, seed, device)
        self._held_out = held_out
        self._teacher = {
            name: torch.from_numpy(np.array(values, np.float32)).to(device)
            for name, values in teacher.tensors().items()
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
        self._table = self.grids.get(WORDS)
        latents = []
        for name, grid in self.grids.items():
            if name != WORDS:
                latents.append(grid.latents.requires_grad_())
        slow = [*self.dense.values(), *(grid.factor for grid in self.grids.values())]
        groups: list[dict[str, Any]] = [
            {"params": p, "lr": r} for p, r in ((latents, learning_rate), (slow, _SLOW * learning_rate)) if p
        ]
        self._adam = torch.optim.Adam(groups, betas=_BETAS, eps=1e-12, fused=True)
        self._rates = [group["lr"] for group in groups]
        self._rows = None if self._table is None else RowAdam(self._table.latents)
        self._reference = self._vectors(self._teacher)

    # --- forward ----------------------------------------------------------------------------------------

    def _forward(
        self, weights: Mapping[str, Tensor], words: Tensor, batch: Batch
    ) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(self.device.partition(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            states = self.student.states(weights, words, batch.text)
        return self.student.vectors(states[-1].float(), batch.text), states

    def _weights(self) -> dict[str, Tensor]:
        """All weights but the rows of the word embeddings."""
        return {**self.dense, **{n: grid.weight() for n, grid in self.grids.items() if n != WORDS}}

    def _vectors(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The vectors of the held-out texts, of the dense model or, without word embeddings, the student's."""
        parts, order = [], []
        with torch.no_grad():
            for index, batch in in_order(self._held_out, _EVALUATED, self.device):
                if WORDS in weights:
                    words = functional.embedding(batch.ids, weights[WORDS])
                else:
                    assert self._table is not None
                    used, local = torch.unique(batch.ids, return_inverse=True)
                    words = functional.embedding(local, self._table.rows(used, self._table.latents[used]))
                parts.append(self._forward(weights, words, batch)[0])
                order += index
        vectors = torch.cat(parts)
        return vectors[torch.from_numpy(np.argsort(order)).to(vectors.device)]

    def held_out_cosine(self) -> float:
        """Mean cosine between the student's and the teacher's vectors of the held-out texts."""
        with torch.no_grad():
            weights = self._weights()
        return float((self._vectors(weights) * self._reference).sum(1).mean())

    # --- training ---------------------------------------------------------------------------------------

    def step(self, index: int, rate: float) -> Loss:
        """One step; `rate` is a factor of all learning rates."""
        batch = self._batches.at(index)
        with torch.no_grad():
            words = functional.embedding(batch.ids, self._teacher[WORDS])
            teacher = self._forward(self._teacher, words, batch)
        weights = self._weights()
        if self._table is None:
            words = functional.embedding(batch.ids, weights[WORDS])
        else:
            used, local = torch.unique(batch.ids, return_inverse=True)
            latents = self._table.latents[used].requires_grad_()
            words = functional.embedding(local, self._table.rows(used, latents))
        student = self._forward(weights, words, batch)
        result = loss(*student, *teacher, batch.text)
        self._adam.zero_grad(set_to_none=True)
        result.total.backward()
        for group, base in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        self._adam.step()
        if self._table is not None and self._rows is not None:
            self._rows.update(self._table.latents, used, latents.grad, self.learning_rate * rate)
        return result

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
