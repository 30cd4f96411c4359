"""Compressed Linear layers in PyTorch models: `replace_linear`, `load_state_dict`, `RBELinearModule`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from ..feedback import Moments
from ..matmul import check_activation_bits
from ..transforms import DEFAULT_BLOCK
from .input_moments import Examples, Fitter, collect
from .linear_module import RBELinearModule, dense_weight, read_state
from .tensors import as_tensor

__all__ = ["RBELinearModule", "ReplacedLayer", "Replacement", "load_state_dict", "replace_linear"]


@dataclass(frozen=True)
class ReplacedLayer:
    """One layer that `replace_linear` replaced.

    Attributes
    ----------
    shape : (out_features, in_features)
    dense_bytes : of the weight before, in its dtype
    stored_bytes : of the compressed weight in a file or a state_dict
    resident_bytes : of the compressed weight in memory
    calibration_rows : input rows that the weight was calibrated on; 0: it was rounded without
    """

    shape: tuple[int, int]
    dense_bytes: int
    stored_bytes: int
    resident_bytes: int
    calibration_rows: int = 0


@dataclass(frozen=True)
class Replacement:
    """What `replace_linear` did.

    Attributes
    ----------
    module : the module, changed in place
    layers : name -> the layer that was replaced
    left : name -> why that Linear stays dense
    """

    module: torch.nn.Module
    layers: dict[str, ReplacedLayer]
    left: dict[str, str]

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers.values())

    @property
    def stored_bytes(self) -> int:
        return sum(layer.stored_bytes for layer in self.layers.values())

    @property
    def resident_bytes(self) -> int:
        return sum(layer.resident_bytes for layer in self.layers.values())

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} Linear layers replaced: {self.dense_bytes / 1e6:.2f} MB of weights are now "
            f"{self.resident_bytes / 1e6:.2f} MB in memory, {self.stored_bytes / 1e6:.2f} MB stored"
        ]
        return "\n".join(lines + [f"left dense: {name} ({reason})" for name, reason in self.left.items()])


def replace_linear(
    module: torch.nn.Module,
    *,
    grade: str | None = None,
    ratio: float | None = None,
    rmse: float | None = None,
    density: float | None = None,
    block: int = DEFAULT_BLOCK,
    transform: str | None = None,
    basis: bool | str = "auto",
    codes: str | None = None,
    calibrate: Examples | None = None,
    activation_bits: int | None = None,
    skip: Sequence[str] = (),
) -> Replacement:
    """Replace every `torch.nn.Linear` of a module, in place, by `RBELinearModule`, for inference.

    Every layer is compressed to the same target. Nothing is replaced if one of them raises.

    Left dense, with the reason in the result: layers that `skip` names; subclasses of Linear, whose code is not
    known here (the output projection of `torch.nn.MultiheadAttention` is one, and its weight is read without calling
    it); layers with hooks or parametrizations; weights that another module holds too, such as an output layer tied to
    the embedding, where a compressed copy would take memory and save none; weights with fewer rows or columns than a
    block. Linears that share a weight with each other alone share the compressed one.

    Parameters
    ----------
    grade, ratio, rmse, density, block, transform, basis, codes : as for `rbe_gpu.compress`
    calibrate : round with error feedback from real inputs, into grid codes at `ratio`. Either a function that calls
        the model (`lambda: model(**batch)`), or an iterable of arguments: mappings, tuples, or single tensors. The
        model runs in evaluation mode. Padded positions count like others. Transform "none" unless one is given.
        Takes up to 12 in_features^2 bytes for each layer while it runs
    activation_bits : 8 rounds the inputs of the layers to int8 (dense and grid codes)
    skip : names of layers as in `named_modules()`, or patterns such as "*.lm_head" (`fnmatch`)

    Returns
    -------
    Replacement

    Raises
    ------
    ValueError
        As for `rbe_gpu.compress`, with the layer's name; the module is itself a Linear; a pattern matches nothing.
    TypeError
        A weight is float64, of integers, or on the device "meta".
    """
    if isinstance(module, torch.nn.Linear):
        raise ValueError(
            "the module is itself a Linear, which cannot be replaced in place; use RBELinearModule.from_linear"
        )
    check_activation_bits(activation_bits)
    options = {"grade": grade, "ratio": ratio, "rmse": rmse, "density": density, "codes": codes}
    if calibrate is not None:
        others = [name for name, value in options.items() if name != "ratio" and value is not None]
        if ratio is None or others or basis is True:
            raise ValueError("calibrate= needs ratio=, and takes no grade, rmse, density, codes or basis")
        if not ratio > 0:
            raise ValueError(f"ratio={ratio} is not positive")
    elif all(value is None for value in options.values()):
        raise ValueError("no target; give grade=, ratio=, rmse= or density=, or codes= alone")
    linears, left = _choose(module, skip, block)
    moments = {} if calibrate is None else collect(module, linears, calibrate)
    fitter = Fitter(transform or "none", block)
    plain = {**options, "block": block, "transform": transform or "dct", "basis": basis}
    modules: dict[int, RBELinearModule] = {}
    layers: dict[str, ReplacedLayer] = {}
    for name, linear in linears.items():
        seen = moments.pop(name, None)
        rows = 0 if seen is None else seen.count
        try:
            if seen is not None and ratio is not None and rows:
                new = _calibrated(linear, seen, ratio, fitter, activation_bits)
            else:
                new = RBELinearModule.from_linear(linear, activation_bits=activation_bits, **plain)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error} (skip=[{name!r}] leaves this layer dense)") from error
        weight = new.compressed
        modules[id(linear)] = new.placed_as(linear)
        layers[name] = ReplacedLayer(
            (linear.out_features, linear.in_features),
            int(linear.weight.nbytes),
            weight.nbytes,
            weight.resident_nbytes,
            rows,
        )
    _install(module, modules)
    return Replacement(module, layers, left)


def load_state_dict(
    module: torch.nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """Load the state_dict of a module whose Linears were replaced into one whose Linears are dense still.

    Every Linear for which `state_dict` has a compressed weight is replaced, in place; the rest is
    `module.load_state_dict`, whose result is returned. The compressed weights are treated as untrusted input; nothing
    is replaced if one of them is invalid.

    Raises
    ------
    ValueError
        A compressed weight is invalid or has another shape; the message names the layer.
    """
    modules: dict[int, RBELinearModule] = {}
    for name, linear in module.named_modules():
        key = f"{name}._extra_state"
        if type(linear) is not torch.nn.Linear or key not in state_dict:
            continue
        try:
            compressed, activation_bits = read_state(state_dict[key])
            if compressed.shape != (linear.out_features, linear.in_features):
                raise ValueError(
                    f"the state has a weight of shape {compressed.shape}, expected "
                    f"{(linear.out_features, linear.in_features)} (out_features, in_features)"
                )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        bias = linear.bias
        if bias is not None and bias.is_meta:
            bias = torch.empty_like(bias, device="cpu")
        new = RBELinearModule(compressed, bias, activation_bits)
        modules[id(linear)] = new if linear.weight.is_meta else new.placed_as(linear)
    _install(module, modules)
    return module.load_state_dict(state_dict, strict=strict, assign=assign)


def _calibrated(
    linear: torch.nn.Linear, moments: Moments, ratio: float, fitter: Fitter, activation_bits: int | None
) -> RBELinearModule:
    """The layer rounded with error feedback, and the bias that preserves its mean output."""
    bias = None if linear.bias is None else linear.bias.detach().float().cpu().numpy()
    weight, bias = fitter.fit(np.asarray(dense_weight(linear), np.float32), bias, moments, ratio)
    return RBELinearModule(weight, None if bias is None else as_tensor(bias), activation_bits)


def _choose(
    module: torch.nn.Module, skip: Sequence[str], block: int
) -> tuple[dict[str, torch.nn.Linear], dict[str, str]]:
    """The Linears to replace by name, and those that stay dense with the reason."""
    names: dict[int, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, torch.nn.Linear):
            names.setdefault(id(part), []).append(name)
    every = [name for group in names.values() for name in group]
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise ValueError(f"skip has {pattern!r}, which matches no Linear; there are {', '.join(every)}")
    holders: dict[Any, list[str]] = {}
    for name, part in module.named_modules():
        for parameter, value in part.named_parameters(recurse=False):
            holders.setdefault(_memory(value), []).append(f"{name}.{parameter}")
    linears: dict[str, torch.nn.Linear] = {}
    left: dict[str, str] = {}
    for name, part in module.named_modules():
        if not isinstance(part, torch.nn.Linear):
            continue
        skipped = any(fnmatchcase(n, pattern) for n in names[id(part)] for pattern in patterns)
        reason = "skip" if skipped else _reason(part, block)
        if not reason:
            others = [held for held in holders[_memory(part.weight)] if held != f"{name}.weight"]
            reason = f"its weight is {others[0]} too" if others else ""
        if reason:
            left[name] = reason
        else:
            linears[name] = part
    return linears, left


def _reason(linear: torch.nn.Linear, block: int) -> str:
    """Why a Linear stays dense, whatever else the module has; "" for one that need not."""
    if type(linear) is not torch.nn.Linear:
        return f"{type(linear).__name__} is a subclass of Linear"
    if "weight" not in linear._parameters or "forward" in vars(linear):
        return "its weight is computed, or its forward is replaced"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
        return "it has hooks"
    if min(linear.out_features, linear.in_features) < block:
        return f"fewer than {block} rows or columns, one block"
    return ""


def _memory(tensor: torch.Tensor) -> Any:
    """What two parameters have in common that share memory."""
    return (tensor.device, tensor.data_ptr()) if not tensor.is_meta and tensor.numel() else id(tensor)


def _install(module: torch.nn.Module, modules: Mapping[int, RBELinearModule]) -> None:
    """Put modules in the place of those with the given ids, wherever they are."""
    for part in list(module.modules()):
        for name, child in list(part._modules.items()):
            if id(child) in modules:
                setattr(part, name, modules[id(child)])
                if isinstance(part, torch.nn.TransformerEncoderLayer):
                    # its fused path reads the weights of its Linears, and asks for this first
                    part.activation_relu_or_gelu = 0
    for part in module.modules():
        if isinstance(part, torch.nn.TransformerEncoder) and any(
            isinstance(below, RBELinearModule) for below in part.modules()
        ):
            part.use_nested_tensor = False  # of padded batches, which only the fused path takes
