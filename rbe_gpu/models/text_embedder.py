"""Vectors of texts from the hidden states of a model (Reimers and Gurevych 2019): what encoders and decoders share.

embedding = states pooled over the tokens, through the model's Dense modules, divided by its L2 norm if the model is
configured so
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..blocks import Array
from ..dispatch import device_memory_errors, device_of, module_of, to_host
from ..workspace import Workspace
from .dense_modules import DenseModule
from .folder import check_extra, check_pooling
from .pooling import cu_seqlens_of, pool_into, without_first
from .tokenizer import check_unicode, tokenizer_errors

F32 = NDArray[np.float32]
_TOKENIZER_BATCH = 1024  # texts: the encodings of the tokenizer take far more memory than ids
_WINDOW = (
    1024  # texts that are sorted by length together; of 32 texts a batch, more hardly change its lengths
)


def window_of(batch_size: int) -> int:
    """Texts that `TextEmbedder.embed` sorts together: whole batches, 1,024 texts or the next number above it."""
    return -(-_WINDOW // batch_size) * batch_size


class TextEmbedder(ABC):
    """A model that makes vectors of texts.

    Attributes
    ----------
    tokenizer : a `tokenizers.Tokenizer`, or None
    pooling : modes of pooling, concatenated in this order
    include_prompt : whether the tokens of the prompt are pooled too
    dense : Dense modules, which pooled vectors pass
    normalize : whether embeddings are divided by their L2 norm
    prompts, default_prompt_name : texts that are put before others, by name
    truncate_dim : columns of vectors that are kept, or None
    max_seq_length : tokens that texts are truncated to
    hidden_size : columns of the hidden states
    int8_activations : names of the linear weights whose inputs are rounded to int8
    """

    tokenizer: Any
    hidden_size: int
    int8_activations: frozenset[str]
    dense: tuple[DenseModule, ...]

    @property
    @abstractmethod
    def device(self) -> str:
        """The device of the weights, on which batches run: "cpu" or "cuda:0". `rbe_gpu.to` moves a model."""

    @property
    @abstractmethod
    def workspace(self) -> Workspace:
        """Scratch memory of calls from this Python thread that bring none."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows of the word embeddings."""

    @property
    @abstractmethod
    def max_positions(self) -> int:
        """Tokens of the longest text."""

    @abstractmethod
    def forward(self, ids: Array, lengths: Array | None = None) -> Any:
        """Last hidden states (batch, seq, hidden_size) of a padded batch, 0 in the padding."""

    @abstractmethod
    def _text_states(
        self, ids: NDArray[np.int64], lengths: NDArray[np.int64], ws: Workspace
    ) -> tuple[Array, Array]:
        """Last hidden states (tokens, hidden_size) of packed texts and cu_seqlens (batch + 1,), on the device.

        ids : (tokens,); lengths : (batch,)
        """

    def _set_up_texts(
        self,
        tokenizer: Any,
        pooling: Mapping[str, Any] | None,
        normalize: bool,
        max_seq_length: int | None,
        positions: int,
        prompts: Mapping[str, str | None] | None,
        default_prompt_name: str | None,
        truncate_dim: int | None,
        dense: Sequence[DenseModule] = (),
    ) -> None:
        """Check and set the attributes. positions : tokens that the model takes; the tokenizer is set to truncate."""
        if max_seq_length is not None and (not isinstance(max_seq_length, int) or max_seq_length < 1):
            raise ValueError(f"max_seq_length={max_seq_length!r} is not a positive integer")
        self.pooling, self.include_prompt = check_pooling(pooling)
        self.dense = tuple(dense)
        width = self.hidden_size * len(self.pooling)
        for module in self.dense:
            if module.linear.in_features != width:
                raise ValueError(
                    f"a Dense module takes {module.linear.in_features} columns, the vectors before it have {width}"
                )
            width = module.linear.out_features
        self.normalize = normalize
        self.prompts = check_extra(prompts, default_prompt_name, truncate_dim)
        self.default_prompt_name = default_prompt_name
        self.truncate_dim = truncate_dim
        self.max_seq_length = min(max_seq_length or positions, positions)
        self.tokenizer = tokenizer
        if tokenizer is not None:
            special = tokenizer.num_special_tokens_to_add(False)
            if self.max_seq_length <= special:
                raise ValueError(
                    f"max_seq_length={self.max_seq_length} leaves no room for text beside {special} special tokens"
                )
            truncation = tokenizer.truncation or {"direction": "right"}
            tokenizer.no_padding()
            tokenizer.enable_truncation(self.max_seq_length, direction=truncation["direction"])

    @property
    def embedding_size(self) -> int:
        """Columns of `embed`: those of `pool`, or `truncate_dim` of them."""
        return min(self.pooled_size, self.truncate_dim or self.pooled_size)

    @property
    def pooled_size(self) -> int:
        """Columns of `pool`: those of the last Dense module, without one hidden_size for each pooling mode."""
        return self.dense[-1].linear.out_features if self.dense else self.hidden_size * len(self.pooling)

    def _placed(self, name: str, host: NDArray[Any], ws: Workspace) -> Array:
        """A NumPy array of a batch on the device of the weights."""
        if ws.device == "cpu":
            return host
        placed = ws.get(name, host.shape, host.dtype)
        placed.set(host)
        return cast(Array, placed)

    def pool(
        self,
        states: Array,
        lengths: Array | None = None,
        cu_seqlens: Array | None = None,
        normalize: bool | None = None,
        out: Array | None = None,
        workspace: Workspace | None = None,
        skipped: int = 0,
    ) -> Array:
        """Vectors of texts from their hidden states.

        On a GPU there is no host synchronisation, except for the maximum, which reads `lengths` or `cu_seqlens`.

        Parameters
        ----------
        states : (batch, seq, hidden), with the `lengths` (batch,) of the texts or None; or packed (tokens, hidden),
            with `cu_seqlens` (batch + 1,)
        normalize : divide by the L2 norm; None: as the model is configured
        out : (batch, pooled_size), float32 or dtype of states
        workspace : scratch memory; None: the model's own
        skipped : tokens of each text that were left out before its first one, which count in the positions of
            "weightedmean"

        Returns
        -------
        (batch, pooled_size), float32 or dtype of `out`. A text without tokens has mean and maximum 0 before Dense
        modules; its "cls" is undefined.
        """
        ws = (workspace or self.workspace).on(device_of(states, "states"))
        batch = states.shape[0] if cu_seqlens is None else cu_seqlens.size - 1
        if out is None:
            out = cast(Array, module_of(states).empty((batch, self.pooled_size), np.float32))
        if batch:
            if self.dense:
                self._through_dense(self._pooled(states, lengths, cu_seqlens, batch, skipped, ws), out, ws)
            else:
                pool_into(states, lengths, cu_seqlens, self.pooling, out, ws, skipped)
            if self.normalize if normalize is None else normalize:
                ops.l2_normalize(out, out=out)
        return out

    def _pooled(
        self,
        states: Array,
        lengths: Array | None,
        cu_seqlens: Array | None,
        batch: int,
        skipped: int,
        ws: Workspace,
    ) -> Array:
        """What Dense modules take, float32 in scratch memory."""
        pooled = ws.get("texts.pooled", (batch, self.hidden_size * len(self.pooling)), np.float32)
        pool_into(states, lengths, cu_seqlens, self.pooling, pooled, ws, skipped)
        return cast(Array, pooled)

    def _through_dense(self, vectors: Array, out: Array, ws: Workspace) -> None:
        """Pooled vectors (batch, hidden_size * modes) float32 through all modules to out (batch, pooled_size)."""
        for i, module in enumerate(self.dense):
            shape = (vectors.shape[0], module.linear.out_features)
            direct = i + 1 == len(self.dense) and out.dtype == np.float32
            vectors = module(vectors, out if direct else ws.get(f"texts.dense{i}", shape, np.float32), ws)
        if out.dtype != np.float32:
            out[...] = vectors

    def vector_without_tokens(self, normalize: bool | None = None) -> F32:
        """The vector (pooled_size,) of a text of which no token is pooled: 0, through the Dense modules.

        normalize : as of `pool`
        """
        if not self.dense:
            return np.zeros(self.pooled_size, np.float32)
        xp = module_of(self.dense[0].linear.weight)
        out = xp.empty((1, self.pooled_size), np.float32)
        zero = xp.zeros((1, self.hidden_size * len(self.pooling)), np.float32)
        self._through_dense(zero, out, self.workspace.on(self.device))
        if self.normalize if normalize is None else normalize:
            ops.l2_normalize(out, out=out)
        return cast(F32, to_host(out)[0])

    @device_memory_errors()
    def embed(
        self,
        texts: Iterable[str],
        batch_size: int = 32,
        normalize: bool | None = None,
        show_progress: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> F32:
        """One vector per text, in the order of `texts`.

        Texts are processed in windows of `window_of(batch_size)`, the longest of a window first, so that the texts of
        a batch have similar lengths. The last bits of a vector depend on the texts of its batch, so vectors of a
        part of the texts are the same bits if it starts and ends between two windows.

        Parameters
        ----------
        texts : strings; they are truncated to `max_seq_length` tokens
        batch_size : texts per batch
        normalize : divide by the L2 norm, after truncation to `truncate_dim`; None: before it, if the model is
            configured so
        show_progress : show a progress bar on the terminal
        prompt_name : of a text in `prompts`, which is put before each text; None: `default_prompt_name`
        prompt : the text to put before each text itself; "" for none

        Returns
        -------
        (len(texts), embedding_size) float32

        Raises
        ------
        ValueError
            A text is not valid Unicode, or has tokens that are not in the table of word embeddings; there is no such
            prompt.
        """
        if isinstance(texts, str | bytes):
            raise TypeError("texts is one string; pass a list of strings ([text])")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        prompt = self.resolve_prompt(prompt, prompt_name)
        sequences = self.token_ids(list(texts), prompt)
        skipped = self.tokens_not_pooled(prompt)
        window = window_of(batch_size)
        order = sorted(range(len(sequences)), key=lambda i: (i // window, -len(sequences[i])))
        out = np.empty((len(sequences), self.embedding_size), np.float32)
        ws = self.workspace.on(self.device)
        starts: Iterable[int] = range(0, len(order), batch_size)
        if show_progress:
            from rich.progress import track

            starts = track(starts, description="embedding")
        for start in starts:
            rows = order[start : start + batch_size]
            ids = np.concatenate([sequences[i] for i in rows]).astype(np.int64)
            lengths = np.array([len(sequences[i]) for i in rows], np.int64)
            states, cu_seqlens = self._text_states(ids, lengths, ws)
            if skipped:
                states, lengths, remaining = without_first(skipped, states, lengths)
                cu_seqlens = self._placed("texts.cu_seqlens", remaining, ws)
            # normalized here, but after truncation if the caller asks for it
            here = None if normalize is None else False
            vectors = to_host(self.pool(states, cu_seqlens=cu_seqlens, normalize=here, skipped=skipped))
            if not lengths.all():
                vectors[lengths == 0] = self.vector_without_tokens(here)
            out[rows] = vectors[:, : self.embedding_size]
        if normalize:
            ops.l2_normalize(out, out=out)
        return out

    def resolve_prompt(self, prompt: str | None = None, prompt_name: str | None = None) -> str:
        """What `embed` puts before texts: `prompt`, or the prompt of that name, or the default; "" for none."""
        if prompt is not None and prompt_name is not None:
            raise ValueError("prompt and prompt_name are both given; give one")
        for name, value in (("prompt", prompt), ("prompt_name", prompt_name)):
            if not isinstance(value, str | None):
                raise TypeError(f"{name} is a {type(value).__name__}; pass a string")
        if prompt is not None:
            return prompt
        chosen = self.default_prompt_name if prompt_name is None else prompt_name
        if chosen is None:
            return ""
        if chosen not in self.prompts:
            raise ValueError(
                f"the model has no prompt {chosen!r}; it has {', '.join(map(repr, self.prompts))}"
            )
        return self.prompts[chosen]

    def tokens_not_pooled(self, prompt: str) -> int:
        """Tokens at the beginning of a text that are not pooled: those of the prompt, or none."""
        return 0 if self.include_prompt or not prompt else self.prompt_length(prompt)

    def vectors_to_compare(self, states: Array, lengths: NDArray[np.int64]) -> F32:
        """Vectors of texts with the default prompt, as `embed` makes them, of norm 1.

        Parameters
        ----------
        states : (tokens, hidden), packed
        lengths : (texts,) tokens of each text, those of the prompt included

        Returns
        -------
        (texts of which a token is pooled, embedding_size) float32, on the host
        """
        skipped, cu_seqlens = self.tokens_not_pooled(self.resolve_prompt()), cu_seqlens_of(lengths)
        if skipped:
            states, lengths, cu_seqlens = without_first(skipped, states, lengths)
        cu_seqlens = module_of(states).asarray(cu_seqlens)
        vectors = to_host(self.pool(states, cu_seqlens=cu_seqlens, normalize=False, skipped=skipped))
        v = vectors[lengths > 0, : self.embedding_size]
        return np.asarray(v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30))

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt: with the special tokens before it, without those behind it."""
        with tokenizer_errors("the tokenizer does not take the prompt"):
            encoding = self.tokenizer.encode(prompt)
        behind = bool(encoding.special_tokens_mask and encoding.special_tokens_mask[-1])
        return len(encoding.ids) - behind

    def token_ids(self, texts: Sequence[str], prompt: str = "") -> list[NDArray[np.int32]]:
        """The ids of each text with a prompt before it, special tokens included, truncated to `max_seq_length`."""
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer; add tokenizer.json to its folder, or use forward(ids)"
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is a {type(text).__name__}; pass strings")
        ids: list[NDArray[np.int32]] = []
        for start in range(0, len(texts), _TOKENIZER_BATCH):
            batch = texts[start : start + _TOKENIZER_BATCH]
            if prompt:
                batch = [prompt + text for text in batch]
            try:
                with tokenizer_errors("the tokenizer does not take these texts"):
                    encodings = self.tokenizer.encode_batch_fast(batch)
            except ValueError:
                check_unicode(texts, prompt)  # half of a surrogate pair
                raise
            ids.extend(np.array(e.ids, np.int32) for e in encodings)
        rows = self.vocab_size
        for i, text_ids in enumerate(ids):
            if text_ids.size and int(text_ids.max()) >= rows:
                raise ValueError(
                    f"texts[{i}] has a token with id {text_ids.max()}, but the word embeddings have {rows} rows; use "
                    "the tokenizer that the model was trained with"
                )
        return ids
