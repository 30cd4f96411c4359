"""evaluate: metrics that can be computed by hand, and those of the real model, dense and compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from math import cos, radians
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import evaluate as module
from rbe_gpu.evaluate import Agreement, Evaluation, Retrieval, agreement, evaluate, retrieval
from rbe_gpu.models import corpus
from rbe_gpu.models.bert import BertEncoder
from tests import real
from tests.test_compress_model import make_model


def circle(*degrees: float, length: float = 1.0) -> np.ndarray:
    """Vectors of the plane at these angles, (count, 2) float32."""
    angles = np.radians(degrees)
    return (length * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)


TWELVE = circle(*range(12))  # the ten nearest of each: all others but the one at the far end


# --- by hand ------------------------------------------------------------------------------------------


def test_agreement_of_two_texts_that_change_places() -> None:
    vectors = circle(11, *range(1, 11), 0, length=3.0)  # lengths do not count
    result = agreement(TWELVE, vectors)
    assert result.texts == 12
    # texts 0 and 11 are 11 degrees away from where they were, the others are where they were
    assert result.cosine_mean == pytest.approx((10 + 2 * cos(radians(11))) / 12, abs=1e-7)
    assert result.cosine_min == pytest.approx(cos(radians(11)), abs=1e-7)
    # the 1st percentile is 0.11 of the way from the least to the second least, which are the same
    assert result.cosine_p1 == pytest.approx(cos(radians(11)), abs=1e-7)
    # the ten texts between lose one neighbour each: the far end is now the other text
    assert result.overlap_at_10 == (10 * 9 + 2 * 10) / 120


def test_percentile_lies_between_the_least_two() -> None:
    result = agreement(TWELVE, circle(60, *range(1, 12)))
    assert result.cosine_min == pytest.approx(0.5, abs=1e-7)
    assert result.cosine_p1 == pytest.approx(0.5 + 0.11 * 0.5, abs=1e-7)


def test_of_equal_cosines_the_lower_index_is_nearer() -> None:
    same = np.ones((12, 2), np.float32)
    assert agreement(same, 7 * same).overlap_at_10 == 1.0
    # on the circle texts 0 to 5 are far from text 11, the others from text 0; of equal texts, 0 to 10 leave
    # out text 11, and text 11 leaves out text 10
    assert agreement(TWELVE, same).overlap_at_10 == (6 * 10 + 5 * 9 + 9) / 120


def test_retrieval_by_angles() -> None:
    documents = circle(*range(0, 120, 10), length=0.2)
    # 1 degree: documents 0, 1, 2, ... in order; 34 degrees: document 3 before document 4
    result = retrieval(circle(1, 1, 1, 34), documents, [0, 9, 10, 4])
    assert result == Retrieval(queries=4, documents=12, recall_at_1=0.25, recall_at_10=0.75)


def test_retrieval_among_equal_documents() -> None:
    result = retrieval(circle(5, 5, 5), circle(*[40] * 12), np.array([0, 9, 10], np.uint8))
    assert result == Retrieval(3, 12, 1 / 3, 2 / 3)


# --- refused ------------------------------------------------------------------------------------------


def spoiled(value: float) -> np.ndarray:
    vectors = TWELVE.copy()
    vectors[7] = value
    return vectors


@pytest.mark.parametrize(
    ("dense", "vectors", "message"),
    [
        (TWELVE, TWELVE[:11], r"dense has shape \(12, 2\), vectors \(11, 2\)"),
        (TWELVE, np.ones((12, 3)), r"vectors \(12, 3\); pass vectors of the same texts and size"),
        (TWELVE[:10], TWELVE[:10], "10 texts are too few for the 10 nearest others; pass 11 or more"),
        (TWELVE[:0], TWELVE[:0], "0 texts are too few"),
        (TWELVE, spoiled(np.nan), "vectors: vector 7 holds NaN or Inf"),
        (spoiled(np.inf), TWELVE, "dense: vector 7 holds NaN or Inf"),
        (TWELVE, spoiled(0), "vectors: vector 7 is zero"),
        (TWELVE[0], TWELVE[0], r"dense has shape \(2,\); pass \(count, size\)"),
    ],
)
def test_agreement_refuses(dense: np.ndarray, vectors: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agreement(dense, vectors)


@pytest.mark.parametrize(
    ("queries", "documents", "answers", "message"),
    [
        (TWELVE, np.ones((12, 3)), range(12), "queries have 2 values, documents 3"),
        (TWELVE, TWELVE, range(11), r"answers has shape \(11,\) for 12 queries"),
        (TWELVE[:0], TWELVE, [], "there are no queries"),
        (TWELVE[:1], TWELVE[:10], [0], "10 documents are too few for recall_at_10"),
        (TWELVE[:2], TWELVE, [0, 12], "answers run from 0 to 12; use 0 to 11"),
        (TWELVE[:2], TWELVE, [-1, 3], "answers run from -1 to 3"),
        (TWELVE[:2], TWELVE, [0.0, 1.0], "answers has dtype float64; pass indices"),
        (spoiled(0), TWELVE, range(12), "queries: vector 7 is zero"),
        (TWELVE, spoiled(np.nan), range(12), "documents: vector 7 holds NaN or Inf"),
    ],
)
def test_retrieval_refuses(
    queries: np.ndarray, documents: np.ndarray, answers: Sequence[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval(queries, documents, list(answers))


# --- real vectors -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense() -> BertEncoder:
    return rbe.load(real.MODEL_DIR)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> BertEncoder:
    out = tmp_path_factory.mktemp("eval") / "b.rbe.safetensors"
    rbe.compress_model(real.MODEL_DIR, out, grade="B")
    return rbe.load(out)


TEXTS = list(real.texts()[300:348])


@pytest.fixture(scope="module")
def task() -> corpus.RetrievalTask:
    return corpus.retrieval(documents=48)


@pytest.fixture(scope="module")
def result(dense: BertEncoder, compressed: BertEncoder, task: corpus.RetrievalTask) -> Evaluation:
    return evaluate(compressed, dense, TEXTS, task)


def test_the_dense_model_agrees_with_itself(result: Evaluation) -> None:
    assert result.dense.agreement.cosine_min == pytest.approx(1.0, abs=1e-12)
    assert result.dense.agreement.overlap_at_10 == 1.0
    assert result.dense.agreement.texts == len(TEXTS)


def test_the_compressed_model_lies_between(result: Evaluation, dense: BertEncoder) -> None:
    vectors = dense.embed(TEXTS)
    shuffled = agreement(vectors, vectors[np.random.default_rng(0).permutation(len(vectors))])
    between = result.compressed.agreement
    for name in ("cosine_mean", "cosine_p1", "cosine_min", "overlap_at_10"):
        assert getattr(shuffled, name) < getattr(between, name) < getattr(result.dense.agreement, name)
    assert between.cosine_min <= between.cosine_p1 <= between.cosine_mean
    assert between.cosine_mean > 0.9  # grade B: a tenth of each weight is lost
    assert shuffled.overlap_at_10 < 0.45  # ten of 47 others: 0.21 by chance


def test_both_models_find_documents(result: Evaluation, task: corpus.RetrievalTask) -> None:
    for quality in (result.dense, result.compressed):
        assert quality.retrieval is not None
        assert (quality.retrieval.queries, quality.retrieval.documents) == (len(task.queries), 48)
        assert quality.retrieval.recall_at_1 <= quality.retrieval.recall_at_10
        assert quality.retrieval.recall_at_10 > 0.6  # ten of 48 documents: 0.2 by chance


def test_the_same_figures_on_every_run(
    result: Evaluation, dense: BertEncoder, compressed: BertEncoder, task: corpus.RetrievalTask
) -> None:
    calls: list[tuple[str, int, int]] = []
    again = evaluate(compressed, dense, TEXTS, task, progress=lambda *call: calls.append(call))
    assert again == result
    total = 2 * (len(TEXTS) + len(task.queries) + len(task.documents))
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})
    assert calls[-1] == ("compressed", total, total)
    assert {name for name, _, _ in calls} == {"dense", "compressed"}


def test_blocks_of_rows_and_the_textbook(dense: BertEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same neighbours as by sorting whole rows, for any block size."""
    a = dense.embed(TEXTS)
    b = np.roll(a, 1, axis=1) + a
    whole = agreement(a, b), retrieval(a, b, range(len(a)))

    def order(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = (v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1)[:, None] for v in (x, y))
        return np.argsort(-(x @ y.T).astype(np.float32), axis=1, kind="stable")

    def others(x: np.ndarray) -> list[set[int]]:
        return [set([j for j in row if j != i][:10]) for i, row in enumerate(order(x, x).tolist())]

    same = sum(len(p & q) for p, q in zip(others(a), others(b), strict=True))
    assert whole[0].overlap_at_10 == same / (10 * len(a))
    ranks = [row.index(i) for i, row in enumerate(order(a, b).tolist())]
    assert astuple(whole[1])[2:] == (np.mean(np.array(ranks) < 1), np.mean(np.array(ranks) < 10))
    monkeypatch.setattr(module, "_CHUNK_BYTES", 5 * 32 * len(a))  # 5 rows at a time, the last block of 3
    assert (agreement(a, b), retrieval(a, b, range(len(a)))) == whole


