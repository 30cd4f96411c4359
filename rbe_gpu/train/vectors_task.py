"""Training of models that make vectors of texts, so that they are those of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..evaluate import Agreement, agreement
from ..models.bert import BertEncoder
from ..models.decoder_embedder import DecoderEmbedder
from ..models.decoder_tensors import EMBEDDINGS
from ..models.int8_choice import int8_weights
from . import held_out as split
from . import objective
from .decoder_student import DecoderStudent
from .measures import Cosine
from .pooling import Pooling
from .student import Student
from .task import MIN_BATCHES, Ids, Pass, Task

WORDS = "embeddings.word_embeddings.weight"
_MIN_BATCH = 2  # texts of a batch are compared
_MIN_TOKENS = 3


class VectorsTask(Task):
    """An encoder, or a decoder that makes vectors. Its Dense modules stay as the start file has them.

    Parameters
    ----------
    model : with a tokenizer
    """

    measure = Cosine
    batch_size, max_tokens = 32, 96
    reads_rows = True

    def __init__(self, model: BertEncoder | DecoderEmbedder) -> None:
        self.model = model
        self._pooling = Pooling.of(model)
        if isinstance(model, BertEncoder):
            self.student, self.words = Student.of(model), WORDS
        else:
            self.student, self.words = DecoderStudent.of(model.decoder), EMBEDDINGS
        self._prompt = model.resolve_prompt()
        self._without_text = len(model.token_ids([""], self._prompt)[0])  # tokens of an empty text
        mask = model.tokenizer.encode("a").special_tokens_mask
        self._behind = [*mask[::-1], 0].index(0)  # special tokens behind a text

    def split(self, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        return split.by_count(texts)

    def measured(self, held_out: Sequence[str]) -> list[str]:
        return list(held_out)

    def sequences(self, texts: Sequence[str], max_tokens: int) -> list[Ids]:
        """Those of the texts of which a token is pooled beside special ones, truncated before the special tokens
        behind the text. What is truncated away is text: `check_options` refuses fewer tokens than an empty text has.
        """
        special = self.model.tokenizer.num_special_tokens_to_add(False)
        empty = self._without_text if self.model.tokens_not_pooled(self._prompt) else special
        end = max_tokens - self._behind
        return [
            s if len(s) <= max_tokens else np.append(s[:end], s[len(s) - self._behind :])
            for s in self.model.token_ids(texts, self._prompt)
            if len(s) > empty
        ]

    def check_options(self, batch_size: int, max_tokens: int) -> None:
        if batch_size < _MIN_BATCH:
            raise ValueError(
                f"batch_size={batch_size} is too small; texts of a batch are compared: use 2 or more"
            )
        least = max(_MIN_TOKENS, self._without_text + 1)
        if max_tokens < least:
            raise ValueError(
                f"max_tokens={max_tokens} leaves no room for text beside special tokens and those of the prompt; use "
                f"{least} or more"
            )

    def check(self, sequences: Sequence[Ids], held_out: Sequence[Ids], batch_size: int) -> None:
        count = MIN_BATCHES * batch_size
        if len(sequences) < count:
            raise ValueError(
                f"{len(sequences)} different texts with a token are too few to train on; pass {count} or more, "
                "better thousands"
            )
        if len(held_out) < split.MIN_TEXTS:
            raise ValueError(
                f"{len(held_out)} held-out texts are too few to choose a state on; pass {split.MIN_TEXTS} or more"
            )

    def outputs(self, states: Tensor, text: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return self._pooling.vectors(states.float(), text, weights)

    def loss(self, student: Pass, teacher: Pass, text: Tensor) -> tuple[Tensor, Cosine]:
        result = objective.loss(student.outputs, student.states, teacher.outputs, teacher.states, text)
        return result.total, Cosine(float(result.cosine))

    def compared(
        self,
        outputs: Tensor,
        teacher: Tensor,
        weights: Mapping[str, Tensor],
        teacher_weights: Mapping[str, Tensor],
    ) -> Cosine:
        return Cosine(float((outputs * teacher).sum(1).mean()))

    def quality(self, texts: Sequence[str]) -> Callable[[Any], Agreement]:
        vectors = self.model.embed(texts)
        return lambda model: agreement(vectors, model.embed(texts))

    def int8_activations(self, tensors: Mapping[str, Any], texts: Sequence[str]) -> list[str]:
        return int8_weights(self.model.with_tensors(tensors), texts)
