"""A few tokens in one call: the same bits as op by op."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu.models import bert as bert_module
from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.bert_tensors import linear_weights, tensor_shapes

from . import real
from .architectures.cases import CONFIGS, weights
from .compressed import gridded

LENGTHS = ([1], [2, 3], [8], [9], [16, 0, 1], [40, 24], [65], [128])
LAYERS = 2


class Steps:
    """Counts the batches that went through in one call, or refuses to take any."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.taken, self.allowed = 0, True
        original = bert_module.few_tokens

        def few_tokens(*args: Any) -> Any:
            states = original(*args) if self.allowed else None
            self.taken += states is not None
            return states

        patch.setattr(bert_module, "few_tokens", few_tokens)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def minilm(**changes: Any) -> BertEncoder:
    """The first layers of MiniLM, with some tensors changed."""
    config = {**real.config(), "num_hidden_layers": LAYERS}
    tensors = {name: real.weight(name) for name, _ in tensor_shapes(config)}
    return BertEncoder({**tensors, **changes.pop("tensors", {})}, config, **changes)


def compressed(make: Any, **options: Any) -> BertEncoder:
    """With compressed linear weights."""
    dense = minilm()
    named = dense.tensors()
    return minilm(tensors={name: make(named[name]) for name in linear_weights(dense.config)}, **options)


def states(model: BertEncoder, lengths: list[int]) -> NDArray[np.float32]:
    ids = np.random.default_rng(len(lengths)).integers(1, model.vocab_size, sum(lengths))
    packed, _ = model._text_states(ids, np.array(lengths, np.int64), model.workspace)
    return np.array(packed)


def check(model: BertEncoder, steps: Steps, taken: bool = True, lengths: Any = LENGTHS) -> None:
    """Both ways give the same states."""
    for of_texts in lengths:
        steps.allowed, steps.taken = True, 0
        got = states(model, of_texts)
        assert steps.taken == taken
        steps.allowed = False
        assert np.array_equal(got, states(model, of_texts)), of_texts
        assert np.isfinite(got).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_dense_weights(threads: int, steps: Steps) -> None:
    before = rbe.get_num_threads()
    rbe.set_num_threads(threads)
    try:
        check(minilm(), steps)
    finally:
        rbe.set_num_threads(before)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_dense_weights_of_half_types(dtype: Any, steps: Steps) -> None:
    named = minilm().tensors()
    check(minilm(tensors={name: np.asarray(a).astype(dtype) for name, a in named.items()}), steps)


@pytest.mark.parametrize(
    "options",
    [
        {"codes": "dense-int4", "transform": "none"},
        {"codes": "dense-int3", "transform": "dct"},
        {"codes": "sparse-int8", "density": 0.1, "transform": "dct"},
        {"codes": "sparse-f16", "density": 0.6, "transform": "hadamard", "basis": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_compressed_weights(options: dict[str, Any], steps: Steps) -> None:
    check(compressed(lambda w: rbe.compress(w, **{"basis": False, **options})), steps)


@pytest.mark.parametrize("grid", [2, 5, 8])
@pytest.mark.parametrize("int8", [False, True])
def test_grid_codes(grid: int, int8: bool, steps: Steps) -> None:
    model = compressed(lambda w: gridded(w, grid, shrink=0.0, transform="none"))
    if int8:  # one layer of each stays in floats
        names = [n for n in linear_weights(model.config) if ".0.attention.self.key" not in n]
        model = model.with_int8_activations(names)
    check(model, steps)


def test_weights_in_a_cache_of_decoded_panels(steps: Steps) -> None:
    """They are multiplied op by op."""
    model = compressed(lambda w: gridded(w, 4), cache_bytes=1 << 28)
    check(model, steps, False, [[64]])


@pytest.mark.parametrize("name", ["mpnet", "roberta", "distilbert"])
def test_other_encoders(name: str, steps: Steps) -> None:
    """Among them one with a bias of the scores by distance."""
    config = CONFIGS[name]
    model = BertEncoder(weights(dict(tensor_shapes(config))), config)
    check(model, steps, lengths=[[1], [7, 3], [20, 0, 11]])


def test_many_tokens_and_half_states_go_op_by_op(steps: Steps) -> None:
    check(minilm(), steps, False, [[129], [100, 29]])
    check(minilm(dtype="bfloat16"), steps, False, [[4]])
    check(minilm(), steps, False, [[0, 0]])


def test_states_that_are_not_finite(steps: Steps) -> None:
    """A compressed weight does not take them: the texts go op by op, with the results that this has."""
    table = np.array(real.weight("embeddings.word_embeddings.weight"))
    table[7, 3] = np.inf
    model = compressed(
        lambda w: rbe.compress(w, codes="dense-int4", transform="dct"),
    ).with_tensors({"embeddings.word_embeddings.weight": table})
    for count in (3, 20):
        ids, lengths = np.full(count, 7), np.array([count], np.int64)
        steps.allowed, steps.taken = True, 0
        got = np.array(model._text_states(ids, lengths, model.workspace)[0])
        assert steps.taken == 0
        steps.allowed = False
        again = model._text_states(ids, lengths, model.workspace)[0]
        assert np.array_equal(got, again, equal_nan=True)
        assert not np.isfinite(got).any()


def test_steps_of_many_lengths(steps: Steps) -> None:
    """Calls are kept by length, in one buffer that grows."""
    model, texts = minilm(), [[n] for n in (3, 90, 17, 3, 128, 16, 90)]
    check(model, steps, lengths=texts)
    other = rbe.to(model, "cpu")
    assert other.workspace is not model.workspace
    check(other, steps, lengths=texts[:2])


def test_another_number_of_threads(steps: Steps) -> None:
    model, before = minilm(), rbe.get_num_threads()
    want = states(model, [20])
    try:
        for threads in (1, 2, 1):
            rbe.set_num_threads(threads)
            assert np.array_equal(states(model, [20]), want)
    finally:
        rbe.set_num_threads(before)
    assert steps.taken == 4
