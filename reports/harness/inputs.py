"""Real weights and activations for the cases, of a model folder on real text."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .baselines import F32, Folder, NumpyBert, padded
from .mpnet import Mpnet

BROAD = 4096  # inputs and outputs of the largest matrix


class Inputs:
    """Weights by shape and activations by width, all taken from one model.

    Shapes that the model does not have are tiled from matrices that it has: the projections of a layer are
    384 x 384, four of them make 768 x 768; activations of twice the width are two layers' side by side.
    """

    def __init__(self, folder: Path, texts: int = 32, wide: Path | None = None) -> None:
        """texts : the number of texts that activations are taken from; wide : a folder of all-mpnet-base-v2."""
        self.folder = Folder(folder)
        self.wide = None if wide is None else Mpnet(wide, texts)
        self._texts = texts
        self.numpy = NumpyBert(self.folder)

    def weight(self, layer: int, name: str) -> F32:
        """A weight of one layer, e.g. weight(0, "intermediate.dense")."""
        return self.folder.tensor(f"encoder.layer.{layer}.{name}.weight")

    def bias(self, layer: int, name: str) -> F32:
        """A bias of one layer."""
        return self.folder.tensor(f"encoder.layer.{layer}.{name}.bias")

    @cached_property
    def words(self) -> F32:
        """The word embedding table, (vocabulary, hidden_size)."""
        return self.folder.tensor("embeddings.word_embeddings.weight")

    @cached_property
    def batch(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and lengths of the calibration texts."""
        return padded(self.folder.text_ids("calibration", self._texts))

    @cached_property
    def activations(self) -> dict[str, F32]:
        """The activations inside every layer on `batch`, by the names of `NumpyBert.states`."""
        activations: dict[str, F32] = {}
        self.numpy.hidden(*self.batch, activations)
        return activations

    def rows(self, name: str, count: int) -> F32:
        """`count` real activation rows (count, width) of `activations[name]`, padding left out, contiguous."""
        a = self.activations[name]
        a = a.reshape(*a.shape[:2], -1)
        real = np.concatenate([row[:n] for row, n in zip(a, self.batch[1], strict=True)])
        return np.ascontiguousarray(np.resize(real, (count, a.shape[-1])))

    def square(self) -> F32:
        """The four projections of layer 0 as one matrix, (2 hidden_size, 2 hidden_size)."""
        names = (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        )
        q, k, v, o = (self.weight(0, name) for name in names)
        return np.ascontiguousarray(np.block([[q, k], [v, o]]))

    def tall(self) -> F32:
        """The first FFN weights of four layers as one matrix, (2 intermediate_size, 2 hidden_size)."""
        a, b, c, d = (self.weight(i, "intermediate.dense") for i in range(4))
        return np.ascontiguousarray(np.block([[a, b], [c, d]]))

    def broad(self) -> F32:
        """The first FFN weights of all layers, over and over, as one matrix, (4096, 4096)."""
        layers = self.folder.config["num_hidden_layers"]
        rows, cols = self.weight(0, "intermediate.dense").shape
        down, across = -(-BROAD // rows), -(-BROAD // cols)
        tiles = [
            [self.weight((i * across + j) % layers, "intermediate.dense") for j in range(across)]
            for i in range(down)
        ]
        return np.ascontiguousarray(np.block(tiles)[:BROAD, :BROAD])

    def broad_rows(self, count: int) -> F32:
        """Activations for `broad`: what the FFNs of several layers compute side by side, (count, 4096)."""
        layers = range(self.folder.config["num_hidden_layers"])
        middle = np.hstack([self.rows(f"{i}.middle", count) for i in layers])
        return np.ascontiguousarray(
            np.resize(middle, (count, BROAD)) if middle.shape[1] < BROAD else middle[:, :BROAD]
        )

    def wide_rows(self, count: int) -> F32:
        """Activations of twice the hidden size: the inputs of layers 1 and 3 side by side."""
        return np.ascontiguousarray(np.hstack([self.rows("1.x", count), self.rows("3.x", count)]))

    def sequence(self, name: str, length: int) -> F32:
        """q, k or v of `length` real tokens in a row, (1, length, heads, head_dim)."""
        a = self.activations[name]
        return self.rows(name, length).reshape(1, length, *a.shape[2:])
