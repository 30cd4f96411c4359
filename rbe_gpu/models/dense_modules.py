"""Dense modules of sentence-transformers, between pooling and normalisation: v' = activation(v W^T + bias)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from ..blocks import Array, RBEBlocks
from ..dispatch import module_of
from ..layers import RBELinear
from ..workspace import Workspace
from .settings import check_keys, fail

#: activation_function of the module's config.json -> of `DenseModule`
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": None,
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.Identity": None,
    "torch.nn.Tanh": "tanh",
}
_TANH = "torch.nn.modules.activation.Tanh"
_TABLE = "2_Dense/config.json"
PREFIX = "dense."


class DenseSettings(NamedTuple):
    """What the config.json of a Dense module says. activation : None or "tanh"."""

    in_features: int
    out_features: int
    bias: bool
    activation: str | None


class DenseModule(NamedTuple):
    """A layer over vectors of texts. activation : None or "tanh"."""

    linear: RBELinear
    activation: str | None

    def __call__(self, vectors: Array, out: Array, workspace: Workspace) -> Array:
        """vectors : (batch, in_features) float32; out : (batch, out_features) float32. Returns out."""
        self.linear(vectors, out=out, workspace=workspace)
        if self.activation is not None:
            module_of(out).tanh(out, out=out)
        return out


def check_dense(settings: Any, where: object = _TABLE) -> DenseSettings:
    """The settings of a Dense module's config.json.

    Raises
    ------
    ValueError
        They are invalid, or not supported; the message names the key.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} is a {type(settings).__name__}, expected an object")
    check_keys(settings, _TABLE, where)
    for name in ("in_features", "out_features"):
        if type(settings.get(name)) is not int or settings[name] < 1:
            fail(where, name, settings.get(name), "a positive integer")
    bias = settings.get("bias", True)
    if type(bias) is not bool:
        fail(where, "bias", bias, "true or false")
    activation = settings.get("activation_function", _TANH)
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        fail(where, "activation_function", activation, f"one of {', '.join(_ACTIVATIONS)}")
    return DenseSettings(settings["in_features"], settings["out_features"], bias, _ACTIVATIONS[activation])


def check_all(dense: Any, width: int, where: object) -> tuple[DenseSettings, ...]:
    """The settings of all Dense modules of a model, in their order, from the entry `dense` of its settings.

    width : columns of the pooled vectors
    """
    if dense is None:
        return ()
    if not isinstance(dense, list | tuple):
        raise ValueError(f"{where} has dense, which is not a list of settings")
    checked = tuple(check_dense(settings, f"{where}: dense[{i}]") for i, settings in enumerate(dense))
    for settings in checked:
        if settings.in_features != width:
            raise ValueError(
                f"{where} has a Dense module with in_features={settings.in_features}, but the vectors before it have "
                f"{width} columns"
            )
        width = settings.out_features
    return checked


def tensor_names(settings: DenseSettings, index: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors of a model's Dense module number `index`."""
    names: dict[str, tuple[int, ...]] = {
        f"{PREFIX}{index}.weight": (settings.out_features, settings.in_features)
    }
    if settings.bias:
        names[f"{PREFIX}{index}.bias"] = (settings.out_features,)
    return names


def check_tensors(shapes: Mapping[str, tuple[int, ...]], settings: Sequence[DenseSettings]) -> None:
    """Raise a ValueError if tensors with these names and shapes are not those of Dense modules, or are missing."""
    for i, module in enumerate(settings):
        for name, shape in tensor_names(module, i).items():
            if name not in shapes:
                raise ValueError(f"the model has no tensor {name!r} of its Dense module")
            if tuple(shapes[name]) != shape:
                raise ValueError(f"{name} has shape {tuple(shapes[name])}, its settings say {shape}")


def dense_modules(
    checked: Sequence[DenseSettings], tensors: Mapping[str, Array | RBEBlocks]
) -> tuple[DenseModule, ...]:
    """The Dense modules of a model, of its tensors.

    Raises
    ------
    ValueError
        A tensor is missing, or has another shape than the settings say.
    """
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, checked)
    made = []
    for i, settings in enumerate(checked):
        weight, *bias = (tensors[name] for name in tensor_names(settings, i))
        if not isinstance(weight, RBEBlocks):
            weight = cast(Array, module_of(weight).ascontiguousarray(weight))
        made.append(DenseModule(RBELinear(weight, _vector(bias[0]) if bias else None), settings.activation))
    return tuple(made)


def _vector(tensor: Array | RBEBlocks) -> Array:
    if isinstance(tensor, RBEBlocks):
        return tensor.decode()
    return cast(Array, module_of(tensor).ascontiguousarray(tensor, dtype=np.float32))


def tensors_of(modules: Sequence[DenseModule]) -> dict[str, Array | RBEBlocks]:
    """The tensors of Dense modules by name, as of `tensor_names`."""
    named: dict[str, Array | RBEBlocks] = {}
    for i, module in enumerate(modules):
        named[f"{PREFIX}{i}.weight"] = module.linear.weight
        if module.linear.bias is not None:
            named[f"{PREFIX}{i}.bias"] = module.linear.bias
    return named


def with_tensors(
    modules: Sequence[DenseModule], tensors: Mapping[str, Array | RBEBlocks]
) -> tuple[DenseModule, ...]:
    """The same modules with some tensors replaced."""
    named = {**tensors_of(modules), **tensors}
    settings = [
        DenseSettings(m.linear.in_features, m.linear.out_features, m.linear.bias is not None, m.activation)
        for m in modules
    ]
    return dense_modules(settings, named)
