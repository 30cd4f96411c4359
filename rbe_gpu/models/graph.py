"""EncoderGraph: a batch of fixed shape through a BertEncoder as one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..blocks import Array
from ..gpu.graph import Graph
from ..workspace import Workspace

if TYPE_CHECKING:
    from .bert import BertEncoder


class EncoderGraph:
    """vectors = pooled(encode(ids, lengths)) of `batch` texts of up to `seq` tokens, captured on the model's GPU.

    Launching some hundred kernels one by one takes longer than running them for a few short texts; a graph is one
    launch. What it works on stays where it is: a call copies ids and lengths there and returns the same arrays each
    time, so take what is needed of them before the next call.

    Parameters
    ----------
    model : on a GPU. Its cache must not be cleared while the graph is in use, and its pooling is mean or cls
    batch, seq : of every call; shorter texts are padded, which costs the time of full ones

    Attributes
    ----------
    ids, lengths : (batch, seq) and (batch,) int64 CuPy arrays, what the next replay reads
    states : (batch, seq, hidden), dtype of the model; positions of padding hold no meaning
    vectors : (batch, embedding_size), dtype of the model, normalised where the model says so
    """

    def __init__(self, model: BertEncoder, batch: int, seq: int) -> None:
        if model.device == "cpu":
            raise TypeError('the model is on the CPU; move it: rbe_gpu.to(model, "cuda")')
        if batch < 1 or seq < 1:
            raise ValueError(f"batch={batch}, seq={seq}: a graph needs at least one token")
        import cupy

        self._model = model
        self._workspace = Workspace()  # of its own: no other call may move what the graph writes to
        number = int(model.device.partition(":")[2])
        with cupy.cuda.Device(number):
            self.ids: Any = cupy.zeros((batch, seq), np.int64)
            self.lengths: Any = cupy.asarray(np.full(batch, seq, np.int64))
            self.states: Any = cupy.empty((batch, seq, model.hidden_size), model.dtype)
            self.vectors: Any = cupy.empty((batch, model.embedding_size), model.dtype)
        self._graph = Graph(self._work, number)

    def _work(self) -> None:
        self._model.encode(self.ids, self.lengths, out=self.states, workspace=self._workspace)
        self._model.pooled(self.states, self.lengths, out=self.vectors, workspace=self._workspace)

    def replay(self) -> Array:
        """Launch on what `ids` and `lengths` hold; nothing waits. Returns `vectors`."""
        self._graph()
        found: Array = self.vectors
        return found

    def __call__(self, ids: Array, lengths: Array | None = None) -> Array:
        """Copy in, launch, and return `vectors`.

        Parameters
        ----------
        ids : (batch, seq) integers, NumPy or CuPy
        lengths : (batch,) integers, 0 to seq; None: all of seq
        """
        batch, seq = self.ids.shape
        if lengths is None:
            lengths = np.full(batch, seq, np.int64)
        for name, given, own in (("ids", ids, self.ids), ("lengths", lengths, self.lengths)):
            if given.shape != own.shape or given.dtype.kind not in "iu":
                raise ValueError(
                    f"{name} is {given.dtype} of shape {given.shape}, the graph takes integers of shape {own.shape}"
                )
            if isinstance(given, np.ndarray) and not hasattr(given, "__cuda_array_interface__"):
                own.set(np.ascontiguousarray(given, np.int64))
            else:
                own[...] = given
        return self.replay()
