"""Training of models that predict tokens, so that their predictions are those of the dense model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..evaluate_decoders import WINDOW, Prediction, evaluate_decoders
from ..models.decoder import Decoder
from ..models.decoder_tensors import EMBEDDINGS, HEAD
from ..models.int8_choice import int8_parts, int8_windows, predicted
from ..models.scratch import Scratch
from . import held_out as split
from . import objective, prediction
from .decoder_student import DecoderStudent
from .measures import Divergence
from .task import MIN_BATCHES, Ids, Pass, Task

_MIN_HELD_OUT_TOKENS = 512
_MIN_TOKENS = 2
#: Characters that are tokenized at once: 10 MB in one string took 2.2 GB
_PIECE = 1 << 18
_BETWEEN_WORDS, _BEFORE_SPACE = re.compile(r"(?<=\w) (?=\w)"), re.compile(r"(?<=\S)\s")
_LOOK_BACK = 1 << 12  # characters that a place to cut is searched in


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

    def split(self, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        # the tokens are estimated: a quarter more than what `check` asks for
        return split.by_tokens(texts, self.model.token_ids, _MIN_HELD_OUT_TOKENS * 5 // 4)

    def measured(self, held_out: Sequence[str]) -> list[str]:
        """At most some 32,768 tokens, which the states of the dense model are held of."""
        return split.bounded(held_out, self.model.token_ids)

    def sequences(self, texts: Sequence[str], max_tokens: int) -> list[Ids]:
        """The texts, joined by an empty line, cut into windows, each of which begins with the special tokens that the
        tokenizer puts before a text, as what is generated from does. None is longer than the model's positions.

        The join is tokenized in pieces of at most 262,144 characters, cut before a space between words where there is
        one. That gives the ids of the whole join with tokenizers that split there (byte-level ones, Metaspace); one
        that puts a space before every text (as Llama 2's normalizer does) has a token more at each cut.
        """
        if not texts:
            return []
        mask = self.model.tokenizer.encode("a").special_tokens_mask
        count, behind = ([*side, 0].index(0) for side in (mask, mask[::-1]))
        pieces = [np.asarray(self.model.token_ids(piece), np.int32) for piece in _pieces(texts)]
        first = pieces[0][:count]
        ids = np.concatenate([piece[count : len(piece) - behind] for piece in pieces])
        if behind:
            ids = np.concatenate([ids, pieces[-1][-behind:]])
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
        if tokens < _MIN_HELD_OUT_TOKENS:
            raise ValueError(
                f"held-out texts of {tokens} tokens are too short to choose a state on; pass "
                f"{_MIN_HELD_OUT_TOKENS} or more"
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
        scratch = Scratch()  # 8 windows of 128 tokens: 1.1 GB of a vocabulary of 262,144
        dense = [scratch.array(logs) for logs in predicted(self.model, windows)]
        return int8_parts(self.model.with_tensors(tensors), windows, lambda: (read() for read in dense))


def _pieces(texts: Sequence[str]) -> Iterator[str]:
    """The texts joined by an empty line, in pieces of at most `_PIECE` characters."""
    rest = ""
    for i, text in enumerate(texts):
        rest += f"\n\n{text}" if i else text
        start = 0
        while len(rest) - start > _PIECE:
            stop = _cut(rest, start, start + _PIECE)
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    yield rest


def _cut(text: str, start: int, most: int) -> int:
    """Where to cut a text that begins at `start`: at `most` or up to 4,096 characters before."""
    first = max(start + 1, most - _LOOK_BACK)
    for place in (_BETWEEN_WORDS, _BEFORE_SPACE):
        places = [match.start() for match in place.finditer(text, first, most)]
        if places:
            return places[-1]
    return most
