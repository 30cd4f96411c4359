"""Calibrated weights for the Linear layers of a PyTorch model: the model runs on examples, hooks see the inputs.

For each layer H = sum_t x_t^T x_t of all its inputs x_t; the weight is rounded with error feedback from H
(`rbe_gpu.feedback`), which minimises the error of the outputs instead of the weight's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..blocks import RBEMatrix
from ..feedback import Geometry, Moments, corrected_bias, geometry, quantize_matrix
from ..models.allocation import Weight
from ..threads import blas

F32 = NDArray[np.float32]
Examples = Callable[[], Any] | Iterable[Any]


def _run(model: torch.nn.Module, examples: Examples) -> None:
    if callable(examples):
        examples()
        return
    for example in examples:
        if isinstance(example, Mapping):
            model(**example)
        elif isinstance(example, tuple | list):
            model(*example)
        else:
            model(example)


def collect(
    model: torch.nn.Module, linears: Mapping[str, torch.nn.Linear], examples: Examples
) -> dict[str, Moments]:
    """The moments of the inputs of every layer, by name, while the model runs on examples in evaluation mode.

    Memory: 8 in_features^2 bytes for each layer, all layers at once, and as many rows as a layer has features.

    Parameters
    ----------
    examples : calls the model, or an iterable of its arguments: a mapping (keyword arguments), a tuple or list
        (positional ones), anything else one argument
    """
    moments = {name: Moments(linear.in_features) for name, linear in linears.items()}
    waiting: dict[str, list[F32]] = {name: [] for name in linears}

    def flush(name: str) -> None:
        rows = waiting[name]
        if rows:
            joined = rows[0] if len(rows) == 1 else np.concatenate(rows)
            with blas:
                moments[name].add(joined, joined)
            rows.clear()

    def add(name: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        rows: F32 = x.detach().reshape(-1, x.shape[-1]).float().cpu().numpy()
        if not np.isfinite(rows).all():
            raise ValueError(f"an input of {name} holds NaN or Inf")
        # a sum of products reads and writes in_features^2 numbers, however few the rows
        waiting[name].append(rows.copy())
        if sum(map(len, waiting[name])) >= moments[name].features:
            flush(name)

    training = [module for module in model.modules() if module.training]
    hooks = [
        linear.register_forward_pre_hook(partial(add, name), with_kwargs=True)
        for name, linear in linears.items()
    ]
    try:
        model.eval()
        with torch.no_grad():
            _run(model, examples)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    for name in linears:
        flush(name)
    if not any(m.count for m in moments.values()):
        raise ValueError(
            "calibrate= ran no Linear layer that is replaced; pass a function that calls the model, or a list of its "
            "arguments"
        )
    return moments


class Fitter:
    """Rounds weights with error feedback; the factored moments are kept for the next layer with the same inputs."""

    def __init__(self, transform: str, block: int) -> None:
        self._transform, self._block = transform, block
        self._last: tuple[Moments, Geometry] | None = None

    def _geometry(self, moments: Moments) -> Geometry:
        last = self._last
        if last is None or not np.array_equal(last[0].compressed, moments.compressed):
            last = self._last = moments, geometry(moments, self._transform, self._block)
        return last[1]

    @blas
    def fit(
        self, weight: F32, bias: F32 | None, moments: Moments, ratio: float
    ) -> tuple[RBEMatrix, F32 | None]:
        """The weight in grid codes, float32 bytes / stored bytes at least `ratio`, and the bias that preserves the
        mean output.

        weight : (out_features, in_features)
        """
        geo = self._geometry(moments)
        plan = Weight.of_matrix("", lambda: weight, lambda: geo)
        budget = 4 * weight.size / ratio
        bits = 8 * (budget - plan.overhead) / plan.size
        quantized = partial(quantize_matrix, weight, geo)
        matrix = plan.fitted(quantized, plan.step_for(max(bits, 0.05)), budget)
        if matrix.nbytes > budget:
            raise ValueError(
                f"{matrix.nbytes} bytes are needed where {int(budget)} are allowed; use a lower ratio"
            )
        return matrix, None if bias is None else corrected_bias(weight, matrix.decode(), bias, moments)
