"""BERT (Devlin et al. 2019) and the encoders that are built as it is (`encoders`), and the sentence embeddings made
from them (Reimers and Gurevych 2019).

    x_0     = LayerNorm(word[id] + position[i] + type[t])
    a       = LayerNorm(attention(x_l) + x_l)
    x_(l+1) = LayerNorm(down(activation(up(a))) + a)
    embedding = x_L pooled over the tokens, through Dense modules, divided by its L2 norm where the model says so

The texts of a batch are packed end to end, without padding; a text has the same result alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..blocks import Array, RBEBlocks
from ..cache import PanelCache
from ..dispatch import device_memory_errors, device_of, module_of, to_host
from ..layers import RBEFFN, RBEAttention, RBEEmbedding, RBELayerNorm, RBELinear
from ..workspace import ThreadWorkspaces, Workspace
from . import dense_modules
from .bert_config import ACTIVATIONS, check_config
from .bert_tensors import ATTENTION_WEIGHTS, FFN_WEIGHTS, RELATIVE, TYPES, check_tensors, linear_weights
from .dense_modules import DenseModule
from .encoders import (
    canonical_name,
    first_position,
    relative_bias,
    token_positions,
    with_bert_names,
)
from .few_tokens import few_tokens
from .folder import POOLING as POOLING
from .int8_check import check_int8_activations
from .pooling import cu_seqlens_of
from .text_embedder import TextEmbedder

if TYPE_CHECKING:
    from .graph import EncoderGraph

F32 = NDArray[np.float32]
Tensors = Mapping[str, "Array | RBEBlocks"]

#: Dtypes of hidden states.
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class _Batch:
    """Texts as the encoder reads them, on its device.

    Attributes
    ----------
    ids, positions, types : integers, packed (tokens,), or padded (batch, seq)
    sequences : arguments of `RBEAttention`: mask=, cu_seqlens= of packed texts, lengths= of padded ones
    """

    ids: Array
    positions: Array
    types: Array
    sequences: dict[str, Array | None]


class BertEncoder(TextEmbedder):
    """A BERT encoder with dense or compressed weights. `rbe_gpu.load` creates one from a folder or a file.

    Parameters
    ----------
    tensors : name -> array (float32, float16 or bfloat16) or RBEMatrix/RBEVectors, named as in the
        checkpoint, with or without `bert.`; tensors that the encoder does not use (the pooler, heads) are
        ignored
    config : config.json
    tokenizer : a `tokenizers.Tokenizer`, or None if only `forward` is used
    pooling : 1_Pooling/config.json, or None for the mean
    normalize : whether embeddings are divided by their L2 norm
    max_seq_length : texts are truncated to this many tokens, at most max_position_embeddings
    cache_bytes : memory for decoded float32 panels of compressed linear weights. With 0 nothing is cached: matmuls
        work on the codes. Otherwise a matmul caches as many panels of its weight as fit, if the cost model
        (`rbe_gpu.matmul`) estimates that to be faster; the size of the dense linear weights is enough for all of
        them. Embedding tables are never cached
    dtype : of the hidden states: "float32", "float16" or "bfloat16"; accumulation is always float32. For a half type
        dense matrices are converted to it, as tensor cores need; for "float32" they keep the dtype of the checkpoint.
        Biases and norms are always float32
    prompts : name -> text that `embed` puts before texts; "query" and "document" are always there, perhaps empty
    default_prompt_name : the prompt of `embed` if none is given
    truncate_dim : vectors of `embed` keep this many first columns
    int8_activations : names of the linear weights whose inputs are rounded to int8 (`rbe_gpu.linear`), as in
        `linear_weights`; compressed ones
    copy_tokenizer : False if nobody else holds `tokenizer`, whose truncation and padding the encoder sets; a copy
        takes 30 to 60 ms for 30,522 words
    dense : Dense modules, which pooled vectors pass before they are normalised

    Attributes
    ----------
    cache : PanelCache, with `hits`, `misses` and `nbytes`
    nbytes : bytes of the weights in memory, without `cache` and `workspace`
    workspace : scratch memory, kept between batches

    Notes
    -----
    Several Python threads may use one model at once: each has a workspace of its own. The layers are not to be
    changed: arguments of their kernels are kept. `with_tensors` makes a model with other weights.
    """

    def __init__(
        self,
        tensors: Tensors,
        config: Mapping[str, Any],
        tokenizer: Any = None,
        pooling: Mapping[str, Any] | None = None,
        normalize: bool = True,
        max_seq_length: int | None = None,
        cache_bytes: int = 0,
        dtype: str = "float32",
        prompts: Mapping[str, str | None] | None = None,
        default_prompt_name: str | None = None,
        truncate_dim: int | None = None,
        int8_activations: Collection[str] = (),
        copy_tokenizer: bool = True,
        dense: Sequence[DenseModule] = (),
    ) -> None:
        check_config(config)
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not supported; use one of {tuple(DTYPES)}")
        check_tensors({name: tensor.shape for name, tensor in tensors.items()}, config)
        named = {canonical_name(name): tensor for name, tensor in tensors.items()}
        config = with_bert_names(config)
        positions = config["max_position_embeddings"] - first_position(config)

        self.config = dict(config)
        self.dtype = DTYPES[dtype]
        self.hidden_size: int = config["hidden_size"]
        self.cache = PanelCache(cache_bytes)
        self._workspaces = ThreadWorkspaces()
        if copy_tokenizer:
            tokenizer = deepcopy(tokenizer)
        self._set_up_texts(
            tokenizer,
            pooling,
            normalize,
            max_seq_length,
            positions,
            prompts,
            default_prompt_name,
            truncate_dim,
            dense,
        )
        self.int8_activations = frozenset(map(canonical_name, int8_activations))
        check_int8_activations(self.int8_activations, named, linear_weights(config))
        self._build(named)

    def _build(self, named: Tensors) -> None:
        def vector(name: str) -> Array:
            """A bias or a parameter of a norm, float32."""
            tensor = named[name]
            if isinstance(tensor, RBEBlocks):
                return tensor.decode()
            return cast(Array, module_of(tensor).ascontiguousarray(tensor, dtype=np.float32))

        def matrix(name: str) -> Array | RBEBlocks:
            tensor = named[name]
            if isinstance(tensor, RBEBlocks):
                return tensor
            dtype = tensor.dtype if self.dtype == np.float32 else self.dtype
            return cast(Array, module_of(tensor).ascontiguousarray(tensor, dtype=dtype))

        def linear(name: str) -> RBELinear:
            return RBELinear(
                matrix(name + ".weight"),
                vector(name + ".bias"),
                cache=self.cache if self.cache.budget else None,
                activation_bits=8 if name + ".weight" in self.int8_activations else None,
                for_int8=True,
            )

        def table(name: str) -> RBEEmbedding:
            return RBEEmbedding(matrix(name), self.dtype, for_lookup=True)

        eps = float(self.config["layer_norm_eps"])

        def norm(name: str) -> RBELayerNorm:
            return RBELayerNorm(vector(name + ".LayerNorm.weight"), vector(name + ".LayerNorm.bias"), eps)

        heads = self.config["num_attention_heads"]
        activation = ACTIVATIONS[self.config.get("hidden_act", "gelu")]
        self.word_embeddings = table("embeddings.word_embeddings.weight")
        self.position_embeddings = table("embeddings.position_embeddings.weight")
        self.token_type_embeddings: RBEEmbedding | None = None
        if TYPES in named:  # of few rows: always dense
            self.token_type_embeddings = RBEEmbedding(vector(TYPES).astype(self.dtype, copy=False))
        self.relative_attention_bias: Array | None = None
        self._bias_by_distance: Array | None = None
        if RELATIVE in named:
            self.relative_attention_bias = vector(RELATIVE)
            by_distance = relative_bias(to_host(self.relative_attention_bias), self.max_positions)
            self._bias_by_distance = module_of(self.relative_attention_bias).asarray(by_distance)
        self.embedding_norm = norm("embeddings")
        self.layers: list[tuple[RBEAttention, RBELayerNorm, RBEFFN, RBELayerNorm]] = []
        for i in range(self.config["num_hidden_layers"]):
            at = f"encoder.layer.{i}."
            query, key, value = (linear(f"{at}attention.self.{n}") for n in ("query", "key", "value"))
            output = linear(at + "attention.output.dense")
            self.layers.append(
                (
                    RBEAttention(query, key, value, output, heads),
                    norm(at + "attention.output"),
                    RBEFFN(
                        linear(at + "intermediate.dense"), linear(at + "output.dense"), activation=activation
                    ),
                    norm(at + "output"),
                )
            )

    def tensors(self) -> dict[str, Array | RBEBlocks]:
        """The tensors of the model, with the dtypes that it computes with, named as in `tensor_shapes` and
        `dense_modules.tensor_names`.
        """
        named: dict[str, Array | RBEBlocks] = {
            "embeddings.word_embeddings.weight": self.word_embeddings.weight,
            "embeddings.position_embeddings.weight": self.position_embeddings.weight,
        }
        if self.token_type_embeddings is not None:
            named[TYPES] = self.token_type_embeddings.weight
        if self.relative_attention_bias is not None:
            named[RELATIVE] = self.relative_attention_bias

        def add_norm(name: str, norm: RBELayerNorm) -> None:
            named[f"{name}.LayerNorm.weight"], named[f"{name}.LayerNorm.bias"] = norm.weight, norm.bias

        add_norm("embeddings", self.embedding_norm)
        for i, (attention, attention_norm, ffn, ffn_norm) in enumerate(self.layers):
            at = f"encoder.layer.{i}."
            for part, attributes in ((attention, ATTENTION_WEIGHTS), (ffn, FFN_WEIGHTS)):
                for attribute, name in attributes.items():
                    linear = getattr(part, attribute)
                    named[at + name], named[at + name.removesuffix("weight") + "bias"] = (
                        linear.weight,
                        linear.bias,
                    )
            add_norm(at + "attention.output", attention_norm)
            add_norm(at + "output", ffn_norm)
        return {**named, **dense_modules.tensors_of(self.dense)}

    def with_tensors(self, tensors: Tensors) -> BertEncoder:
        """The same model with some tensors replaced, and no int8 activations."""
        model = copy(self)
        model.int8_activations = frozenset()
        model.cache, model._workspaces = PanelCache(self.cache.budget), ThreadWorkspaces()
        named = {**self.tensors(), **{canonical_name(name): tensor for name, tensor in tensors.items()}}
        model._build(named)
        model.dense = dense_modules.with_tensors(self.dense, named)
        return model

    def with_int8_activations(self, names: Collection[str]) -> BertEncoder:
        """The same model, with the same weights, cache and tokenizer, with int8 activations for the linear weights of
        these names alone.
        """
        names = frozenset(map(canonical_name, names))
        model = copy(self)
        model.int8_activations, model._workspaces = names, ThreadWorkspaces()
        model.layers = []
        weights: dict[str, Any] = {}
        for i, (attention, attention_norm, ffn, ffn_norm) in enumerate(self.layers):
            attention, ffn = copy(attention), copy(ffn)
            for part, attributes in ((attention, ATTENTION_WEIGHTS), (ffn, FFN_WEIGHTS)):
                for attribute, name in attributes.items():
                    name = f"encoder.layer.{i}.{name}"
                    linear = getattr(part, attribute)
                    weights[name] = (
                        linear.weight
                    )  # as it is held: where both round x, both models have this one
                    linear = copy(linear)
                    linear.activation_bits = 8 if name in names else None
                    setattr(part, attribute, linear)
            model.layers.append((attention, attention_norm, ffn, ffn_norm))
        check_int8_activations(names, weights, linear_weights(self.config))
        return model

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory, without the cache and the workspace."""
        embeddings = (
            self.word_embeddings, self.position_embeddings, self.token_type_embeddings, self.embedding_norm,
            self.relative_attention_bias, self._bias_by_distance,
        )  # fmt: skip
        parts = (part for layer in (*self.layers, (m.linear for m in self.dense)) for part in layer)
        return sum(part.nbytes for part in (*embeddings, *parts) if part is not None)

    @property
    def max_positions(self) -> int:
        """Tokens of the longest text."""
        return int(self.config["max_position_embeddings"]) - first_position(self.config)

    def attention_mask(self, seq: int | None = None) -> Array | None:
        """What is added to the scores of attention by the distance of query and key, a view; None for nothing.

        Returns
        -------
        (num_heads, seq, seq) float32, `max_positions` for None: of packed texts, whose tokens are numbered from 0
        """
        by_distance = self._bias_by_distance
        if by_distance is None:
            return None
        seq, most = self.max_positions if seq is None else seq, self.max_positions
        row, step = by_distance.strides
        as_strided = module_of(by_distance).lib.stride_tricks.as_strided
        return cast(
            Array,
            as_strided(by_distance[:, most - 1 :], (by_distance.shape[0], seq, seq), (row, -step, step)),
        )

    @property
    def workspace(self) -> Workspace:
        """Scratch memory of calls from this Python thread that bring none."""
        return self._workspaces.own

    @property
    def vocab_size(self) -> int:
        """Rows of the word embeddings."""
        return int(self.config["vocab_size"])

    @property
    def device(self) -> str:
        """The device of the weights, on which batches run: "cpu" or "cuda:0". `rbe_gpu.to` moves a model."""
        return device_of(self.word_embeddings.weight)

    # --- hidden states --------------------------------------------------------------------------------

    @device_memory_errors()
    def forward(
        self,
        ids: Array,
        lengths: Array | None = None,
        token_type_ids: Array | None = None,
        all_hidden_states: bool = False,
        out: Array | None = None,
        workspace: Workspace | None = None,
    ) -> Array | tuple[Array, ...]:
        """Hidden states of a padded batch.

        NumPy arrays are checked and packed on the host, so that padding is not computed. CuPy arrays of a model on
        the same GPU are used in place: no host synchronisation, and with `out` the second call with a shape allocates
        nothing, so that the work can be captured (`graph`); but padding is computed, and values are not checked.

        Parameters
        ----------
        ids : (batch, seq) integers, 0 <= id < vocab_size except in the padding. In a CuPy array, other ids give NaN
        lengths : (batch,) integers, tokens of each text, padding on the right; None: no padding. With CuPy ids a CuPy
            array, clamped to 0 ... seq
        token_type_ids : (batch, seq) integers; None: all 0
        all_hidden_states : return the states after the embeddings and after each layer, not only the last
        out : (batch, seq, hidden) of the model's dtype, on its device, for the last states
        workspace : scratch memory; None: the model's own

        Returns
        -------
        (batch, seq, hidden) of the model's dtype, on its device, or a tuple of num_hidden_layers + 1 of them.
        Positions of padding are 0; those of CuPy arrays are undefined.
        """
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise TypeError(f"ids is {ids.dtype} of shape {ids.shape}; use integers of shape (batch, seq)")
        if token_type_ids is not None and token_type_ids.shape != ids.shape:
            raise ValueError(f"token_type_ids has shape {token_type_ids.shape}, ids has {ids.shape}")
        shape = (*ids.shape, self.hidden_size)
        ws = (workspace or self.workspace).on(self.device)
        if out is not None and (out.shape != shape or out.dtype != self.dtype):
            raise ValueError(
                f"out is {out.dtype} of shape {out.shape}, expected {self.dtype} of shape {shape}"
            )
        if self.device != "cpu" and device_of(ids, "ids") != "cpu":
            return self._forward_padded(ids, lengths, token_type_ids, all_hidden_states, out, ws)
        ids, lengths, token_type_ids = (to_host(a) for a in (ids, lengths, token_type_ids))
        batch, seq = ids.shape
        if lengths is None:
            lengths = np.full(batch, seq, np.int64)
        if lengths.shape != (batch,) or lengths.dtype.kind not in "iu":
            raise ValueError(
                f"lengths is {lengths.dtype} of shape {lengths.shape}; use integers of shape ({batch},)"
            )
        if batch and (int(lengths.min()) < 0 or int(lengths.max()) > seq):
            raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}; use 0 to seq={seq}")
        lengths = lengths.astype(np.int64, copy=False)
        text = np.arange(seq) < lengths[:, None]
        types = None if token_type_ids is None else token_type_ids[text].astype(np.int64)
        packed = self._pack(ids[text].astype(np.int64), lengths, types, ws)
        rows = self._placed("bert.rows", np.flatnonzero(text), ws)
        results = []
        for index, states in enumerate(self._states(packed, ws)):
            last = index == len(self.layers)
            if last or all_hidden_states:
                if out is not None and last:
                    padded = out
                    padded.view(np.uint8)[...] = 0
                else:
                    padded = module_of(states).zeros(shape, self.dtype)
                padded.reshape(batch * seq, self.hidden_size)[rows] = states
                results.append(padded)
        return tuple(results) if all_hidden_states else results[-1]

    def _forward_padded(
        self,
        ids: Array,
        lengths: Array | None,
        token_type_ids: Array | None,
        all_hidden_states: bool,
        out: Array | None,
        ws: Workspace,
    ) -> Array | tuple[Array, ...]:
        """`forward` of arrays on the GPU of the model."""
        batch, seq = ids.shape
        limit = self.max_positions
        if device_of(ids) != self.device:
            raise TypeError(
                f"ids are on {device_of(ids)}, the model is on {self.device}; use rbe_gpu.to(ids, {self.device!r})"
            )
        if seq > limit:
            raise ValueError(f"ids have {seq} positions, the model has {limit}; truncate them")
        positions = ws.constants.get(
            "bert.padded_positions",
            (*ids.shape, first_position(self.config)),
            lambda: np.tile(np.arange(seq) + first_position(self.config), (batch, 1)),
        )
        if token_type_ids is None:
            token_type_ids = ws.constants.get(
                "bert.zero_types", ids.shape, lambda: np.zeros(ids.shape, np.int64)
            )
        if out is None:
            out = module_of(ids).empty((batch, seq, self.hidden_size), self.dtype)
        padded = _Batch(
            ids, positions, token_type_ids, {"lengths": lengths, "mask": self.attention_mask(seq)}
        )
        if not all_hidden_states:
            for _ in self._states(padded, ws, out):
                pass
            return out
        *hidden, _ = (states.copy() for states in self._states(padded, ws, out))
        return (*hidden, out)

    def _pack(
        self, ids: NDArray[np.int64], lengths: NDArray[Any], types: NDArray[np.int64] | None, ws: Workspace
    ) -> _Batch:
        """Packed texts: ids and types (tokens,), NumPy arrays."""
        longest = int(lengths.max()) if lengths.size else 0
        limit = self.max_positions
        if longest > limit:
            raise ValueError(f"a text has {longest} tokens, the model has {limit} positions; truncate it")
        cu_seqlens = cu_seqlens_of(lengths)
        positions = token_positions(ids, cu_seqlens, self.config)
        return _Batch(
            self._placed("bert.ids", ids, ws),
            self._placed("bert.positions", positions, ws),
            self._placed("bert.type_ids", np.zeros_like(ids) if types is None else types, ws),
            {"cu_seqlens": self._placed("bert.cu_seqlens", cu_seqlens, ws), "mask": self.attention_mask()},
        )

    def _states(self, batch: _Batch, ws: Workspace, out: Array | None = None) -> Iterator[Array]:
        """Hidden states after the embeddings and after each layer, (*ids.shape, hidden), the last in `out`.

        They are in scratch memory: read each before asking for the next.
        """
        shape = (*batch.ids.shape, self.hidden_size)
        x, y = ws.get("bert.x", shape, self.dtype), ws.get("bert.y", shape, self.dtype)
        self._embed(batch, x, y, ws)
        yield x
        for index, (attention, attention_norm, ffn, ffn_norm) in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            target = x if out is None or not last else out
            attention(x, residual=x, out=y, workspace=ws, **batch.sequences)
            attention_norm(y, out=y, workspace=ws)
            ffn(y, residual=y, out=target, workspace=ws)
            ffn_norm(target, out=target, workspace=ws)
            yield target

    def _embed(self, batch: _Batch, x: Array, y: Array, ws: Workspace) -> None:
        """The normalised embeddings of a batch, to x; y : scratch memory of the same shape and dtype."""
        self._rows(self.word_embeddings, batch.ids, x, ws)
        self._rows(self.position_embeddings, batch.positions, y, ws)
        if self.token_type_embeddings is not None:
            types = ws.get("bert.types", y.shape, y.dtype)
            self._rows(self.token_type_embeddings, batch.types, types, ws)
            ops.add(y, types, out=y)
        self.embedding_norm(x, residual=y, out=x, workspace=ws)

    def _rows(self, table: RBEEmbedding, ids: Array, out: Array, ws: Workspace) -> None:
        """Rows of a table, in the dtype of `out`."""
        if table.dtype == out.dtype:
            table(ids, out=out, workspace=ws)
        else:
            stored = ws.get("bert.stored_rows", out.shape, table.dtype)
            out[...] = table(ids, out=stored, workspace=ws)

    def _text_states(
        self, ids: NDArray[np.int64], lengths: NDArray[np.int64], ws: Workspace
    ) -> tuple[Array, Array]:
        packed = self._pack(ids, lengths, None, ws)
        cu_seqlens = cast(Array, packed.sequences["cu_seqlens"])
        states = few_tokens(self, lambda x, y: self._embed(packed, x, y, ws), cu_seqlens, ws)
        if states is None:
            *_, states = self._states(packed, ws)
        return states, cu_seqlens

    def graph(self, batch: int, seq: int) -> EncoderGraph:
        """Capture the encoder and the pooling for texts of up to `seq` tokens as a CUDA graph."""
        from .graph import EncoderGraph

        return EncoderGraph(self, batch, seq)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"BertEncoder({c['num_hidden_layers']} layers, hidden {c['hidden_size']}, "
            f"{c['num_attention_heads']} heads, vocabulary {c['vocab_size']}, "
            f"{'+'.join(self.pooling)} pooling, {self.dtype.name} states, {self.nbytes / 1e6:.1f} MB of weights, "
            f"cache of {self.cache.budget / 1e6:.1f} MB)"
        )
