"""Sentence embeddings of decoders, such as Qwen3-Embedding (Zhang et al. 2025), and of encoders that are built as
decoders are, such as ModernBERT (Warner et al. 2024).

A token's state in a decoder has seen the tokens before it: that of the last one is the text's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blocks import Array, RBEBlocks
from ..cache import PanelCache
from ..workspace import Workspace
from . import dense_modules
from .decoder import Decoder, Tensors
from .dense_modules import DenseModule
from .pooling import cu_seqlens_of
from .text_embedder import TextEmbedder


class DecoderEmbedder(TextEmbedder):
    """A decoder, or an encoder that is built as one, whose pooled states are vectors of texts.

    Parameters
    ----------
    decoder : with the tokenizer of the texts, or none
    pooling, normalize, max_seq_length, prompts, default_prompt_name, truncate_dim, copy_tokenizer, dense : as of
        `BertEncoder`

    Attributes
    ----------
    decoder : it is not to generate text: its head was not trained, or it has none
    """

    def __init__(
        self,
        decoder: Decoder,
        pooling: Mapping[str, Any] | None = None,
        normalize: bool = True,
        max_seq_length: int | None = None,
        prompts: Mapping[str, str | None] | None = None,
        default_prompt_name: str | None = None,
        truncate_dim: int | None = None,
        copy_tokenizer: bool = True,
        dense: Sequence[DenseModule] = (),
    ) -> None:
        self.decoder = decoder
        tokenizer = deepcopy(decoder.tokenizer) if copy_tokenizer else decoder.tokenizer
        self.hidden_size = decoder.settings.hidden_size
        self.int8_activations = decoder.int8_activations
        self._set_up_texts(
            tokenizer, pooling, normalize, max_seq_length, decoder.settings.max_positions, prompts,
            default_prompt_name, truncate_dim, dense,
        )  # fmt: skip

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.decoder.config

    @property
    def device(self) -> str:
        return self.decoder.device

    @property
    def dtype(self) -> Any:
        """Of the hidden states."""
        return self.decoder.dtype

    @property
    def cache(self) -> PanelCache:
        """Of decoded panels."""
        return self.decoder.cache

    @property
    def workspace(self) -> Workspace:
        return self.decoder.workspace

    @property
    def vocab_size(self) -> int:
        return self.decoder.settings.vocab_size

    @property
    def max_positions(self) -> int:
        return self.decoder.settings.max_positions

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory, without the cache and the workspace."""
        return self.decoder.nbytes + sum(module.linear.nbytes for module in self.dense)

    def tensors(self) -> dict[str, Array | RBEBlocks]:
        """The tensors of the model, as of `Decoder.tensors` and `dense_modules.tensor_names`."""
        return {**self.decoder.tensors(), **dense_modules.tensors_of(self.dense)}

    def with_tensors(self, tensors: Tensors) -> DecoderEmbedder:
        """The same model with some tensors replaced, and no int8 activations."""
        dense = {name: tensor for name, tensor in tensors.items() if name.startswith(dense_modules.PREFIX)}
        others = {name: tensor for name, tensor in tensors.items() if name not in dense}
        model = self._with_decoder(self.decoder.with_tensors(others))
        model.dense = dense_modules.with_tensors(self.dense, dense)
        return model

    def with_int8_activations(self, names: Collection[str]) -> DecoderEmbedder:
        """The same model and weights, with int8 activations for the linear weights of these names alone."""
        return self._with_decoder(self.decoder.with_int8_activations(names))

    def _with_decoder(self, decoder: Decoder) -> DecoderEmbedder:
        model = copy(self)
        model.decoder, model.int8_activations = decoder, decoder.int8_activations
        return model

    def forward(self, ids: Array, lengths: Array | None = None) -> Array:
        """Last hidden states of a padded batch, as of `Decoder.forward`."""
        return self.decoder.forward(ids, lengths)

    def _text_states(
        self, ids: NDArray[np.int64], lengths: NDArray[np.int64], ws: Workspace
    ) -> tuple[Array, Array]:
        *_, states = self.decoder._states(ids, lengths, None, ws)
        return states, self._placed("texts.cu_seqlens", cu_seqlens_of(lengths), ws)

    def __repr__(self) -> str:
        return f"DecoderEmbedder({'+'.join(self.pooling)} pooling, {self.decoder!r})"
