"""Decoders as Llama is built (Touvron et al. 2023; `decoders` lists the others), which generate text.

    x_0     = embedding[id] * embedding_scale
    a       = x_l + attention(RMSNorm(x_l))                 queries and keys rotated by their positions
    x_(l+1) = a + down(activation(gate(h)) * up(h)),  h = RMSNorm(a)
    logits  = head RMSNorm(x_L)

Gemma also normalises what attention and the feed-forward part add. GPT-2 has LayerNorms in place of RMSNorms,
embeddings of positions in place of rotations, and no gate. ModernBERT, an encoder, has LayerNorms, and attention in
both directions; NomicBERT, too, with norms behind the parts, as BERT has them. The texts of a batch are packed end to
end, without padding; with a `KVCache` only new tokens are computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..blocks import Array, RBEBlocks
from ..cache import PanelCache
from ..dispatch import device_memory_errors, device_of, module_of, to_host
from ..layers import (
    RBEFFN,
    KVCache,
    RBEAttention,
    RBEEmbedding,
    RBELayerNorm,
    RBELinear,
    RBERMSNorm,
    RBERotary,
)
from ..workspace import ThreadWorkspaces, Workspace
from .bert import DTYPES
from .chat import ChatTemplate
from .decoder_tensors import (
    EMBEDDING_NORM,
    EMBEDDINGS,
    FINAL_NORM,
    HEAD,
    LINEAR_PARTS,
    POSITIONS,
    TYPES,
    canonical_name,
    check_tensors,
    has_bias,
    has_norm,
    linear_parts,
    linear_weights,
    norm_names,
    tensor_shapes,
)
from .decoders import decoder_config
from .generate import Generation, Sampling, generate, prompt_list, sampling_of
from .int8_check import check_int8_activations
from .one_token import one_token
from .pooling import cu_seqlens_of
from .rope_frequencies import rope_amplitude, rope_frequencies
from .tokenizer import check_unicode, tokenizer_errors

if TYPE_CHECKING:
    from collections.abc import Callable

F32 = NDArray[np.float32]
Tensors = Mapping[str, "Array | RBEBlocks"]
Norm = RBERMSNorm | RBELayerNorm


class DecoderLayer(NamedTuple):
    """A layer. `norms` are those of `decoder_tensors.norm_names`, None where it has none."""

    attention: RBEAttention
    ffn: RBEFFN
    norms: tuple[Any, ...]

    def linear(self, part: str) -> RBELinear:
        """A linear layer by its name in `decoder_tensors.LINEAR_PARTS`."""
        owner = self.ffn if part in ("gate", "up", "down") else self.attention
        return cast(RBELinear, getattr(owner, part))


class Decoder:
    """A decoder with dense or compressed weights. `rbe_gpu.load` creates one from a folder or a file.

    Parameters
    ----------
    tensors : name -> array (float32, float16 or bfloat16) or RBEMatrix/RBEVectors, named as in a checkpoint of Llama,
        with or without `model.` (`decoder_tensors`); tensors that the decoder does not use are ignored
    config : config.json
    tokenizer : a `tokenizers.Tokenizer`, or None if only `forward` and `logits` are used
    cache_bytes : memory for decoded float32 panels of compressed linear weights (`BertEncoder`)
    dtype : of the hidden states, keys and values: "float32", "float16" or "bfloat16"; accumulation and logits are
        float32
    int8_activations : names of the linear weights whose inputs are rounded to int8 (`rbe_gpu.linear`); compressed
        ones
    chat_template : Jinja template of conversations, or None
    generation : generation_config.json: which tokens end a text, and defaults of sampling
    special_tokens : bos_token, eos_token and so on, for the chat template; None: those of the ids in config.json

    Attributes
    ----------
    settings : DecoderConfig
    rotary : tables of angles by type of layer
    cache : PanelCache of decoded panels
    nbytes : bytes of the weights in memory, without `cache` and `workspace`

    Notes
    -----
    Several Python threads may use one model at once, each with a `KVCache` of its own. The layers are not to be
    changed: arguments of their kernels are kept. `with_tensors` makes a model with other weights.
    """

    def __init__(
        self,
        tensors: Tensors,
        config: Mapping[str, Any],
        tokenizer: Any = None,
        cache_bytes: int = 0,
        dtype: str = "float32",
        int8_activations: Collection[str] = (),
        chat_template: str | None = None,
        generation: Mapping[str, Any] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.settings = decoder_config(config)
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not supported; use one of {tuple(DTYPES)}")
        check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config)
        self.config = dict(config)
        self.dtype = DTYPES[dtype]
        self.cache = PanelCache(cache_bytes)
        self._workspaces = ThreadWorkspaces()
        self.tokenizer = tokenizer
        if tokenizer is not None:
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template)
        self.special_tokens = _special_tokens(special_tokens, config, tokenizer)
        self.generation_config = dict(generation or {})
        self.sampling, self.eos = sampling_of(self.generation_config, self.settings.eos)
        self.int8_activations = frozenset(map(canonical_name, int8_activations))
        named = {canonical_name(name): tensor for name, tensor in tensors.items()}
        check_int8_activations(self.int8_activations, named, linear_weights(config))
        self._build(named)

    def _build(self, named: Tensors) -> None:
        c = self.settings

        def vector(name: str) -> Array:
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

        def norm(name: str) -> Norm:
            weight = vector(f"{name}.weight")
            if c.norm == "layer":
                return RBELayerNorm(weight, vector(f"{name}.bias") if c.norm_bias else None, c.eps)
            return RBERMSNorm(weight + np.float32(1.0) if c.sandwich else weight, c.eps)

        def head_norm(name: str) -> RBERMSNorm | None:
            return cast(RBERMSNorm, norm(name)) if c.head_norms else None

        def linear(layer: str, part: str) -> RBELinear:
            name = f"{layer}{LINEAR_PARTS[part]}"
            return RBELinear(
                matrix(f"{name}.weight"),
                vector(f"{name}.bias") if has_bias(c, part) else None,
                cache=self.cache if self.cache.budget else None,
                activation_bits=8 if f"{name}.weight" in self.int8_activations else None,
                for_int8=not c.causal,  # a decoder multiplies a token at a time, for which that is slower
            )

        rotary = self.rotary = {
            kind: RBERotary(
                rope_frequencies(p, c.head_dim),
                rope_amplitude(p),
                long_frequencies=None if c.first_context is None else rope_frequencies(p, c.head_dim, True),
                context=c.first_context or 0,
            )
            for kind, p in c.rotary.items()
        }
        # rows alone are read where the table makes no logits
        self.word_embeddings = RBEEmbedding(
            matrix(EMBEDDINGS), self.dtype, for_lookup=not (c.tied and c.causal)
        )
        self.position_embeddings: RBEEmbedding | None = None
        if c.learned_positions:
            self.position_embeddings = RBEEmbedding(matrix(POSITIONS), self.dtype, for_lookup=True)
        self.embedding_norm = norm(EMBEDDING_NORM) if c.embedding_norm else None
        self.token_types: RBEEmbedding | None = None
        if c.token_types:  # of few rows: always dense
            self.token_types = RBEEmbedding(vector(TYPES).astype(self.dtype, copy=False))
        self.final_norm: Any = None if c.post_norm else norm(FINAL_NORM)
        self._head = None if c.tied else matrix(HEAD)
        self.layers: list[DecoderLayer] = []
        for i in range(c.num_layers):
            at = f"model.layers.{i}."
            made = {part: linear(at, part) for part in linear_parts(c)}
            window = c.windows[i]
            query_norm, key_norm = (head_norm(f"{at}self_attn.{name}") for name in ("q_norm", "k_norm"))
            attention = RBEAttention(
                made["query"], made["key"], made["value"], made["output"], c.num_heads, c.num_kv_heads, c.causal,
                None if window is None else (window - 1, 0 if c.causal else window - 1), c.scale, query_norm,
                key_norm, rotary.get(c.layer_type(i)), c.attention_softcap,
            )  # fmt: skip
            norms = tuple(norm(f"{at}{name}") if has_norm(c, i, name) else None for name in norm_names(c))
            ffn = RBEFFN(made["up"], made["down"], made.get("gate"), c.activation)
            self.layers.append(DecoderLayer(attention, ffn, norms))

    def tensors(self) -> dict[str, Array | RBEBlocks]:
        """The tensors of the model, with the dtypes that it computes with, named as in `decoder_tensors`."""
        c = self.settings
        offset = np.float32(1.0 if c.sandwich else 0.0)

        named: dict[str, Array | RBEBlocks] = {EMBEDDINGS: self.word_embeddings.weight}

        def add_norm(name: str, norm: Norm | None) -> None:
            if norm is None:
                return
            named[f"{name}.weight"] = cast(Array, norm.weight - offset)  # type: ignore[operator]
            if isinstance(norm, RBELayerNorm) and norm.bias is not None:
                named[f"{name}.bias"] = norm.bias

        add_norm(FINAL_NORM, self.final_norm)
        add_norm(EMBEDDING_NORM, self.embedding_norm)
        if self.position_embeddings is not None:
            named[POSITIONS] = self.position_embeddings.weight
        if self.token_types is not None:
            named[TYPES] = self.token_types.weight
        if not c.tied:
            named[HEAD] = self.head
        for i, layer in enumerate(self.layers):
            attention, _, norms = layer
            at = f"model.layers.{i}."
            for part, name in linear_parts(c).items():
                linear = layer.linear(part)
                named[f"{at}{name}.weight"] = linear.weight
                if linear.bias is not None:
                    named[f"{at}{name}.bias"] = linear.bias
            for name, norm in zip(norm_names(c), norms, strict=True):
                add_norm(f"{at}{name}", norm)
            add_norm(f"{at}self_attn.q_norm", attention.query_norm)
            add_norm(f"{at}self_attn.k_norm", attention.key_norm)
        return named

    def with_tensors(self, tensors: Tensors) -> Decoder:
        """The same model with some tensors replaced, and no int8 activations."""
        model = copy(self)
        model.int8_activations = frozenset()
        model.cache, model._workspaces = PanelCache(self.cache.budget), ThreadWorkspaces()
        model._build({**self.tensors(), **{canonical_name(name): tensor for name, tensor in tensors.items()}})
        return model

    def with_int8_activations(self, names: Collection[str]) -> Decoder:
        """The same model and weights, with int8 activations for the linear weights of these names alone."""
        model = copy(self)
        model.int8_activations, model._workspaces = frozenset(map(canonical_name, names)), ThreadWorkspaces()
        check_int8_activations(model.int8_activations, self.tensors(), linear_weights(self.config))
        model._build(self.tensors())
        return model

    @property
    def head(self) -> Array | RBEBlocks:
        """The matrix of the logits, (vocab_size, hidden_size): the word embeddings if they are tied."""
        return self.word_embeddings.weight if self._head is None else self._head

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory, without the cache and the workspace."""
        total = self.word_embeddings.nbytes
        total += sum(
            int(part.nbytes)
            for part in (self.embedding_norm, self.position_embeddings, self.token_types, self.final_norm)
            if part is not None
        )
        if self._head is not None:
            total += RBEEmbedding(self._head).nbytes
        for attention, ffn, norms in self.layers:
            total += attention.nbytes + ffn.nbytes + sum(norm.nbytes for norm in norms if norm is not None)
        return total

    @property
    def dense_nbytes(self) -> int:
        """Bytes of all weights as float32."""
        return 4 * sum(prod(shape) for _, shape in tensor_shapes(self.settings))

    @property
    def workspace(self) -> Workspace:
        """Scratch memory of calls from this Python thread."""
        return self._workspaces.own

    @property
    def device(self) -> str:
        """The device of the weights: "cpu" or "cuda:0"."""
        return device_of(self.word_embeddings.weight)

    # --- hidden states and logits ---------------------------------------------------------------------

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch` texts of up to `capacity` tokens (default: those that the model takes).

        Raises
        ------
        ValueError
            Tokens see those behind them, which a cache cannot have.
        """
        c = self.settings
        self._check_generates()
        capacity = c.max_positions if capacity is None else min(capacity, c.max_positions)
        return KVCache(c.num_layers, batch, capacity, c.num_kv_heads, c.head_dim, self.dtype, self.device)

    @device_memory_errors()
    def forward(self, ids: Array, lengths: Array | None = None, cache: KVCache | None = None) -> Array:
        """Last hidden states, normalised, of a batch.

        Parameters
        ----------
        ids : (batch, seq) integers, 0 <= id < vocab_size except in the padding
        lengths : (batch,) integers, tokens of each text, padding on the right; None: no padding
        cache : what the texts had before; these tokens are added to it

        Returns
        -------
        (batch, seq, hidden_size), dtype of the model, 0 in the padding

        Raises
        ------
        TypeError
            ids or lengths are no integers.
        ValueError
            An id is no row of the word embeddings, a text has more tokens than the model has positions, or than the
            cache has room for, the cache is of another model, or lengths are out of range; with these tokens a text
            goes beyond the first context of LongRoPE, and the cache has what its rotations were before.
        """
        ids, counts = self._checked(ids, lengths)
        packed = self._packed(ids, counts, cache)
        padded = module_of(packed).zeros((*ids.shape, self.settings.hidden_size), self.dtype)
        there = module_of(packed).asarray(np.arange(ids.shape[1]) < counts[:, None])
        padded[there] = packed
        return cast(Array, padded)

    @device_memory_errors()
    def hidden_states(self, ids: Array, lengths: Array | None = None) -> list[Array]:
        """Hidden states after the embeddings and each layer, the last one normalised, each as of `forward`."""
        ids, counts = self._checked(ids, lengths)
        there = np.arange(ids.shape[1]) < counts[:, None]
        results = []
        for states in self._states(ids[there], counts, None, self.workspace.on(self.device)):
            padded = module_of(states).zeros((*ids.shape, self.settings.hidden_size), self.dtype)
            padded[module_of(states).asarray(there)] = states
            results.append(padded)
        return results

    @device_memory_errors()
    def logits(
        self, ids: Array, lengths: Array | None = None, cache: KVCache | None = None, last: bool = False
    ) -> Array:
        """Logits of the next token.

        Parameters
        ----------
        ids, lengths, cache : as in `forward`
        last : only those behind the last token of each text

        Returns
        -------
        (batch, seq, vocab_size) float32, 0 in the padding; with `last` (batch, vocab_size). If states and head are of
        a half type, they are rounded to it

        Raises
        ------
        TypeError, ValueError
            As `forward`; with `last`, a text has no tokens; the model has attention in both directions.
        """
        self._check_generates()
        ids, counts = self._checked(ids, lengths)
        if last and counts.size and counts.min() == 0:
            raise ValueError(f"text {int(np.argmin(counts))} has no tokens, and no last one")
        packed = self._packed(ids, counts, cache)
        if last:
            ends = module_of(packed).asarray(np.cumsum(counts) - 1)
            return self._logits(packed[ends])
        padded = module_of(packed).zeros((*ids.shape, self.settings.vocab_size), np.float32)
        there = module_of(packed).asarray(np.arange(ids.shape[1]) < counts[:, None])
        padded[there] = self._logits(packed)
        return cast(Array, padded)

    def _check_generates(self) -> None:
        if not self.settings.causal:
            raise ValueError("the model has attention in both directions: it generates no text")

    def _logits(self, states: Array) -> Array:
        """(tokens, vocab_size) float32."""
        ws = self.workspace.on(self.device)
        if self.dtype != np.float32 and not isinstance(self.head, RBEBlocks):
            return self.capped(ops.linear(states, self.head, workspace=ws).astype(np.float32))
        if states.dtype != np.float32:
            states = states.astype(np.float32)
        return self.capped(ops.linear(states, self.head, workspace=ws))

    def capped(self, logits: Array) -> Array:
        """c tanh(logits / c) in place, c the soft cap of the logits, if the model has one."""
        c = self.settings.logit_softcap
        if c is not None:
            xp = module_of(logits)
            xp.multiply(logits, np.float32(1.0 / c), out=logits)
            xp.tanh(logits, out=logits)
            xp.multiply(logits, np.float32(c), out=logits)
        return logits

    def _checked(self, ids: Array, lengths: Array | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids (batch, seq) and tokens of each text (batch,), on the host."""
        ids, lengths = (to_host(a) for a in (ids, lengths))
        if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise TypeError("ids is not an array of integers of shape (batch, seq)")
        batch, seq = ids.shape
        lengths = np.full(batch, seq) if lengths is None else np.asarray(lengths)
        if lengths.shape != (batch,) or lengths.dtype.kind not in "iu":
            raise ValueError(
                f"lengths is {lengths.dtype} of shape {lengths.shape}; use integers of shape ({batch},)"
            )
        if batch and (int(lengths.min()) < 0 or int(lengths.max()) > seq):
            raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}; use 0 to seq={seq}")
        used = ids[np.arange(seq) < lengths[:, None]]
        if used.size and (int(used.min()) < 0 or int(used.max()) >= self.settings.vocab_size):
            ends = f"{used.min()} to {used.max()}"
            raise ValueError(f"ids run from {ends}; use 0 to {self.settings.vocab_size - 1}")
        return ids.astype(np.int64, copy=False), lengths.astype(np.int64, copy=False)

    def _packed(
        self,
        ids: NDArray[np.int64],
        counts: NDArray[np.int64],
        cache: KVCache | None,
        planned: NDArray[np.int64] | None = None,
    ) -> Array:
        """Last hidden states (tokens, hidden_size) in scratch memory; the cache has these tokens afterwards.

        planned : (batch,) tokens that each text will have when all of a prompt is computed; None: with these
        """
        if cache is not None:
            self._check_cache(cache)
            self._choose_rotations(cache, counts, planned)
        if counts.size == 1 and cache is not None and ids.size == 1 == counts[0]:
            states = one_token(self, ids[0], cache)
            if states is not None:
                return states
        rows = ids[np.arange(ids.shape[1]) < counts[:, None]]
        *_, states = self._states(rows, counts, cache, self.workspace.on(self.device))
        if cache is not None:
            cache.lengths += counts
        return states

    def _choose_rotations(
        self, cache: KVCache, counts: NDArray[np.int64], planned: NDArray[np.int64] | None
    ) -> None:
        """Decide how new texts in a cache are rotated, by their tokens; refuse old ones that need other rotations."""
        context = self.settings.first_context
        if context is None:
            return
        cache.check_room(counts)
        tokens = cache.lengths + counts if planned is None else planned
        cache.long[:] = np.where(cache.lengths == 0, tokens > context, cache.long)
        crossing = np.flatnonzero((tokens > context) & ~cache.long)
        if crossing.size:
            raise ValueError(
                f"text {crossing[0]} has {tokens[crossing[0]]} tokens with these; with more than {context} its "
                "earlier tokens are rotated otherwise: set its length in the cache to 0, and pass all of its tokens"
            )

    def _check_cache(self, cache: KVCache) -> None:
        c, shape = self.settings, cache.memory.shape
        own = (*shape[:2], *shape[4:]), cache.memory.dtype, cache.device
        if own != ((c.num_layers, 2, c.num_kv_heads, c.head_dim), self.dtype, self.device):
            raise ValueError(f"{cache} is not of this model; make one with new_cache")

    def _states(
        self, ids: NDArray[np.int64], counts: NDArray[np.int64], cache: KVCache | None, ws: Workspace
    ) -> Iterator[Array]:
        """Hidden states (tokens, hidden_size) after the embeddings and each layer, the last one normalised.

        They are in scratch memory: read each before asking for the next.
        """
        c = self.settings
        past = np.zeros(counts.size, np.int64) if cache is None else cache.lengths
        if cache is not None:
            cache.check_room(counts)
        after = int((past + counts).max(initial=0))
        if after > c.max_positions:
            raise ValueError(f"a text has {after} tokens, the model has {c.max_positions} positions")
        cu_seqlens = cu_seqlens_of(counts)
        positions = np.arange(ids.size) + np.repeat(past - cu_seqlens[:-1], counts)
        if c.first_context is not None:
            long = counts > c.first_context if cache is None else cache.long
            positions += np.repeat(np.where(long, c.first_context, 0), counts)
        shape = (ids.size, c.hidden_size)
        # one token of each text on a GPU: as many copies as arrays, none of them waits
        placed: Callable[[NDArray[Any]], Array] = (
            (lambda a: a) if ws.device == "cpu" else module_of(self.word_embeddings.weight).asarray
        )
        device_ends, device_positions = placed(cu_seqlens), placed(positions)
        x, y, h = (ws.get(f"decoder.{name}", shape, self.dtype) for name in "xyh")
        self._embed(placed(ids), x, ws)
        if self.position_embeddings is not None:
            ops.add(x, self._rows(self.position_embeddings, device_positions, y, ws), out=x)
        if self.token_types is not None:
            first = placed(np.zeros(ids.size, np.int64))
            ops.add(x, self._rows(self.token_types, first, y, ws), out=x)
        if self.embedding_norm is not None:
            self.embedding_norm(x, out=x)
        yield x
        for i, (attention, ffn, norms) in enumerate(self.layers):
            arguments: dict[str, Any] = {
                "cu_seqlens": device_ends if cache is None else cu_seqlens,
                "positions": device_positions,
                "cache": None if cache is None else cache.layer(i),
                "workspace": ws,
            }
            if c.post_norm:
                attention(x, residual=x, out=y, **arguments)
                norms[0](y, out=y)
                ffn(y, residual=y, out=x, workspace=ws)
                norms[1](x, out=x)
                if i + 1 < c.num_layers:
                    yield x
                continue
            source = x if norms[0] is None else norms[0](x, out=h)
            if c.sandwich:
                attention(source, out=y, **arguments)
                norms[1](y, out=y)
                norms[2](y, residual=x, out=h, residual_out=x)
                ffn(h, out=y, workspace=ws)
                norms[3](y, out=y)
                ops.add(x, y, out=x)
            else:
                attention(source, residual=x, out=y, **arguments)
                norms[1](y, out=h)
                ffn(h, residual=y, out=x, workspace=ws)
            if i + 1 < c.num_layers:
                yield x
        if self.final_norm is not None:
            self.final_norm(x, out=x)
        yield x

    def _embed(self, ids: Array, x: Array, ws: Workspace) -> None:
        """Word embeddings into x, times their scale."""
        self._rows(self.word_embeddings, ids, x, ws)
        if self.settings.embedding_scale != 1.0:
            module_of(x).multiply(x, x.dtype.type(self.settings.embedding_scale), out=x)

    def _rows(self, table: RBEEmbedding, rows: Array, x: Array, ws: Workspace) -> Array:
        """Rows of a table into x, which is returned."""
        if table.dtype == self.dtype:
            return table(rows, out=x, workspace=ws)
        x[...] = table(rows, out=ws.get("decoder.stored", x.shape, table.dtype), workspace=ws)
        return x

    # --- text -----------------------------------------------------------------------------------------

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer adds."""
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; pass token ids")
        if not isinstance(text, str):
            raise TypeError(f"the text is a {type(text).__name__}; pass a string")
        try:
            with tokenizer_errors("the tokenizer does not take the text"):
                ids: list[int] = self.tokenizer.encode(text).ids
        except ValueError:
            check_unicode([text], "")
            raise
        rows = self.settings.vocab_size
        if ids and max(ids) >= rows:
            raise ValueError(
                f"the text has a token with id {max(ids)}, but the word embeddings have {rows} rows"
            )
        return ids

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation by the model's chat template, up to where the answer begins.

        messages : {"role": "user", "content": ...} and so on
        """
        if self.chat_template is None:
            raise ValueError("the model has no chat template; pass the text itself")
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; pass token ids")
        text = self.chat_template.render(messages, self.special_tokens)
        with tokenizer_errors("the tokenizer does not take the conversation"):
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    @device_memory_errors()
    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        seed: int | None = None,
        on_text: Callable[[int, str], object] | None = None,
    ) -> list[Generation]:
        """Continue texts.

        Parameters
        ----------
        prompts : a text, several texts, or the token ids of several
        max_new_tokens : of each text at most
        temperature : 0 takes the most probable token; above, one is drawn from softmax(logits / temperature).
            None for this and the next four: as generation_config.json says, else 0 and no limit
        top_k : draw from the k most probable tokens; 0: from all
        top_p : draw from the most probable tokens that together reach this probability
        min_p : leave out tokens less than `min_p` times as probable as the most probable one
        repetition_penalty : positive logits of tokens that were there before are divided by it, negative ones
            multiplied with it (Keskar et al. 2019)
        stop : texts at which to end; they are not part of the result
        ignore_eos : go on behind the tokens that end a text
        seed : of the draws; the same seed draws the same tokens
        on_text : called with the number of the prompt and each new piece of its text

        Returns
        -------
        For each prompt its `Generation`: text, token ids and why it ended.

        Raises
        ------
        ValueError
            A prompt is empty or longer than the model's positions, or an option is out of range.
        """
        options = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }  # fmt: skip
        sampling = Sampling(
            **{**self.sampling._asdict(), **{k: v for k, v in options.items() if v is not None}}
        )
        sampling.check()
        ids = [self.token_ids(p) if isinstance(p, str) else list(p) for p in prompt_list(prompts)]
        if not isinstance(stop, str | Sequence):
            raise TypeError(f"stop is a {type(stop).__name__}; pass a text, or a list of texts")
        stops = [stop] if isinstance(stop, str) else list(stop)
        ends = () if ignore_eos else self.eos
        return generate(self, ids, max_new_tokens, sampling, stops, ends, seed, on_text)

    def chat(
        self, messages: Sequence[Mapping[str, str]], max_new_tokens: int = 256, **options: Any
    ) -> Generation:
        """Answer a conversation: `generate` of `chat_ids`, with its options."""
        return self.generate([self.chat_ids(messages)], max_new_tokens, **options)[0]

    def __repr__(self) -> str:
        c = self.settings
        return (
            f"Decoder({c.model_type}, {c.num_layers} layers, hidden {c.hidden_size}, {c.num_heads} heads "
            f"({c.num_kv_heads} for keys and values) of {c.head_dim}, vocabulary {c.vocab_size}, {self.dtype.name} "
            f"states, {self.nbytes / 1e6:.1f} MB of weights)"
        )


def _special_tokens(
    named: Mapping[str, str] | None, config: Mapping[str, Any], tokenizer: Any
) -> dict[str, str]:
    """The special tokens of a chat template by name."""
    if named is not None:
        return dict(named)
    if tokenizer is None:
        return {}
    tokens = {}
    for name in ("bos", "eos", "pad"):
        ids = config.get(f"{name}_token_id")
        number = ids[0] if isinstance(ids, list) and ids else ids
        if type(number) is int and 0 <= number < tokenizer.get_vocab_size():
            tokens[f"{name}_token"] = tokenizer.id_to_token(number) or ""
    return tokens
