"""BERT encoders (Devlin et al. 2019) and the sentence embeddings made from them (Reimers and Gurevych 2019).

    x_0     = LayerNorm(word[id] + position[i] + type[t])
    a       = LayerNorm(attention(x_l) + x_l)
    x_(l+1) = LayerNorm(down(activation(up(a))) + a)
    embedding = pool over tokens (x_L), divided by its norm when the model says so

All tokens of a batch are packed end to end: padding is never computed, so a text gives the same result alone
and in any batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..blocks import Array, RBEBlocks
from ..cache import PanelCache
from ..dispatch import device_memory_errors, device_of, module_of
from ..layers import RBEFFN, RBEAttention, RBEEmbedding, RBELayerNorm, RBELinear
from ..transforms import BLOCK_SIZES, DEFAULT_BLOCK
from ..workspace import Workspace
from .pooling import normalize_by_kernels, pool_by_kernels

if TYPE_CHECKING:
    from .graph import EncoderGraph

F32 = NDArray[np.float32]
Tensors = Mapping[str, "Array | RBEBlocks"]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
#: Of hidden states.
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_PROJECTION = re.compile(r"encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)\b")
_TOKENIZE_AT_ONCE = 1024  # texts; their ids are kept, the tokenizer's larger records are not


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config.json that this encoder does not compute exactly."""
    model_type = config.get("model_type", "bert")
    if model_type != "bert":
        raise ValueError(f"config.json has model_type {model_type!r}; only 'bert' is supported")
    for name in _SIZES:
        value = config.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json has {name}={value!r}; needs a positive integer")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ValueError(
            f"config.json has hidden_size={config['hidden_size']}, not a multiple of "
            f"num_attention_heads={config['num_attention_heads']}"
        )
    position = config.get("position_embedding_type", "absolute")
    if position != "absolute":
        raise ValueError(
            f"config.json has position_embedding_type {position!r}; only 'absolute' is supported"
        )
    if config.get("is_decoder"):
        raise ValueError("config.json has is_decoder=true; only encoders are supported")
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ValueError(f"config.json has layer_norm_eps={eps!r}; needs a number from 0 to 1")
    activation = config.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"config.json has hidden_act {activation!r}; use one of {tuple(ACTIVATIONS)}")


def tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that the encoder reads, as checkpoints name them (without `bert.`).

    One by one: a config from a file may claim any number of layers.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield "embeddings.word_embeddings.weight", (config["vocab_size"], hidden)
    yield "embeddings.position_embeddings.weight", (config["max_position_embeddings"], hidden)
    yield "embeddings.token_type_embeddings.weight", (config["type_vocab_size"], hidden)
    yield "embeddings.LayerNorm.weight", (hidden,)
    yield "embeddings.LayerNorm.bias", (hidden,)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            yield f"{layer}attention.{name}.weight", (hidden, hidden)
            yield f"{layer}attention.{name}.bias", (hidden,)
        yield f"{layer}intermediate.dense.weight", (inner, hidden)
        yield f"{layer}intermediate.dense.bias", (inner,)
        yield f"{layer}output.dense.weight", (hidden, inner)
        yield f"{layer}output.dense.bias", (hidden,)
        for name in ("attention.output", "output"):
            yield f"{layer}{name}.LayerNorm.weight", (hidden,)
            yield f"{layer}{name}.LayerNorm.bias", (hidden,)


