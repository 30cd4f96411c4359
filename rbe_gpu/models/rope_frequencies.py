"""The frequencies of rotary position embeddings that a config.json describes.

    f_j = theta^(-2j / head_dim), j < head_dim / 2                      "default" (Su et al. 2021)
    f_j / factor                                                        "linear" (Chen et al. 2023)
    f_j / factors[j]                                                    "factors", as GGUF files hold them
    f_j, f_j / factor, or a mixture, by the wavelength 2 pi / f_j       "llama3" (Grattafiori et al. 2024)
    f_j, f_j / factor, or a mixture, by j                               "yarn" (Peng et al. 2023)
    f_j / short_factor[j], of texts within the first context,           "longrope" (Ding et al. 2024)
    f_j / long_factor[j] of others

Computed in float32, as models were trained. YaRN and LongRoPE also multiply cosines and sines (`rope_amplitude`). For
head_dim stands the part of it that is rotated (`rotary_dim`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import ceil, floor, log, pi, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .settings import fail, shown

if TYPE_CHECKING:
    from .decoders import Family

F32 = NDArray[np.float32]
_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "factors": (),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings", "factor"),
}
#: what is supported of most models
KINDS = tuple(kind for kind in _NUMBERS if kind != "longrope")
#: lists of positive numbers, one for each pair of features
_LISTS = {"factors": ("factors",), "longrope": ("short_factor", "long_factor")}
#: numbers that a kind may have, positive, or null
_OPTIONAL = {
    "longrope": ("attention_factor",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
#: keys that are read of every kind
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope_parameters(config: Mapping[str, Any], layer_type: str, family: Family) -> dict[str, Any]:
    """The rotary embedding of the layers of a type: "rope_type", "rope_theta" and what the kind needs.

    As transformers 5 reads it: `rope_scaling`, if there is one, else `rope_parameters`, which of Gemma and ModernBERT
    is one object for each type of layers. Older files have theta beside them: `rope_theta`, and of these two one key
    for each type of layers.

    Parameters
    ----------
    layer_type : "full_attention" or "sliding_attention"
    family : its `theta`, `thetas`, `scaled_local` and `renamed` are read

    Raises
    ------
    ValueError
        A base is null, or what is said of the rotary embedding is no object, or is said twice.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(name) or {}
    if not isinstance(values, Mapping):
        fail("config.json", name, values, "an object")
    if family.thetas is None:
        own = {"rope_theta": _theta(config, "rope_theta", family.theta, family.renamed.get("rope_theta"))}
        if family.partial_rotary:
            own["partial_rotary_factor"] = config.get("partial_rotary_factor", 1.0)
        return _completed({**own, **values}, config)
    if config.get("rope_scaling") and config.get("rope_parameters"):
        fail("config.json", "rope_scaling", values, "absent, beside rope_parameters")
    sliding = layer_type == "sliding_attention"
    if any(isinstance(part, Mapping) for part in values.values()):
        values = values.get(layer_type) or {}
        if not isinstance(values, Mapping):
            fail("config.json", f"{name}.{layer_type}", values, "an object")
    elif name == "rope_parameters" and values:
        fail("config.json", name, dict(values), "an object for each type of layers")
    elif sliding and not family.scaled_local:
        values = {}
    key, default = family.thetas[layer_type]
    return _completed({"rope_theta": _theta(config, key, default), **values}, config)


def _theta(config: Mapping[str, Any], key: str, default: float, own_name: str | None = None) -> Any:
    """The base of the frequencies, which a config.json may call by a name of its own."""
    name = own_name if own_name is not None and own_name in config else key
    value = config.get(name, default)
    if value is None:
        fail("config.json", name, value, "a positive number")
    return value


def _kind(parameters: Mapping[str, Any]) -> Any:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return "longrope" if kind == "su" else kind  # its first name


def rotary_dim(parameters: Mapping[str, Any], head_dim: int) -> int:
    """How many features of a head are rotated, the first ones."""
    share = parameters.get("partial_rotary_factor")
    return head_dim if share is None else int(head_dim * share)