# --- models that cannot be compared -------------------------------------------------------------------


class Never(BertEncoder):
    """A model whose `embed` must not be called."""

    def __init__(self) -> None:
        self.pooling, self.hidden_size = ("mean",), 384

    def embed(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a long run began before its inputs were checked")


def test_counts_are_checked_before_any_text_is_embedded() -> None:
    model = Never()
    with pytest.raises(ValueError, match="3 texts are too few"):
        evaluate(model, model, TEXTS[:3])
    with pytest.raises(ValueError, match="there are no queries"):
        evaluate(model, model, TEXTS, ([], TEXTS, []))
    with pytest.raises(ValueError, match="answers run from 0 to 99"):
        evaluate(model, model, TEXTS, (TEXTS[:2], TEXTS, [0, 99]))


def test_other_models_are_refused(dense: BertEncoder, tmp_path: Path) -> None:
    small = rbe.load(make_model(tmp_path / "small"))
    with pytest.raises(ValueError, match="gives vectors of 96 values, the dense one of 384"):
        evaluate(small, dense, TEXTS)
    short = rbe.load(real.MODEL_DIR)
    short.tokenizer.enable_truncation(24)
    with pytest.raises(ValueError, match=r"tokenize text \d+ differently \(24 and \d+ tokens\)"):
        evaluate(short, dense, TEXTS)


def test_a_broken_model_is_named(dense: BertEncoder) -> None:
    class Broken(BertEncoder):
        def __init__(self) -> None:
            self.__dict__.update(dense.__dict__)

        def embed(self, texts: Any, *_: Any, **__: Any) -> Any:
            vectors = np.ones((len(texts), 384), np.float32)
            vectors[3] = np.nan
            return vectors

    with pytest.raises(ValueError, match="the compressed model gives NaN, Inf or a vector of zeros for"):
        evaluate(Broken(), dense, TEXTS[:11])


def test_no_retrieval_unless_asked(dense: BertEncoder) -> None:
    result = evaluate(dense, dense, TEXTS[:11])
    assert result.dense.retrieval is None
    assert result.compressed == result.dense
    assert result.dense.agreement == Agreement(11, *map(pytest.approx, (1.0, 1.0, 1.0)), overlap_at_10=1.0)