def canonical_name(name: str) -> str:
    """A checkpoint's name as `tensor_shapes` has it: no `bert.`; `weight`, `bias` for `gamma`, `beta`."""
    name = name.removeprefix("bert.")
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def block_of(name: str, config: Mapping[str, Any], transform: str, block: int | None) -> int:
    """The block size of a matrix: `block`, or 64 where that is None.

    But an attention projection with a transform then takes the largest size up to 64 that divides head_dim: a head
    is a whole number of blocks, and `RBEAttention` stays between its transforms.
    """
    if block is None and transform != "none" and _PROJECTION.match(canonical_name(name)):
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            fitting = (b for b in BLOCK_SIZES if b <= DEFAULT_BLOCK and hidden // heads % b == 0)
            return max(fitting, default=DEFAULT_BLOCK)
    return block or DEFAULT_BLOCK


def pooling_modes(pooling: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The modes that a 1_Pooling/config.json turns on, in the order they are joined; ("mean",) for None."""
    if pooling is None:
        return ("mean",)
    if not isinstance(pooling, Mapping):
        raise ValueError(f"the pooling config is a {type(pooling).__name__}, needs an object")
    on = [name for name, value in pooling.items() if name.startswith("pooling_mode") and value is True]
    unknown = [name for name in on if name not in POOLING]
    if unknown or not on:
        found = f"turns on {', '.join(unknown)}" if unknown else "turns on no mode"
        raise ValueError(f"the pooling config {found}; use {', '.join(POOLING)}")
    return tuple(mode for name, mode in POOLING.items() if name in on)


def _fetched(a: Any) -> Any:
    """A CuPy array as a NumPy array; anything else as it is."""
    return a.get() if hasattr(a, "__cuda_array_interface__") and hasattr(a, "get") else a


class BertEncoder:
    """A BERT encoder over dense or compressed weights. `rbe_gpu.load` makes one from a folder or a file.

    Parameters
    ----------
    tensors : name -> array (float32, float16 or bfloat16) or RBEMatrix/RBEVectors, named as in the
        checkpoint, with or without `bert.`; tensors that the encoder does not use (the pooler, heads) are
        passed over
    config : config.json
    tokenizer : a `tokenizers.Tokenizer`, or None when only `forward` is used. A copy is taken.
    pooling : 1_Pooling/config.json (mean, cls, max; several are joined), or None for the mean
    normalize : whether embeddings are divided by their L2 norm
    max_seq_length : tokens of a text that are read, at most max_position_embeddings
    cache_bytes : memory for decoded float32 panels of compressed linear weights. 0 keeps nothing: products
        work on the codes, and there is no dense copy. With more, a product keeps what fits of a decoded
        weight where the cost model (`rbe_gpu.matmul`) estimates that to be faster; as much as the dense linear
        weights take lets all of them fit. Embedding tables are never cached
    dtype : "float32", "float16" or "bfloat16", of the hidden states between the ops; sums are float32 always.
        Dense matrices, too, are then held in the half type, which on a GPU its tensor cores need; for
        "float32" they stay as they are in the checkpoint. Biases and norms are float32 always

    Attributes
    ----------
    cache : PanelCache, with `hits`, `misses` and `nbytes`
    nbytes : bytes of the weights as they are held, without `cache` and `workspace`
    workspace : scratch memory, kept between batches

    Notes
    -----
    A model is used by one thread at a time: batches share the workspace.
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
    ) -> None:
        check_config(config)
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not supported; use one of {tuple(DTYPES)}")
        named = {canonical_name(name): tensor for name, tensor in tensors.items()}
        for name, shape in tensor_shapes(config):
            if name not in named:
                raise ValueError(f"the model has no tensor {name!r}")
            if tuple(named[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(named[name].shape)}, config.json says {shape}")
        positions = config["max_position_embeddings"]
        if max_seq_length is not None and (not isinstance(max_seq_length, int) or max_seq_length < 1):
            raise ValueError(f"max_seq_length={max_seq_length!r} is not a positive integer")

        self.config = dict(config)
        self.dtype = DTYPES[dtype]
        self.hidden_size: int = config["hidden_size"]
        self.pooling = pooling_modes(pooling)
        self.normalize = normalize
        self.max_seq_length: int = min(max_seq_length or positions, positions)
        self.cache = PanelCache(cache_bytes)
        self.workspace = Workspace()
        self.tokenizer = deepcopy(tokenizer)  # 50 ms; two models may share one and cut at different lengths
        if self.tokenizer is not None:
            self.tokenizer.no_padding()
            self.tokenizer.enable_truncation(self.max_seq_length)
        self._build(named)

    def _build(self, named: Tensors) -> None:
        def vector(name: str) -> Array:
            """Biases and norms are float32, always: they are few."""
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
            )

        eps = float(self.config.get("layer_norm_eps", 1e-12))

        def norm(name: str) -> RBELayerNorm:
            return RBELayerNorm(vector(name + ".LayerNorm.weight"), vector(name + ".LayerNorm.bias"), eps)

        heads = self.config["num_attention_heads"]
        activation = ACTIVATIONS[self.config.get("hidden_act", "gelu")]
        self.word_embeddings = RBEEmbedding(matrix("embeddings.word_embeddings.weight"), self.dtype)
        self.position_embeddings = RBEEmbedding(matrix("embeddings.position_embeddings.weight"), self.dtype)
        # two rows: dense, whatever the checkpoint holds
        types = vector("embeddings.token_type_embeddings.weight").astype(self.dtype, copy=False)
        self.token_type_embeddings = RBEEmbedding(types)
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

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held, without the cache and the workspace."""
        embeddings = (
            self.word_embeddings,
            self.position_embeddings,
            self.token_type_embeddings,
            self.embedding_norm,
        )
        return sum(e.nbytes for e in embeddings) + sum(part.nbytes for layer in self.layers for part in layer)

    @property
    def embedding_size(self) -> int:
        """Columns of `embed`: hidden_size for each pooling mode."""
        return self.hidden_size * len(self.pooling)

    @property
    def device(self) -> str:
        """Where the weights are, and so where batches run: "cpu" or "cuda:0". `rbe_gpu.to` moves a model."""
        return device_of(self.word_embeddings.weight)

    def _placed(self, name: str, host: NDArray[Any]) -> Array:
        """A NumPy array of a batch where the weights are."""
        if self.device == "cpu":
            return host
        found = self.workspace.on(self.device).get(name, host.shape, host.dtype)
        found.set(host)
        return cast(Array, found)

    # --- hidden states --------------------------------------------------------------------------------

    @device_memory_errors()
    def forward(
        self,
        ids: NDArray[Any],
        lengths: NDArray[Any] | None = None,
        token_type_ids: NDArray[Any] | None = None,
        all_hidden_states: bool = False,
    ) -> F32 | tuple[F32, ...]:
        """Hidden states of a padded batch.

        Parameters
        ----------
        ids : (batch, seq) integers, 0 <= id < vocab_size where not padding; NumPy (or CuPy, which is fetched)
        lengths : (batch,) integers, tokens of each text, padding on the right; None: no padding
        token_type_ids : (batch, seq) integers; None: all 0
        all_hidden_states : give the states after the embeddings and after each layer, not only the last

        Returns
        -------
        (batch, seq, hidden) of the model's dtype, where the weights are, or a tuple of num_hidden_layers + 1 of
        them. Positions of padding are 0.
        """
        ids, lengths, token_type_ids = (_fetched(a) for a in (ids, lengths, token_type_ids))
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise TypeError(f"ids is {ids.dtype} of shape {ids.shape}; use integers of shape (batch, seq)")
        batch, seq = ids.shape
        if lengths is None:
            lengths = np.full(batch, seq, np.int64)
        if lengths.shape != (batch,) or lengths.dtype.kind not in "iu":
            raise ValueError(
                f"lengths is {lengths.dtype} of shape {lengths.shape}; use integers of shape ({batch},)"
            )
        if batch and (int(lengths.min()) < 0 or int(lengths.max()) > seq):
            raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}; use 0 to seq={seq}")
        if token_type_ids is not None and token_type_ids.shape != ids.shape:
            raise ValueError(f"token_type_ids has shape {token_type_ids.shape}, ids has {ids.shape}")
        real = np.arange(seq) < lengths[:, None]
        types = None if token_type_ids is None else token_type_ids[real].astype(np.int64)
        at = self._placed("bert.tokens", np.flatnonzero(real))
        ends = self._ends(lengths)
        found = []
        for state in self._states(ids[real].astype(np.int64), lengths, ends, types, all_hidden_states):
            padded = module_of(state).zeros((batch * seq, self.hidden_size), self.dtype)
            padded[at] = state
            found.append(padded.reshape(batch, seq, self.hidden_size))
        return tuple(found) if all_hidden_states else found[-1]

    def _ends(self, lengths: NDArray[Any]) -> Array:
        """cu_seqlens of packed texts, where the weights are."""
        ends = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        return self._placed("bert.ends", ends)

    def _states(
        self, ids: Array, lengths: Array, ends: Array, types: Array | None, all_hidden_states: bool
    ) -> Iterator[Array]:
        """Packed hidden states (tokens, hidden), in scratch memory: use each before asking for the next.

        ids, lengths, types : NumPy; ends : of `_ends`
        """
        ws = self.workspace.on(self.device)
        longest = int(lengths.max()) if lengths.size else 0
        limit = self.config["max_position_embeddings"]
        if longest > limit:
            raise ValueError(f"a text has {longest} tokens, the model has {limit} positions; cut it first")
        x = self._rows(self.word_embeddings, self._placed("bert.ids", ids), "bert.x", ws)
        positions = self.workspace.on("cpu").get("bert.positions", ids.shape, np.int64)
        line = np.arange(longest)
        start = 0
        for length in lengths.tolist():
            positions[start : start + length] = line[:length]
            start += length
        y = self._rows(self.position_embeddings, self._placed("bert.positions", positions), "bert.y", ws)
        if types is None and self.device == "cpu":
            y += cast(Array, self.token_type_embeddings.weight)[0]
        else:
            types = np.zeros_like(ids) if types is None else types
            self._add_types(y, self._placed("bert.type_ids", types), ws)
        self.embedding_norm(x, residual=y, out=x, workspace=ws)
        if all_hidden_states:
            yield x
        for index in range(len(self.layers)):
            self._layer(index, x, y, x, ws, cu_seqlens=ends)
            if all_hidden_states or index + 1 == len(self.layers):
                yield x

    def _layer(self, index: int, x: Array, y: Array, out: Array, ws: Workspace, **sequences: Any) -> None:
        """One layer from x to `out`, which may be x; y is scratch of that shape."""
        attention, attention_norm, ffn, ffn_norm = self.layers[index]
        attention(x, residual=x, out=y, workspace=ws, **sequences)
        attention_norm(y, out=y, workspace=ws)
        ffn(y, residual=y, out=out, workspace=ws)
        ffn_norm(out, out=out, workspace=ws)

    def _add_types(self, y: Array, types: Array, ws: Workspace) -> None:
        """y += rows of the token types."""
        rows = self._rows(self.token_type_embeddings, types, "bert.types", ws)
        if self.device == "cpu":
            np.add(y, rows, out=y)
        else:  # keeps every value; CuPy's own addition has no bfloat16
            ops.dropout(y, 0.0, 0, residual=rows, out=y)

    def _rows(self, table: RBEEmbedding, ids: Array, name: str, ws: Workspace) -> Array:
        """Rows of a table in scratch memory."""
        out: Array = ws.get(name, (*ids.shape, self.hidden_size), self.dtype)
        if table.dtype == self.dtype:
            return table(ids, out=out, workspace=ws)
        half = ws.get("bert.half", out.shape, table.dtype)
        out[...] = table(ids, out=half, workspace=ws)
        return out

    # --- nothing looked at ----------------------------------------------------------------------------

    def encode(
        self,
        ids: Array,
        lengths: Array | None = None,
        token_type_ids: Array | None = None,
        out: Array | None = None,
        workspace: Workspace | None = None,
    ) -> Array:
        """Hidden states of a padded batch of arrays that are where the weights are.

        On a GPU nothing is fetched and nothing waits; with `out`, the second call with a shape allocates
        nothing, so that the work can be captured (`graph`). Padding is computed, which `forward` and `embed`
        avoid.

        Parameters
        ----------
        ids, token_type_ids : (batch, seq) integers; None: types are all 0. On a GPU an id that the vocabulary does
            not have gives NaN
        lengths : (batch,) integers, or None: no padding
        out : (batch, seq, hidden) of the model's dtype
        workspace : scratch memory; None: the model's own

        Returns
        -------
        (batch, seq, hidden) of the model's dtype. Positions of padding hold no meaning.
        """
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise TypeError(f"ids is {ids.dtype} of shape {ids.shape}; use integers of shape (batch, seq)")
        limit = self.config["max_position_embeddings"]
        if ids.shape[1] > limit:
            raise ValueError(f"ids have {ids.shape[1]} positions, the model has {limit}; cut them first")
        if token_type_ids is not None and token_type_ids.shape != ids.shape:
            raise ValueError(f"token_type_ids has shape {token_type_ids.shape}, ids has {ids.shape}")
        if device_of(ids, "ids") != self.device:
            raise TypeError(
                f"ids are on {device_of(ids)}, the model is on {self.device}; use rbe_gpu.to(ids, {self.device!r})"
            )
        ws = (workspace or self.workspace).on(self.device)
        shape = ids.shape
        if out is None:
            out = cast(Array, module_of(ids).empty((*shape, self.hidden_size), self.dtype))
        x = self._rows(self.word_embeddings, ids, "bert.x", ws)
        positions = ws.constant("bert.places", shape, lambda: np.tile(np.arange(shape[1]), (shape[0], 1)))
        y = self._rows(self.position_embeddings, positions, "bert.y", ws)
        if token_type_ids is None:
            token_type_ids = ws.constant("bert.no_types", shape, lambda: np.zeros(shape, np.int64))
        self._add_types(y, token_type_ids, ws)
        self.embedding_norm(x, residual=y, out=x, workspace=ws)
        for index in range(len(self.layers)):
            last = index + 1 == len(self.layers)
            self._layer(index, x, y, out if last else x, ws, lengths=lengths)
        return out

    def pooled(
        self,
        states: Array,
        lengths: Array | None = None,
        cu_seqlens: Array | None = None,
        normalize: bool | None = None,
        out: Array | None = None,
        workspace: Workspace | None = None,
    ) -> Array:
        """Vectors of texts from their hidden states; as `encode`, nothing is looked at.

        Parameters
        ----------
        states : (batch, seq, hidden), with the `lengths` of the texts; or packed (tokens, hidden), with `cu_seqlens`
        normalize : divide by the L2 norm; None: as the model says
        out : (batch, embedding_size), dtype of states

        Returns
        -------
        (batch, embedding_size), dtype of states. A text of no tokens has a mean of zeros, and no certain "cls".

        Raises
        ------
        ValueError
            The model's pooling takes the maximum: use `pool`.
        """
        ws = (workspace or self.workspace).on(device_of(states, "states"))
        batch = states.shape[0] if cu_seqlens is None else cu_seqlens.size - 1
        if out is None:
            out = cast(Array, module_of(states).empty((batch, self.embedding_size), states.dtype))
        if batch:
            pool_by_kernels(
                states, lengths, cu_seqlens, self.pooling, self.config["num_attention_heads"], out, ws
            )
            if self.normalize if normalize is None else normalize:
                normalize_by_kernels(out, ws)
        return out

    def graph(self, batch: int, seq: int) -> EncoderGraph:
        """The whole encoder for texts of up to `seq` tokens, captured on its GPU: see `EncoderGraph`."""
        from .graph import EncoderGraph

        return EncoderGraph(self, batch, seq)

    # --- sentence embeddings --------------------------------------------------------------------------

    @device_memory_errors()
    def embed(
        self,
        texts: Iterable[str],
        batch_size: int = 32,
        normalize: bool | None = None,
        show_progress: bool = False,
    ) -> F32:
        """One vector per text, in the order of `texts`.

        Texts run longest first, in batches of `batch_size`, so that scratch memory is sized once and
        neighbours have like lengths.

        Parameters
        ----------
        texts : strings; texts longer than `max_seq_length` tokens are cut there
        batch_size : texts computed together
        normalize : divide by the L2 norm; None: as the model says
        show_progress : draw a progress bar on the terminal

        Returns
        -------
        (len(texts), embedding_size) float32
        """
        if isinstance(texts, str | bytes):
            raise TypeError("texts is one string; pass a list of strings ([text])")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        sequences = self.token_ids(list(texts))
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        out = np.empty((len(sequences), self.embedding_size), np.float32)
        starts: Iterable[int] = range(0, len(order), batch_size)
        if show_progress:
            from rich.progress import track

            starts = track(starts, description="embedding")
        for start in starts:
            rows = order[start : start + batch_size]
            ids = np.concatenate([sequences[i] for i in rows]).astype(np.int64)
            lengths = np.array([len(sequences[i]) for i in rows], np.int64)
            ends = self._ends(lengths)
            for state in self._states(ids, lengths, ends, None, all_hidden_states=False):
                if self.device == "cpu" or "max" in self.pooling:
                    out[rows] = _fetched(self.pool(state, lengths))
                else:
                    found = self.pooled(state, cu_seqlens=ends, normalize=False)
                    out[rows] = np.where(lengths[:, None] > 0, _fetched(found).astype(np.float32), 0)
        if self.normalize if normalize is None else normalize:
            norms = np.linalg.norm(out, axis=1, keepdims=True)
            out /= np.maximum(norms, np.float32(1e-12))
        return out

    def token_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text, special tokens included, cut at `max_seq_length`."""
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer; add tokenizer.json to its folder, or use forward(ids)"
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is a {type(text).__name__}; pass strings")
        found: list[NDArray[np.int32]] = []
        for start in range(0, len(texts), _TOKENIZE_AT_ONCE):
            encodings = self.tokenizer.encode_batch_fast(texts[start : start + _TOKENIZE_AT_ONCE])
            found.extend(np.array(e.ids, np.int32) for e in encodings)
        return found

    def pool(self, x: Array, lengths: Array) -> F32:
        """Packed tokens (tokens, hidden) to (batch, embedding_size). A text of no tokens gives zeros.

        lengths : NumPy; the result is where x is
        """
        xp = module_of(x)
        out: Array = xp.zeros((lengths.size, len(self.pooling), self.hidden_size), np.float32)
        start = 0
        for row, length in zip(out, lengths.tolist(), strict=True):
            tokens = x[start : start + length]
            start += length
            if not length:
                continue
            for target, mode in zip(row, self.pooling, strict=True):
                if mode == "mean":
                    xp.mean(tokens, axis=0, dtype=np.float32, out=target)
                elif mode == "max":
                    target[...] = xp.max(tokens, axis=0)
                else:
                    target[...] = tokens[0]
        return cast(F32, out.reshape(lengths.size, self.embedding_size))

    def __repr__(self) -> str:
        c = self.config
        return (
            f"BertEncoder({c['num_hidden_layers']} layers, hidden {c['hidden_size']}, "
            f"{c['num_attention_heads']} heads, vocabulary {c['vocab_size']}, "
            f"{'+'.join(self.pooling)} pooling, {self.dtype.name} states, {self.nbytes / 1e6:.1f} MB of weights, "
            f"cache of {self.cache.budget / 1e6:.1f} MB)"
        )
