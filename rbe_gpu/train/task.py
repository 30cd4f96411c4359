"""What training asks of a kind of model: its texts as tokens, its forward pass and loss, and what its quality is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..evaluate import Agreement
from ..evaluate_decoders import Prediction
from .measures import Measure

Ids = NDArray[np.int32]
MIN_BATCHES = 8


class ForwardPass(Protocol):
    """Of a kind of model, for any weights: `student.Student`, `decoder_student.DecoderStudent`."""

    def states(self, weights: Mapping[str, Tensor], words: Tensor, text: Tensor) -> list[Tensor]:
        """Hidden states (batch, seq, hidden) of the words (batch, seq, hidden), text (batch, seq) bool."""


class Pass(NamedTuple):
    """The result of a forward pass.

    Attributes
    ----------
    weights : by canonical name; those of the word embeddings may be missing where only rows of them are decoded
    states : hidden states, (batch, seq, hidden) each
    outputs : float32 rows that `Task.outputs` has made of the last ones
    """

    weights: Mapping[str, Tensor]
    states: Sequence[Tensor]
    outputs: Tensor


class Task(ABC):
    """A dense model as a teacher.

    Attributes
    ----------
    model : the dense model
    student : its forward pass
    words : canonical name of the table of word embeddings
    reads_rows : whether a step reads only the rows of its batch of that table, and trains no others
    """

    #: what the states of training are compared by
    measure: ClassVar[type[Any]]
    #: defaults of `distill`
    batch_size: ClassVar[int]
    max_tokens: ClassVar[int]

    model: Any
    student: ForwardPass
    words: str
    reads_rows: bool

    @abstractmethod
    def split(self, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        """Training and held-out texts. texts : all different"""

    @abstractmethod
    def measured(self, held_out: Sequence[str]) -> list[str]:
        """What is measured on, of the held-out texts of a caller."""

    @abstractmethod
    def sequences(self, texts: Sequence[str], max_tokens: int) -> list[Ids]:
        """Token ids of texts, at most `max_tokens` in each sequence."""

    @abstractmethod
    def check_options(self, batch_size: int, max_tokens: int) -> None:
        """Raise a ValueError for one that is too small."""

    @abstractmethod
    def check(self, sequences: Sequence[Ids], held_out: Sequence[Ids], batch_size: int) -> None:
        """Raise a ValueError where there is too little to train on, or to choose a state on."""

    @abstractmethod
    def outputs(self, states: Tensor, text: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What models are compared by, (rows, columns) float32, of the last states (batch, seq, hidden)."""

    @abstractmethod
    def loss(self, student: Pass, teacher: Pass, text: Tensor) -> tuple[Tensor, Measure]:
        """The loss of a batch, and its measure. text : (batch, seq) bool, false in the padding"""

    @abstractmethod
    def compared(
        self,
        outputs: Tensor,
        teacher: Tensor,
        weights: Mapping[str, Tensor],
        teacher_weights: Mapping[str, Tensor],
    ) -> Measure:
        """The measure of `outputs` of student and teacher, without gradients."""

    @abstractmethod
    def quality(self, texts: Sequence[str]) -> Callable[[Any], Agreement | Prediction]:
        """What says of a model how close it is to the dense one on texts."""

    @abstractmethod
    def int8_activations(self, tensors: Mapping[str, Any], texts: Sequence[str]) -> list[str]:
        """Names of the linear weights that may take int8 activations in the model with these tensors."""
