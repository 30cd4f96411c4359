"""evaluate: how well a compressed model does what its dense one does, in vectors and in retrieval.

    cosine[i]     = <a_i, b_i> / (||a_i|| ||b_i||)            a dense, b compressed, one text i
    overlap_at_10 = mean_i |N_a(i) & N_b(i)| / 10             N(i): the ten texts nearest to text i, itself left out
    recall_at_k   = share of queries whose answer is among their k nearest documents

Nearest is by cosine; of equal cosines the lower index is nearer. Similarities are computed a block of rows at a
time, so memory is that of the vectors, twice, and some 32 MB. They are float64 products rounded to float32: equal
vectors then tie, whatever order the product was summed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .threads import blas

NEIGHBOURS = 10  # of overlap_at_10 and recall_at_10
_CHUNK_BYTES = 32 << 20
_PAIR_BYTES = 32  # of one similarity and the temporaries that compare it
_EMBED_AT_ONCE = 256  # texts between two calls of progress

F64 = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
#: queries, documents, and for each query the index of its document
Task = tuple[Sequence[str], Sequence[str], Sequence[int]]


class Embeds(Protocol):
    """What `evaluate` needs of a model; `rbe_gpu.load` gives one."""

    @property
    def embedding_size(self) -> int:
        """Columns of `embed`."""

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[Any]:
        """(len(texts), embedding_size) vectors."""

    def token_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text, as the model reads it."""


@dataclass(frozen=True)
class Agreement:
    """How near the vectors of the same texts are in two models.

    Attributes
    ----------
    texts : how many
    cosine_mean, cosine_p1, cosine_min : mean, 1st percentile and least of the cosines, each text to itself
    overlap_at_10 : share of the ten nearest other texts that are the same in both models
    """

    texts: int
    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    overlap_at_10: float


@dataclass(frozen=True)
class Retrieval:
    """How often a model finds the one document that answers a query.

    Attributes
    ----------
    queries, documents : how many
    recall_at_1, recall_at_10 : share of queries whose document is the nearest, or one of the ten nearest
    """

    queries: int
    documents: int
    recall_at_1: float
    recall_at_10: float


@dataclass(frozen=True)
class Quality:
    """What one model reaches. `agreement` is with the dense model; `retrieval` is None where none was asked."""

    agreement: Agreement
    retrieval: Retrieval | None


@dataclass(frozen=True)
class Evaluation:
    """The dense model and the compressed one on the same texts, queries and documents."""

    dense: Quality
    compressed: Quality


# --- metrics on vectors -------------------------------------------------------------------------------


def _unit(vectors: Any, name: str) -> F64:
    """Vectors divided by their lengths, (count, size)."""
    found = np.array(vectors, np.float64)
    if found.ndim != 2:
        raise ValueError(f"{name} has shape {found.shape}; pass (count, size), one vector per row")
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    infinite = ~np.isfinite(found).all(axis=1)
    for bad, what in ((infinite, "holds NaN or Inf"), (lengths == 0, "is zero and has no direction")):
        if bad.any():
            raise ValueError(f"{name}: vector {int(bad.argmax())} {what}")
    found /= lengths
    return found