def _completed(parameters: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """With the context that YaRN and LongRoPE extend, where it is not named."""
    kind, most = _kind(parameters), config.get("max_position_embeddings")
    if kind == "yarn":
        parameters.setdefault("original_max_position_embeddings", most)
    if kind == "longrope":  # of Phi-3, which has it beside
        context = config.get("original_max_position_embeddings", 4096)
        parameters["original_max_position_embeddings"] = context
        if parameters.get("factor") is None and type(context) is int and context > 0 and type(most) is int:
            parameters["factor"] = most / context
    return parameters


def check_positive(name: str, value: Any) -> None:
    """Raise a ValueError unless a value of config.json is a positive number within the range of float32."""
    number = type(value) in (int, float) and 1e-30 < value < 1e30
    if not number:
        fail("config.json", name, value, "a positive number")


def check_rope(
    parameters: Mapping[str, Any], head_dim: int, kinds: Collection[str] = KINDS, partial: bool = False
) -> None:
    """Raise a ValueError for a rotary embedding that is not one of `kinds`, or not supported, naming what it is.

    partial : whether a part of a head may be rotated
    """
    kind = _kind(parameters)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"config.json has the rotary embedding {shown(kind)} (rope_scaling); supported: {', '.join(kinds)}"
        )
    optional = _OPTIONAL.get(kind, ())
    others = (*_LISTS.get(kind, ()), *(("truncate",) if kind == "yarn" else ()))
    known = {*_COMMON, *_NUMBERS[kind], *optional, *others}
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise ValueError(
            f"config.json has {unknown[0]}={shown(parameters[unknown[0]])} of rope_scaling, which {kind!r} has not"
        )
    share = parameters.get("partial_rotary_factor", 1.0)
    if not partial and share not in (None, 1.0):
        fail("config.json", "partial_rotary_factor", share, "1: whole heads are rotated")
    if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
        fail("config.json", "partial_rotary_factor", share, "a number above 0, at most 1")
    rotated = rotary_dim(parameters, head_dim)
    if rotated < 2 or rotated % 2:
        fail("config.json", "partial_rotary_factor", share, f"an even part of head_dim={head_dim}")
    for name in ("rope_theta", *_NUMBERS[kind]):
        check_positive(f"{name} of the rotary embedding", parameters.get(name))
    for name in optional:
        absent = (None, 0) if name.startswith("mscale") else (None,)
        if parameters.get(name) not in absent:
            check_positive(f"{name} of the rotary embedding", parameters[name])
    if kind == "yarn" and parameters["rope_theta"] <= 1:
        fail("config.json", "rope_theta of the rotary embedding", parameters["rope_theta"], "more than 1")
    if parameters.get("truncate", True) is not True:
        fail("config.json", "truncate of the rotary embedding", parameters["truncate"], "true")
    if kind == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        fail("config.json", "low_freq_factor", parameters["low_freq_factor"], "less than high_freq_factor")
    for name in _LISTS.get(kind, ()):
        factors = parameters.get(name)
        if (
            not isinstance(factors, list)
            or len(factors) != rotated // 2
            or not all(type(f) in (int, float) and 1e-30 < f < 1e30 for f in factors)
        ):
            fail("config.json", f"rope_scaling.{name}", factors, f"{rotated // 2} positive numbers")
    if kind == "longrope" and parameters["original_max_position_embeddings"] <= 1:
        fail("config.json", "original_max_position_embeddings", 1, "more than 1")


def rope_frequencies(parameters: Mapping[str, Any], head_dim: int, long: bool = False) -> F32:
    """Radians per position, (rotary_dim/2,), of parameters that `check_rope` has let through.

    long : of texts beyond `first_context`
    """
    head_dim = rotary_dim(parameters, head_dim)
    theta = np.float32(parameters["rope_theta"])
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.asarray(np.float32(1.0) / theta**exponent, np.float32)
    kind = _kind(parameters)
    if kind == "linear":
        return np.asarray(frequencies / np.float32(parameters["factor"]))
    if kind == "factors":
        return np.asarray(frequencies / np.asarray(parameters["factors"], np.float32))
    if kind == "llama3":
        return _llama3(frequencies, parameters)
    if kind == "yarn":
        return _yarn(frequencies, parameters, head_dim)
    if kind == "longrope":
        factors = np.asarray(parameters["long_factor" if long else "short_factor"], np.float32)
        return np.asarray(np.float32(1.0) / (factors * theta**exponent), np.float32)
    return frequencies


def first_context(parameters: Mapping[str, Any]) -> int | None:
    """Tokens up to which a text has the frequencies of short ones; None: all texts have the same frequencies."""
    context = parameters["original_max_position_embeddings"] if _kind(parameters) == "longrope" else None
    return None if context is None else int(context)


def rope_amplitude(parameters: Mapping[str, Any]) -> float:
    """What cosines and sines are multiplied with, of parameters that `check_rope` has let through."""
    kind = _kind(parameters)
    if kind not in ("yarn", "longrope"):
        return 1.0
    attention_factor = parameters.get("attention_factor")
    if attention_factor is not None:
        return float(attention_factor)
    if kind == "longrope":
        factor, context = parameters["factor"], parameters["original_max_position_embeddings"]
        return 1.0 if factor <= 1 else sqrt(1 + log(factor) / log(context))

    def of(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * log(scale) + 1.0

    factor, mscale, all_dim = (parameters.get(name) for name in ("factor", "mscale", "mscale_all_dim"))
    assert factor is not None
    return of(factor, mscale) / of(factor, all_dim) if mscale and all_dim else of(factor)


def _llama3(frequencies: F32, parameters: Mapping[str, Any]) -> F32:
    """Long wavelengths divided by `factor`, short ones as they are, and between them a mixture."""
    factor, low, high, context = (np.float32(parameters[name]) for name in _NUMBERS["llama3"])
    wavelength = np.float32(2 * pi) / frequencies
    # from 0 where the context holds `low` wavelengths to 1 where it holds `high`
    share = np.clip((context / wavelength - low) / (high - low), np.float32(0), np.float32(1))
    return np.asarray((1 - share) * frequencies / factor + share * frequencies, np.float32)


def _yarn(frequencies: F32, parameters: Mapping[str, Any], head_dim: int) -> F32:
    """Pairs that turn `beta_fast` times within the context as they are, those of `beta_slow` divided by `factor`."""
    theta, context = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    fast, slow = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1

    def pair_of(turns: float) -> float:
        return float(head_dim * log(context / (turns * 2 * pi)) / (2 * log(theta)))

    low = max(floor(pair_of(fast)), 0)
    high = min(ceil(pair_of(slow)), head_dim - 1)
    ramp = np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)
    share = 1 - np.clip(ramp / np.float32(high - low or 0.001), np.float32(0), np.float32(1))
    divided = frequencies / np.float32(parameters["factor"])
    return np.asarray(divided * (1 - share) + frequencies * share, np.float32)
