"""evaluate: how closely a compressed model matches its dense one, in its vectors and in retrieval.

    cosine[i]     = <a_i, b_i> / (||a_i|| ||b_i||)            a dense, b compressed, one text i
    overlap_at_10 = mean_i |N_a(i) & N_b(i)| / 10             N(i): the ten nearest neighbours of text i, i excluded
    recall_at_k   = fraction of queries whose answer is among their k nearest documents

Nearest is by cosine similarity; ties go to the lower index. Similarities are computed in blocks of rows, so memory is
twice that of the vectors and some 32 MB. They are computed in float64 and rounded to float32, so that equal vectors
tie whatever the order of summation.
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
_PAIR_BYTES = 32  # of one similarity and the temporaries of its comparisons
_PROGRESS_STEP = 256  # texts between two calls of progress

F64 = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
#: queries, documents, and for each query the index of its document
Task = tuple[Sequence[str], Sequence[str], Sequence[int]]


class Embeds(Protocol):
    """The methods of a model that `evaluate` calls; `rbe_gpu.load` returns one."""

    @property
    def embedding_size(self) -> int:
        """Columns of `embed`."""

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[Any]:
        """(len(texts), embedding_size) vectors."""

    def token_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The token ids of each text, as in `embed`."""


@dataclass(frozen=True)
class Agreement:
    """Agreement between two models' vectors of the same texts.

    Attributes
    ----------
    texts : number of texts
    cosine_mean, cosine_p1, cosine_min : mean, 1st percentile and minimum of the cosines between a text's two vectors
    overlap_at_10 : fraction of the ten nearest other texts that the models have in common
    """

    texts: int
    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    overlap_at_10: float


@dataclass(frozen=True)
class Retrieval:
    """Recall of a model, where each query has one relevant document.

    Attributes
    ----------
    queries, documents : their numbers
    recall_at_1, recall_at_10 : fraction of queries whose document is the nearest, or among the ten nearest
    """

    queries: int
    documents: int
    recall_at_1: float
    recall_at_10: float


@dataclass(frozen=True)
class Quality:
    """Metrics of one model. `agreement` is with the dense model; `retrieval` is None without a task."""

    agreement: Agreement
    retrieval: Retrieval | None


@dataclass(frozen=True)
class Evaluation:
    """The dense model and the compressed one on the same texts, queries and documents."""

    dense: Quality
    compressed: Quality


# --- metrics on vectors -------------------------------------------------------------------------------


def _unit(vectors: Any, name: str) -> F64:
    """Vectors divided by their L2 norms, (count, size)."""
    unit = np.array(vectors, np.float64)
    if unit.ndim != 2:
        raise ValueError(f"{name} has shape {unit.shape}; pass (count, size), one vector per row")
    lengths = np.linalg.norm(unit, axis=1, keepdims=True)
    infinite = ~np.isfinite(unit).all(axis=1)
    for bad, what in ((infinite, "holds NaN or Inf"), (lengths == 0, "is zero and has no direction")):
        if bad.any():
            raise ValueError(f"{name}: vector {int(bad.argmax())} {what}")
    unit /= lengths
    return unit


def _similarities(rows: F64, columns: F64) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Cosine similarities of a block of rows to all columns, block by block."""
    step = max(1, _CHUNK_BYTES // (_PAIR_BYTES * len(columns)))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        with blas:
            cosines = rows[part] @ columns.T
        yield part, cosines.astype(np.float32)


def _nearest(similar: NDArray[np.float32], part: slice) -> NDArray[np.bool_]:
    """Mask of the ten nearest others of each row, (rows, count); the diagonal of `similar` is overwritten."""
    diagonal = np.arange(part.start, part.stop)
    similar[diagonal - part.start, diagonal] = -np.inf
    last = similar.shape[1] - NEIGHBOURS
    tenth = np.partition(similar, last, axis=1)[:, last, None]
    nearer = similar > tenth
    tied = similar == tenth
    left = NEIGHBOURS - nearer.sum(axis=1, keepdims=True)
    return np.asarray(nearer | (tied & (tied.cumsum(axis=1, dtype=np.int32) <= left)))


def _check_texts(count: int) -> None:
    if count <= NEIGHBOURS:
        raise ValueError(
            f"{count} texts are too few for the {NEIGHBOURS} nearest others; pass {NEIGHBOURS + 1} or more"
        )


def agreement(dense: Any, vectors: Any) -> Agreement:
    """Compare two models' vectors of the same texts.

    Parameters
    ----------
    dense, vectors : (texts, size) floats, of any norm but 0; row i of both is text i

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
    indices = np.asarray(answers)
    if indices.shape != (queries,):
        raise ValueError(f"answers has shape {indices.shape} for {queries} queries; pass one index for each")
    if not queries:
        raise ValueError("there are no queries")
    if documents <= NEIGHBOURS:
        raise ValueError(
            f"{documents} documents are too few for recall_at_{NEIGHBOURS}; pass {NEIGHBOURS + 1} or more"
        )
    if indices.dtype.kind not in "iu":
        raise ValueError(f"answers has dtype {indices.dtype}; pass indices of documents")
    if int(indices.min()) < 0 or int(indices.max()) >= documents:
        raise ValueError(f"answers run from {indices.min()} to {indices.max()}; use 0 to {documents - 1}")
    return indices.astype(np.int64)


