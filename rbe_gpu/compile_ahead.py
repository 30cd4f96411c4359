"""Compile some of a model's CPU kernels without computing anything.

Numba compiles one function at a time in a process. A process whose kernels are not cached yet compiles them as it
runs the model: those of the embedding and the first normalisation, then of the linear layers, which take half of the
time. A second process compiles what comes later meanwhile, and leaves it in the disk cache for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .dispatch import CPU
from .models.bert import BertEncoder
from .models.text_embedder import TextEmbedder

#: More tokens than are multiplied one by one.
_TOKENS = 32
_TEXTS = (
    "Interest rates rose for the third time this year.",
    "The bank expects one more step before winter.",
)


@contextmanager
def _replaced(ops: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, these functions are the CPU's ops."""
    before = {name: getattr(CPU, name) for name in ops}
    try:
        for name, function in ops.items():
            setattr(CPU, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(CPU, name, function)


def compile_later_kernels(model: TextEmbedder) -> None:
    """Compile the kernels of a model on the CPU that its forward pass does not begin with.

    They are those of all ops but `embedding` and `linear`; in a model with int8 activations, of `linear` with float
    activations, too.

    model : with a tokenizer
    """
    linear = CPU.linear

    def skip(*_: Any, **__: Any) -> None:
        """What the op would write stays undefined."""

    def float_linear(*args: Any, activation_bits: int | None = None, **kwargs: Any) -> None:
        if activation_bits is None:
            linear(*args, **kwargs)

    with _replaced({"embedding": skip, "linear": float_linear if model.int8_activations else skip}):
        if isinstance(model, BertEncoder):  # `embed` would take so few tokens through all layers in one call
            ids = np.zeros((1, min(_TOKENS, model.max_positions)), np.int64)
            model.pool(model.forward(ids))
            CPU.module("encoder_step").compile_step()
        else:
            model.embed(_TEXTS)
