"""EncoderGraph: a batch of fixed shape through a BertEncoder as one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..blocks import Array
from ..dispatch import device_of
from ..gpu.graph import Graph
from ..workspace import Workspace

if TYPE_CHECKING:
    from .bert import BertEncoder


class EncoderGraph:
    """vectors = pool(forward(ids, lengths)) of `batch` texts of up to `seq` tokens, captured on the model's GPU.

    For a few short texts, launching some hundred kernels one by one takes longer than running them; a graph is one
    launch. Its arrays keep their addresses: a call copies ids and lengths into them and returns the same array each
    time, so copy what is needed of it before the next call.

    Parameters
    ----------
    model : on a GPU, with mean or cls pooling. Its cache must not be cleared while the graph is in use
    batch, seq : of every call; shorter texts are padded and cost as much as full ones

    Attributes
    ----------
    ids, lengths : (batch, seq) and (batch,) int64 CuPy arrays, the inputs of the next replay
    states : (batch, seq, hidden), dtype of the model; positions of padding are undefined
    vectors : (batch, pooled_size), dtype of the model, normalized if the model is configured so
    """

    def __init__(self, model: BertEncoder, batch: int, seq: int) -> None:
        if model.device == "cpu":
            raise TypeError('the model is on the CPU; move it: rbe_gpu.to(model, "cuda")')
        if batch < 1 or seq < 1:
            raise ValueError(f"batch={batch}, seq={seq}: a graph needs at least one token")
        if "max" in model.pooling:
            raise ValueError(
                "pooling by the maximum reads lengths on the host, which a graph cannot capture; use embed"
            )
        if unsupported := set(model.pooling) - {"mean", "cls"}:
            raise ValueError(
                f"pooling by {', '.join(sorted(unsupported))} cannot be captured in a graph; use embed"
            )
        import cupy

        self._model = model
        self._workspace = Workspace()  # not shared: no other call may reallocate a buffer that the graph uses
        number = int(model.device.partition(":")[2])
        with cupy.cuda.Device(number):
            self.ids: Any = cupy.zeros((batch, seq), np.int64)
            self.lengths: Any = cupy.asarray(np.full(batch, seq, np.int64))
            self.states: Any = cupy.empty((batch, seq, model.hidden_size), model.dtype)
            self.vectors: Any = cupy.empty((batch, model.pooled_size), model.dtype)
        self._graph = Graph(self._compute, number)

    def _compute(self) -> None:
        self._model.forward(self.ids, self.lengths, out=self.states, workspace=self._workspace)
        self._model.pool(self.states, self.lengths, out=self.vectors, workspace=self._workspace)

    def replay(self) -> Array:
        """Launch on the current values of `ids` and `lengths`, asynchronously. Returns `vectors`."""
        self._graph()
        vectors: Array = self.vectors
        return vectors

    def __call__(self, ids: Array, lengths: Array | None = None) -> Array:
        """Copy the inputs to the GPU, launch, and return `vectors`.

        Parameters
        ----------
        ids : (batch, seq) integers, NumPy or CuPy
        lengths : (batch,) integers, 0 to seq; None: all of seq
        """
        batch, seq = self.ids.shape
        if lengths is None:
            lengths = np.full(batch, seq, np.int64)
        for name, source, target in (("ids", ids, self.ids), ("lengths", lengths, self.lengths)):
            if source.shape != target.shape or source.dtype.kind not in "iu":
                raise ValueError(
                    f"{name} is {source.dtype} of shape {source.shape}, the graph takes integers of shape "
                    f"{target.shape}"
                )
            if device_of(source) == "cpu":
                target.set(np.ascontiguousarray(source, np.int64))
            else:
                target[...] = source
        return self.replay()
