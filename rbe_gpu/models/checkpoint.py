"""Checks of a checkpoint's tensors, before any work on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..json_checks import quoted

FLOATS = ("F32", "F16", "BF16")
#: ends of the names of tensors that only quantised checkpoints have -> by whom
_QUANTIZED = {
    **dict.fromkeys(
        (".SCB", ".weight_format", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"),
        "bitsandbytes",
    ),
    **dict.fromkeys((".qweight", ".qzeros", ".g_idx", ".scales"), "GPTQ or AWQ"),
    **dict.fromkeys(
        (
            ".weight_packed",
            ".weight_scale",
            ".weight_scale_inv",
            ".weight_zero_point",
            ".weight_shape",
            ".input_scale",
        ),
        "compressed-tensors or FP8",
    ),
    **dict.fromkeys((".weight._data", ".weight._scale", ".weight._shift"), "quanto"),
    **dict.fromkeys((".scale_weight", ".weight_quantized", ".zero_point", ".W_q"), "another tool"),
}
_WEIGHTS = ("weight", "bias", "gamma", "beta")
#: exponent bits, all set in NaN and Inf
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80}
_CHUNK = 1 << 18  # values: 1 MiB, in the cache


def check_names(dtypes: Mapping[str, str], where: object, floats: Iterable[str] = FLOATS) -> None:
    """Refuse quantised checkpoints, and weights that are no floats.

    Parameters
    ----------
    dtypes : name -> dtype, as safetensors spells it
    floats : those that are read
    """
    for name in dtypes:
        for end, tool in _QUANTIZED.items():
            if name.endswith(end) or f"{end}." in name:
                raise ValueError(
                    f"{where}: tensor {quoted(name)} is of a quantised checkpoint ({tool}); use the weights that it "
                    "was quantised from"
                )
    floats = tuple(floats)
    for name, dtype in dtypes.items():
        if dtype not in floats and name.rpartition(".")[2] in _WEIGHTS:
            raise ValueError(
                f"{where}: tensor {quoted(name)} is {dtype}; weights must be one of {', '.join(floats)}: convert the "
                "checkpoint"
            )


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Iterable[tuple[str, tuple[int, ...]]]
) -> None:
    """Refuse checkpoints that lack a tensor, or have one of another shape than config.json says.

    Parameters
    ----------
    shapes : canonical name -> shape
    expected : name and shape of every tensor that is read
    """
    for name, shape in expected:
        if name not in shapes:
            longer = next((other for other in shapes if other.endswith(f".{name}")), None)
            hint = (
                ""
                if longer is None
                else f"; remove the prefix {quoted(longer.removesuffix(name))} from its names"
            )
            raise ValueError(f"the model has no tensor {name!r}{hint}")
        if tuple(shapes[name]) != shape:
            raise ValueError(f"{name} has shape {tuple(shapes[name])}, config.json says {shape}")


def check_distinct(canonical: Iterable[tuple[str, str]]) -> None:
    """Refuse two tensors with the same canonical name. canonical : (name, canonical name)"""
    seen: dict[str, str] = {}
    for name, short in canonical:
        if short in seen:
            raise ValueError(
                f"the tensors {quoted(seen[short])} and {quoted(name)} are the same weight; remove one"
            )
        seen[short] = name


def is_finite(a: NDArray[Any]) -> bool:
    """Whether an array of float32, float16 or bfloat16 holds neither NaN nor Inf."""
    flat = np.ascontiguousarray(a).reshape(-1)
    exponent = _EXPONENT.get(a.dtype.name)
    if exponent is not None:  # NumPy converts each half to float32 to tell
        flat = flat.view(np.uint16)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if exponent is None:
            if not np.isfinite(part).all():
                return False
        elif int((part & np.uint16(exponent)).max()) == exponent:
            return False
    return True


def check_finite(a: NDArray[Any], name: str, where: object) -> None:
    """Refuse a weight that holds NaN or Inf."""
    if not is_finite(a):
        raise ValueError(f"{where}: tensor {name} holds NaN or Inf; repair the checkpoint")