def retrieval(queries: Any, documents: Any, answers: Sequence[int] | NDArray[Any]) -> Retrieval:
    """Recall at 1 and 10 of each query's answer.

    Parameters
    ----------
    queries : (queries, size) floats, of any norm but 0
    documents : (documents, size) floats, of any norm but 0
    answers : (queries,) integers, the row in `documents` of each query's answer

    Raises
    ------
    ValueError
        Sizes or counts differ, there are no queries or fewer than 11 documents, an answer is out of range, or a
        vector is zero or holds NaN or Inf.
    """
    q, d = _unit(queries, "queries"), _unit(documents, "documents")
    if q.shape[1] != d.shape[1]:
        raise ValueError(f"queries have {q.shape[1]} values, documents {d.shape[1]}; use one model for both")
    right = _check_answers(answers, len(q), len(d))[:, None]
    index = np.arange(len(d))
    ranks = np.empty(len(q), np.int64)  # documents nearer than the answer
    for part, similar in _similarities(q, d):
        answer = np.take_along_axis(similar, right[part], axis=1)
        nearer = (similar > answer) | ((similar == answer) & (index < right[part]))
        ranks[part] = nearer.sum(axis=1)
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
    """Embed the same texts with both models and compare the vectors.

    Parameters
    ----------
    compressed, dense : models, as `rbe_gpu.load` returns them
    texts : 11 or more, for `agreement`
    task : queries, documents and answers, such as `rbe_gpu.models.corpus.retrieval()`; None: no retrieval
    batch_size : texts per batch
    progress : called with the name of the model, the number of texts embedded and their total

    Raises
    ------
    ValueError
        The models' vectors differ in size, or their token ids of a text differ; or `agreement` or `retrieval` raises
        it for the counts or the vectors.
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
        batches = []
        for start in range(0, len(part), _PROGRESS_STEP):
            some = part[start : start + _PROGRESS_STEP]
            batches.append(model.embed(some, batch_size=batch_size))
            done += len(some)
            if progress is not None:
                progress(name, done, total)
        vectors = np.concatenate(batches)
        invalid = ~(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1))
        if invalid.any():
            text = part[int(invalid.argmax())]
            raise ValueError(f"the {name} model gives NaN, Inf or a vector of zeros for {text[:60]!r}")
        return vectors

    def score(model: Embeds, name: str) -> Retrieval | None:
        if task is None:
            return None
        return retrieval(embed(model, name, queries), embed(model, name, documents), answers)

    reference = embed(dense, "dense", texts)
    return Evaluation(
        dense=Quality(agreement(reference, reference), score(dense, "dense")),
        compressed=Quality(
            agreement(reference, embed(compressed, "compressed", texts)), score(compressed, "compressed")
        ),
    )


def _check_pair(compressed: Embeds, dense: Embeds, texts: Sequence[str]) -> None:
    """Check that the vectors of two models can be compared: same size, same tokens."""
    if compressed.embedding_size != dense.embedding_size:
        raise ValueError(
            f"the compressed model gives vectors of {compressed.embedding_size} values, the dense one of "
            f"{dense.embedding_size}; compare with the dense model that was compressed"
        )
    for i, (a, b) in enumerate(zip(compressed.token_ids(texts), dense.token_ids(texts), strict=True)):
        if not np.array_equal(a, b):
            raise ValueError(
                f"the two models tokenize text {i} differently ({len(a)} and {len(b)} tokens): another tokenizer, "
                "or another max_seq_length; compare with the dense model that was compressed"
            )
