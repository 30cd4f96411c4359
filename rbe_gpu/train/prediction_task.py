"""Training of models that predict tokens, so that their predictions are those of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..evaluate_decoders import WINDOW, Prediction, evaluate_decoders
from ..models.decoder import Decoder
from ..models.decoder_tensors import EMBEDDINGS, HEAD
from ..models.int8_choice import int8_parts, int8_windows, predicted
from . import objective, prediction
from .decoder_student import DecoderStudent
from .measures import Divergence
from .task import MIN_BATCHES, Ids, Pass, Task

_MIN_HELD_OUT = 512  # predicted tokens
_MIN_TOKENS = 2


class PredictionTask(Task):
    """A decoder that generates text.

    Where the output matrix is the table of word embeddings, that is one weight, whose gradient is of both uses. The
    logits of every token read all rows of the output matrix: it is trained as a whole, like every other matrix. Of a
    table of its own for the words only the rows of a batch are read and trained.

    Parameters
    ----------
    model : with a tokenizer
    """

    measure = Divergence
    batch_size, max_tokens = 8, WINDOW
    words = EMBEDDINGS

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.student = DecoderStudent.of(model)
        self.reads_rows = not model.settings.tied
        self._head = EMBEDDINGS if model.settings.tied else HEAD

    def sequences(self, texts: Sequence[str], max_tokens: int) -> list[Ids]:
        """The texts, joined by an empty line, cut into windows, each of which begins with the special tokens that the
        tokenizer puts before a text, as what is generated from does. None is longer than the model's positions.
        """
        if not texts:
            return []
        mask = self.model.tokenizer.encode("a").special_tokens_mask
        count = mask.index(0) if 0 in mask else 0
        ids = np.asarray(self.model.token_ids("\n\n".join(texts)), np.int32)
        first, ids = ids[:count], ids[count:]
        size = max(1, min(max_tokens, self.model.settings.max_positions) - count)
        parts = (np.concatenate([first, ids[i : i + size]]) for i in range(0, len(ids), size))
        return [part for part in parts if len(part) >= _MIN_TOKENS]

    def check_options(self, batch_size: int, max_tokens: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small; use 1 or more")
        if max_tokens < _MIN_TOKENS:
            raise ValueError(f"max_tokens={max_tokens} is too small; use {_MIN_TOKENS} or more")

    def check(self, sequences: Sequence[Ids], held_out: Sequence[Ids], batch_size: int) -> None:
        count = MIN_BATCHES * batch_size
        if len(sequences) < count:
            longest = max(map(len, sequences), default=0)
            raise ValueError(
                f"the texts make {len(sequences)} sequences of {longest} tokens, too few to train on; pass text for "
                f"{count} or more, better thousands"
            )
        tokens = sum(map(len, held_out))
        if tokens < _MIN_HELD_OUT:
            raise ValueError(
                f"held-out texts of {tokens} tokens are too short to choose a state on; pass {_MIN_HELD_OUT} or more"
            )

    def outputs(self, states: Tensor, text: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The last states of all tokens: logits of all of them would take too much memory (`prediction`)."""
        return states.float()[text]

    def loss(self, student: Pass, teacher: Pass, text: Tensor) -> tuple[Tensor, Divergence]:
        kl, same = prediction.divergence_loss(
            student.outputs, student.weights[self._head], teacher.outputs, teacher.weights[self._head],
            self.model.settings.logit_softcap,
        )  # fmt: skip
        states = objective.relative_error(student.states, teacher.states, text)
        return kl + states, Divergence(float(kl.detach()), float(same))

    def compared(
        self,
        outputs: Tensor,
        teacher: Tensor,
        weights: Mapping[str, Tensor],
        teacher_weights: Mapping[str, Tensor],
    ) -> Divergence:
        sums = prediction.divergence(
            outputs,
            weights[self._head],
            teacher,
            teacher_weights[self._head],
            self.model.settings.logit_softcap,
        )
        return Divergence(*(float(total) / len(outputs) for total in sums))

    def quality(self, texts: Sequence[str]) -> Callable[[Any], Prediction]:
        c = self.model.settings
        window = min(WINDOW, c.first_context or WINDOW, c.max_positions)
        return lambda model: evaluate_decoders(model, self.model, texts, window=window).compressed

    def int8_activations(self, tensors: Mapping[str, Any], texts: Sequence[str]) -> list[str]:
        windows = int8_windows(self.sequences(texts, self.max_tokens))
        dense = list(
            predicted(self.model, windows)
        )  # 8 windows of 128 tokens: 1.1 GB of a vocabulary of 262,144
        return int8_parts(self.model.with_tensors(tensors), windows, lambda: dense)
