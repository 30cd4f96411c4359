"""How far a student has come, on a batch or on held-out texts: what training chooses the best state by."""

from __future__ import annotations

from typing import NamedTuple


class Cosine(NamedTuple):
    """Of models that make vectors.

    Attributes
    ----------
    cosine : mean between the vectors of student and teacher
    """

    cosine: float

    @property
    def score(self) -> float:
        """The higher, the better."""
        return self.cosine

    def __str__(self) -> str:
        return f"cosine {self.cosine:.4f}"


class Divergence(NamedTuple):
    """Of models that predict tokens.

    Attributes
    ----------
    kl : mean Kullback-Leibler divergence of the student's predictions from the teacher's, in nats
    top_1 : fraction of tokens at which both have the same most probable next token
    """

    kl: float
    top_1: float

    @property
    def score(self) -> float:
        """The higher, the better."""
        return -self.kl

    def __str__(self) -> str:
        return f"KL {self.kl:.4f}, top-1 {self.top_1:.1%}"


Measure = Cosine | Divergence