def _similarities(rows: F64, columns: F64) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Cosines of a block of rows to all columns, block by block."""
    step = max(1, _CHUNK_BYTES // (_PAIR_BYTES * len(columns)))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        with blas:
            product = rows[part] @ columns.T
        yield part, product.astype(np.float32)


def _nearest(similar: NDArray[np.float32], part: slice) -> NDArray[np.bool_]:
    """Which are the ten nearest others of each row, (rows, count); `similar` loses its diagonal."""
    here = np.arange(part.start, part.stop)
    similar[here - part.start, here] = -np.inf
    last = similar.shape[1] - NEIGHBOURS
    tenth = np.partition(similar, last, axis=1)[:, last, None]
    nearer = similar > tenth
    level = similar == tenth
    left = NEIGHBOURS - nearer.sum(axis=1, keepdims=True)
    return np.asarray(nearer | (level & (level.cumsum(axis=1, dtype=np.int32) <= left)))


def _check_texts(count: int) -> None:
    if count <= NEIGHBOURS:
        raise ValueError(
            f"{count} texts are too few for the {NEIGHBOURS} nearest others; give {NEIGHBOURS + 1} or more"
        )


def agreement(dense: Any, vectors: Any) -> Agreement:
    """Compare the vectors of the same texts from two models.

    Parameters
    ----------
    dense, vectors : (texts, size) floats, of any length but 0; row i of both is text i

    Raises
    ------
    ValueError
        The shapes differ, there are fewer than 11 texts, or a vector is zero or holds NaN or Inf.
    """
    a, b = _unit(dense, "dense"), _unit(vectors, "vectors")
    if a.shape != b.shape:
        raise ValueError(
            f"dense has shape {a.shape}, vectors {b.shape}; pass vectors of the same texts and size"
        )
    _check_texts(len(a))
    cosines = np.minimum(np.einsum("ij,ij->i", a, b), 1.0)
    same = 0
    for (part, near_a), (_, near_b) in zip(_similarities(a, a), _similarities(b, b), strict=True):
        same += int((_nearest(near_a, part) & _nearest(near_b, part)).sum())
    return Agreement(
        texts=len(a),
        cosine_mean=float(cosines.mean()),
        cosine_p1=float(np.percentile(cosines, 1)),
        cosine_min=float(cosines.min()),
        overlap_at_10=same / (NEIGHBOURS * len(a)),
    )


def _check_answers(answers: Sequence[int] | NDArray[Any], queries: int, documents: int) -> NDArray[np.int64]:
    found = np.asarray(answers)
    if found.shape != (queries,):
        raise ValueError(f"answers has shape {found.shape} for {queries} queries; pass one index for each")
    if not queries:
        raise ValueError("there are no queries")
    if documents <= NEIGHBOURS:
        raise ValueError(
            f"{documents} documents are too few for recall_at_{NEIGHBOURS}; give {NEIGHBOURS + 1} or more"
        )
    if found.dtype.kind not in "iu":
        raise ValueError(f"answers holds {found.dtype}; pass indices of documents")
    if int(found.min()) < 0 or int(found.max()) >= documents:
        raise ValueError(f"answers run from {found.min()} to {found.max()}; use 0 to {documents - 1}")
    return found.astype(np.int64)


def retrieval(queries: Any, documents: Any, answers: Sequence[int] | NDArray[Any]) -> Retrieval:
    """Whether each query's nearest documents include its answer.

    Parameters
    ----------
    queries : (queries, size) floats, of any length but 0
    documents : (documents, size) floats, of any length but 0
    answers : (queries,) integers, the row of `documents` that answers each query

    Raises
    ------
    ValueError
        Sizes or counts differ, there are no queries or fewer than 11 documents, an answer is no document, or a
        vector is zero or holds NaN or Inf.
    """
    q, d = _unit(queries, "queries"), _unit(documents, "documents")
    if q.shape[1] != d.shape[1]:
        raise ValueError(f"queries have {q.shape[1]} values, documents {d.shape[1]}; use one model for both")
    right = _check_answers(answers, len(q), len(d))[:, None]
    index = np.arange(len(d))
    ranks = np.empty(len(q), np.int64)  # documents nearer than the answer
    for part, similar in _similarities(q, d):
        level = np.take_along_axis(similar, right[part], axis=1)
        ahead = (similar > level) | ((similar == level) & (index < right[part]))
        ranks[part] = ahead.sum(axis=1)
    return Retrieval(
        queries=len(q),
        documents=len(d),
        recall_at_1=float((ranks < 1).mean()),
        recall_at_10=float((ranks < NEIGHBOURS).mean()),
    )


# --- metrics on models --------------------------------------------------------------------------------


def evaluate(
    compressed: Embeds,
    dense: Embeds,
    texts: Sequence[str],
    task: Task | None = None,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Evaluation:
    """Embed the same texts with both models, and compare.

    Parameters
    ----------
    compressed, dense : models, as `rbe_gpu.load` gives them
    texts : 11 or more, for the agreement of the vectors
    task : queries, documents and answers, such as `rbe_gpu.models.corpus.retrieval()`; None: no retrieval
    batch_size : texts computed together
    progress : called with what is embedded, and the texts done and to do in all

    Raises
    ------
    ValueError
        The models give vectors of different sizes, or do not read a text as the same tokens; or `agreement` or
        `retrieval` refuses the counts, or the vectors.
    """
    queries, documents, answers = ([], [], []) if task is None else task
    _check_texts(len(texts))
    if task is not None:
        _check_answers(answers, len(queries), len(documents))
    _check_pair(compressed, dense, texts)
    total = 2 * (len(texts) + len(queries) + len(documents))
    done = 0

    def embed(model: Embeds, name: str, part: Sequence[str]) -> NDArray[Any]:
        nonlocal done
        found = []
        for start in range(0, len(part), _EMBED_AT_ONCE):
            some = part[start : start + _EMBED_AT_ONCE]
            found.append(model.embed(some, batch_size=batch_size))
            done += len(some)
            if progress is not None:
                progress(name, done, total)
        vectors = np.concatenate(found)
        lost = ~(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1))
        if lost.any():
            text = part[int(lost.argmax())]
            raise ValueError(f"the {name} model gives NaN, Inf or a vector of zeros for {text[:60]!r}")
        return vectors

    def find(model: Embeds, name: str) -> Retrieval | None:
        if task is None:
            return None
        return retrieval(embed(model, name, queries), embed(model, name, documents), answers)

    reference = embed(dense, "dense", texts)
    return Evaluation(
        dense=Quality(agreement(reference, reference), find(dense, "dense")),
        compressed=Quality(
            agreement(reference, embed(compressed, "compressed", texts)), find(compressed, "compressed")
        ),
    )


def _check_pair(compressed: Embeds, dense: Embeds, texts: Sequence[str]) -> None:
    """Two models whose vectors can be compared: same size, same tokens."""
    if compressed.embedding_size != dense.embedding_size:
        raise ValueError(
            f"the compressed model gives vectors of {compressed.embedding_size} values, the dense one of "
            f"{dense.embedding_size}; compare with the dense model that it was made from"
        )
    for i, (a, b) in enumerate(zip(compressed.token_ids(texts), dense.token_ids(texts), strict=True)):
        if not np.array_equal(a, b):
            raise ValueError(
                f"the two models read text {i} as different tokens ({len(a)} and {len(b)}): another tokenizer, "
                "or another max_seq_length; compare with the dense model that this one was made from"
            )
