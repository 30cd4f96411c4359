"""to: move arrays, compressed weights, layers and models to a device. Compressed weights stay compressed."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from .blocks import RBEBlocks
from .cache import PanelCache
from .dispatch import as_cupy, canonical_device, device_memory_errors, move_array
from .layers import RBEFFN, RBEAttention, RBEDropout, RBEEmbedding, RBELayerNorm, RBELinear, RBERMSNorm
from .layers.attention_transform_domain import TransformDomainAttention
from .workspace import ThreadWorkspaces, Workspace

_LAYERS = (RBEFFN, RBEAttention, RBEDropout, RBEEmbedding, RBELayerNorm, RBELinear, RBERMSNorm)
_T = TypeVar("_T")


def to(value: _T, device: str) -> _T:
    """Move `value` to a device; a value that is there already is returned unchanged.

    Parameters
    ----------
    value : an array of NumPy or CuPy, `RBEMatrix`, `RBEVectors`, a layer, or a model of `rbe_gpu.load`
    device : "cpu", "cuda" (CuPy's current GPU) or "cuda:1"

    Returns
    -------
    The same type. Arrays are NumPy's on "cpu" and CuPy's on a GPU. Linear layers round their inputs to int8 there if
    they do so here. Moved layers and models share no mutable state with the originals: they start with an empty cache
    and workspace.

    Raises
    ------
    TypeError
        Neither of these types.
    ValueError, ImportError
        The device does not exist.
    MemoryError
        Not enough memory on the device; the message gives the bytes requested and free.
    """
    where = canonical_device(device)
    with device_memory_errors():
        return _Move(where).value(as_cupy(value))  # type: ignore[no-any-return]


def as_on_gpu(model: _T) -> _T:
    """A model as `to` would make it for a GPU, in NumPy arrays: codes without exceptions.

    Its launches are those of the model on a GPU; no CPU op runs its weights.
    """
    return _AsOnGpu("a GPU").value(model)  # type: ignore[no-any-return]


def _models() -> tuple[type[Any], ...]:
    from .models.bert import BertEncoder
    from .models.decoder import Decoder
    from .models.decoder_embedder import DecoderEmbedder

    return BertEncoder, Decoder, DecoderEmbedder


class _Move:
    """One call of `to`: layers that share a cache share one afterwards too."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._made: dict[int, Any] = {}

    def value(self, value: Any) -> Any:
        if isinstance(value, RBEBlocks):
            return value.to(self.device)
        if isinstance(value, (*_LAYERS, *_models())):
            return self._parts(value)
        return move_array(value, self.device)

    def _parts(self, owner: Any) -> Any:
        """A copy of a layer or a model, with everything in it moved."""
        moved = copy(owner)
        for name, part in vars(owner).items():
            # projections in the transform domain share the weights: they are made again
            setattr(moved, name, None if isinstance(part, TransformDomainAttention) else self._part(part))
        if isinstance(moved, RBEEmbedding | RBELinear) and self.device != "cpu":
            moved.keep_codes()
        return moved

    def _part(self, part: Any) -> Any:
        if isinstance(part, PanelCache | Workspace | ThreadWorkspaces):
            if id(part) not in self._made:
                fresh = PanelCache(part.budget) if isinstance(part, PanelCache) else type(part)()
                self._made[id(part)] = fresh
            return self._made[id(part)]
        if isinstance(part, list | tuple):
            moved = [self._part(p) for p in part]
            return type(part)(*moved) if hasattr(part, "_fields") else type(part)(moved)
        if isinstance(part, (RBEBlocks, np.ndarray, *_LAYERS, *_models())) or hasattr(
            part, "__cuda_array_interface__"
        ):
            return self.value(part)
        return part


class _AsOnGpu(_Move):
    """Moves nothing; arrays start where CuPy's would, at multiples of 16 bytes at least."""

    def value(self, value: Any) -> Any:
        if isinstance(value, RBEBlocks):
            codes = value.codes.for_gpu().map_arrays(self.value)
            basis = None if value.basis is None else self.value(value.basis)
            return replace(value, codes=codes, basis=basis)
        if isinstance(value, np.ndarray):
            return value if value.ctypes.data % 16 == 0 else value.copy()
        return super().value(value)
