"""The projections of an attention that stays in the transform domain of its weights.

An orthonormal transform S changes no score of a query and a key, and the input transform of the output projection
undoes the output transform of the values:

    (S^T q) . (S^T k) = q . k                               block by block of a head
    W_o concat_h sum_j p_hj v_hj = (W_o S) concat_h sum_j p_hj (S^T v_hj)

so that two of eight transforms are left: that of the input of query, key and value, and that of the result.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from .. import transforms
from ..blocks import Array, RBEMatrix
from ..dispatch import device_of, move_array
from .rbe_linear import RBELinear


class TransformDomainAttention:
    """Projections whose queries, keys, values and heads are transform coefficients.

    Parameters
    ----------
    query, key, value, output : the projections of an `RBEAttention`, which `supports` accepts; their weights are
        shared, with one of the transforms switched off

    Attributes
    ----------
    query, key, value : no output transform, biases transformed
    output : no input transform
    """

    def __init__(self, query: RBELinear, key: RBELinear, value: RBELinear, output: RBELinear) -> None:
        self._made_of = _state(query, key, value, output)
        self.query = _to_coefficients(query)
        self.key = _to_coefficients(key)
        self.value = _to_coefficients(value)
        self.output = RBELinear(
            cast(RBEMatrix, output.weight).without_transform("col"),
            output.bias,
            output.activation,
            method=output.method,
            activation_bits=output.activation_bits,
        )

    def is_derived_from(self, query: RBELinear, key: RBELinear, value: RBELinear, output: RBELinear) -> bool:
        """Whether the projections are those that this object was made from, unchanged."""
        state = _state(query, key, value, output)
        return all(a is b for a, b in zip(self._made_of, state, strict=True))

    @staticmethod
    def supports(
        query: RBELinear, key: RBELinear, value: RBELinear, output: RBELinear, head_dim: int
    ) -> bool:
        """Whether all weights are matrices without a basis and of one orthonormal transform, whose block divides
        head_dim.
        """
        weights = [part.weight for part in (query, key, value, output)]
        if not all(isinstance(w, RBEMatrix) and w.basis is None for w in weights):
            return False
        first = weights[0]
        return (
            all(w.row_transformed and w.col_transformed for w in weights)
            and all(part.activation is None for part in (query, key, value))
            and len({(w.transform, w.block) for w in weights}) == 1
            and first.transform != "none"
            and transforms.is_orthonormal(first.transform)
            and head_dim % first.block == 0
        )


def _state(*projections: RBELinear) -> tuple[Any, ...]:
    return tuple(
        v for p in projections for v in (p.weight, p.bias, p.activation, p.method, p.activation_bits)
    )


def _to_coefficients(linear: RBELinear) -> RBELinear:
    """The projection without its output transform."""
    weight = cast(RBEMatrix, linear.weight)
    bias = None if linear.bias is None else _transformed(linear.bias, weight)
    return RBELinear(
        weight.without_transform("row"), bias, method=linear.method, activation_bits=linear.activation_bits
    )


def _transformed(bias: Array, weight: RBEMatrix) -> Array:
    """S^T b of each block, float32, where the bias is."""
    s = transforms.synthesis(weight.transform, weight.block)
    blocks = move_array(bias, "cpu").astype(np.float64).reshape(-1, weight.block)
    return move_array((blocks @ s).reshape(-1).astype(np.float32), device_of(bias, "bias"))
