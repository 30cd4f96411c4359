"""The check of the weights whose inputs are to be rounded to int8."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ..blocks import Array, RBEBlocks
from ..matmul import int8_support


def check_int8_activations(
    names: Collection[str], named: Mapping[str, Array | RBEBlocks], linear_weights: Iterable[str]
) -> None:
    """Raise a ValueError for a name that is no linear weight, or whose weight does not take int8 activations.

    Parameters
    ----------
    named : the tensors of the model
    linear_weights : the names of all its linear weights
    """
    unknown = set(names) - set(linear_weights)
    if unknown:
        raise ValueError(f"int8_activations names {min(unknown)!r}, which is no linear weight of the model")
    for name in sorted(names):
        check_takes_int8(named[name], f"{name} takes no int8 activations: ")


def check_takes_int8(weight: Array | RBEBlocks, where: str = "") -> None:
    """Raise a ValueError, which begins with `where`, unless a matmul takes the weight with int8 activations."""
    supported, why = int8_support(weight)
    if not supported:
        raise ValueError(f"{where}activation_bits=8 cannot multiply this weight: {why}")
