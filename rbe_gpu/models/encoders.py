"""The encoders that are built as BERT is, and where each differs: one `Encoder` for each `model_type`.

All have layers that normalise after attention and after the feed-forward part. They differ in the names of their
settings and tensors, in how tokens are numbered, and in what is added to the word embeddings and to the scores:

    bert, distilbert        position i of a text is i
    roberta and like it     position i is pad_token_id + 1 + i; tokens that are padding have position pad_token_id
    mpnet                   the same; and a bias by distance is added to the scores of attention (Raffel et al. 2020)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Encoder:
    """How the encoders of one `model_type` differ from BERT.

    Attributes
    ----------
    renamed : BERT's name of a setting -> its name in config.json, where that is another
    token_types : whether embeddings of token types are added
    padded_positions : whether positions are counted from pad_token_id + 1
    relative_positions : whether a bias by distance is added to the scores of attention
    eps : of layer normalisation, where config.json has none; `fixed_eps`: whatever it has
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    token_types: bool = True
    padded_positions: bool = False
    relative_positions: bool = False
    eps: float = 1e-12
    fixed_eps: bool = False


_ROBERTA = Encoder(padded_positions=True)
_DISTILBERT = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "hidden_act": "activation",
}
#: by model_type of config.json
ENCODERS: dict[str, Encoder] = {
    "bert": Encoder(),
    "distilbert": Encoder(_DISTILBERT, token_types=False, fixed_eps=True),
    "mpnet": Encoder(token_types=False, padded_positions=True, relative_positions=True),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
}
#: Of MPNet: classes of distances, and the distance from which on all keys are in one.
BUCKETS, _MAX_DISTANCE = 32, 128

_PREFIX = re.compile(rf"(?:{'|'.join(name.replace('-', '_') for name in ENCODERS)})\.")
#: parts of a layer: the name in checkpoints -> BERT's
_LAYER_PARTS = {
    # mpnet
    "attention.attn.q": "attention.self.query",
    "attention.attn.k": "attention.self.key",
    "attention.attn.v": "attention.self.value",
    "attention.attn.o": "attention.output.dense",
    "attention.LayerNorm": "attention.output.LayerNorm",
    # distilbert
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
_LAYER = re.compile(r"(?:encoder|transformer)\.layer\.(\d+)\.(.+)\.(\w+)")
#: old names of the parameters of a norm
_NORM = {"gamma": "weight", "beta": "bias"}


def encoder_of(config: Mapping[str, Any]) -> Encoder:
    """The description of the `model_type` of a config.json; without one it is BERT's.

    Raises
    ------
    ValueError : no such encoder
    """
    model_type = config.get("model_type", "bert")
    if not isinstance(model_type, str) or model_type not in ENCODERS:
        shown_type = str(model_type)[:60]
        raise ValueError(f"config.json has model_type {shown_type!r}; supported: {', '.join(ENCODERS)}")
    return ENCODERS[model_type]


def with_bert_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with its settings under BERT's names too."""
    encoder = encoder_of(config)
    named = {name: config[other] for name, other in encoder.renamed.items() if other in config}
    if not encoder.token_types:
        named["type_vocab_size"] = 0
    if encoder.fixed_eps or "layer_norm_eps" not in config:
        named["layer_norm_eps"] = encoder.eps
    return {**config, **named}


def canonical_name(name: str) -> str:
    """BERT's name of a tensor of a checkpoint, without the model's prefix (`bert.`)."""
    prefix = _PREFIX.match(name)
    name = name if prefix is None else name[prefix.end() :]
    module, _, parameter = name.rpartition(".")
    if module.endswith("LayerNorm"):
        name = f"{module}.{_NORM.get(parameter, parameter)}"
    layer = _LAYER.fullmatch(name)
    if layer is not None and layer[2] in _LAYER_PARTS:
        name = f"encoder.layer.{layer[1]}.{_LAYER_PARTS[layer[2]]}.{layer[3]}"
    return name


def first_position(config: Mapping[str, Any]) -> int:
    """The position of a text's first token."""
    return int(config.get("pad_token_id", 1)) + 1 if encoder_of(config).padded_positions else 0


def token_positions(
    ids: NDArray[np.int64], cu_seqlens: NDArray[np.int64], config: Mapping[str, Any]
) -> NDArray[np.int64]:
    """The position of every token of packed texts.

    Parameters
    ----------
    ids : (tokens,)
    cu_seqlens : (texts + 1,)
    """
    lengths = np.diff(cu_seqlens)
    first = first_position(config)
    if first == 0:
        return np.arange(ids.size) - np.repeat(cu_seqlens[:-1], lengths)
    # text may hold the token of padding: it is attended to, but has no position of its own
    counted = ids != first - 1
    count = np.concatenate(([0], np.cumsum(counted)))
    positions: NDArray[np.int64] = (
        (count[1:] - np.repeat(count[cu_seqlens[:-1]], lengths)) * counted + first - 1
    )
    return positions


def relative_bias(buckets: NDArray[Any], most: int) -> NDArray[np.float32]:
    """The bias by distance: [h, most - 1 + j - i] is added to the score of query i and key j.

    Half of the buckets are of keys behind the query. Of each half, half are of one distance each, and the others
    divide the distances up to 128 logarithmically.

    Parameters
    ----------
    buckets : (BUCKETS, heads), the tensor `relative_attention_bias`
    most : tokens of the longest text

    Returns
    -------
    (heads, 2 most - 1)
    """
    half = BUCKETS // 2
    single = half // 2
    distance = np.arange(1 - most, most)
    far = np.abs(distance)
    # in float32, as the buckets' borders were drawn in training
    scaled = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(single)) / np.float32(
        np.log(_MAX_DISTANCE / single)
    )
    large = np.minimum(single + (scaled * np.float32(half - single)).astype(np.int64), half - 1)
    bucket = np.where(far < single, far, large) + half * (distance > 0)
    return np.ascontiguousarray(np.asarray(buckets, np.float32)[bucket].T)
