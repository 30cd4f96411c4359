"""One token in one call: the same bits as op by op."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu.layers import KVCache
from rbe_gpu.models import decoder as decoder_module
from rbe_gpu.models.decoder import Decoder
from rbe_gpu.models.decoder_tensors import tensor_shapes
from rbe_gpu.models.decoders import decoder_config

from .architectures.cases import weights
from .architectures.decoder_cases import CONFIGS, inputs
from .architectures.test_decoders import model
from .compressed import gridded

TOKENS = 24  # beyond the windows of the models that have one


def compressed(name: str, **options: Any) -> Decoder:
    """With these weights of linear layers and of the table compressed."""
    dense, make = model(name), gridded if "grid" in options else rbe.compress
    tensors = {
        key: make(value, **{"transform": "none", "basis": False, **options})
        for key, value in dense.tensors().items()
        if value.ndim == 2
    }
    return dense.with_tensors(tensors)


def one_by_one(decoder: Decoder, cache: KVCache, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits behind each token of a text, three tokens at first."""
    logits = [decoder.logits(ids[None, :3], cache=cache, last=True)[0]]
    logits += [decoder.logits(ids[None, i : i + 1], cache=cache, last=True)[0] for i in range(3, ids.size)]
    return np.array(logits)


class Steps:
    """Counts the tokens that went through in one call, or refuses to take any."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.taken, self.allowed = 0, True
        original = decoder_module.one_token

        def one_token(model: Decoder, ids: Any, cache: KVCache) -> Any:
            states = original(model, ids, cache) if self.allowed else None
            self.taken += states is not None
            return states

        patch.setattr(decoder_module, "one_token", one_token)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def check(decoder: Decoder, steps: Steps, taken: int, tokens: int = TOKENS) -> None:
    """Both ways give the same logits, keys and values; `taken` tokens go through in one call."""
    ids = np.resize(inputs()[0], tokens)
    results = []
    for allowed in (True, False):
        steps.allowed, steps.taken = allowed, 0
        cache = decoder.new_cache(1, tokens)
        results.append((one_by_one(decoder, cache, ids), np.array(cache.memory)))
        assert cache.lengths.tolist() == [tokens]
        assert steps.taken == (taken if allowed else 0)
    (logits, memory), (expected, expected_memory) = results
    assert np.isfinite(logits).all()
    assert np.array_equal(logits, expected)
    assert np.array_equal(memory, expected_memory)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_dense_weights(name: str, threads: int, steps: Steps) -> None:
    before = rbe.get_num_threads()
    rbe.set_num_threads(threads)
    try:
        check(model(name), steps, TOKENS - 3)
    finally:
        rbe.set_num_threads(before)


@pytest.mark.parametrize(
    ("sizes", "same"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 18}, True),
        ({"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 40}, True),
        ({"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 66}, True),
        ({"num_attention_heads": 9, "num_key_value_heads": 1, "head_dim": 16}, False),
    ],
)
@pytest.mark.parametrize("window", [None, 1, 70])
def test_heads(sizes: dict[str, int], same: bool, window: int | None, steps: Steps) -> None:
    """Groups of up to 8 query heads have the same bits, larger ones another kernel of attention."""
    config = {**CONFIGS["mistral"], **sizes, "sliding_window": window, "max_position_embeddings": 200}
    decoder = Decoder(weights(dict(tensor_shapes(decoder_config(config)))), config)
    ids = np.resize(inputs()[0], 90)
    logits = []
    for allowed in (True, False):
        steps.allowed = allowed
        logits.append(one_by_one(decoder, decoder.new_cache(1, 90), ids))
    assert steps.taken == 87
    if same:
        assert np.array_equal(*logits)
    assert np.abs(logits[0] - logits[1]).max() <= 2e-6 * np.abs(logits[1]).max()


def test_a_moved_model_has_a_step_of_its_own(steps: Steps) -> None:
    decoder = model("llama")
    ids = np.resize(inputs()[0], 8)
    want = one_by_one(decoder, decoder.new_cache(1, 8), ids)
    moved = rbe.to(decoder, "cpu")
    assert moved.workspace is not decoder.workspace
    moved.layers[0].ffn.down.weight = np.zeros_like(moved.layers[0].ffn.down.weight)
    assert not np.array_equal(one_by_one(moved, moved.new_cache(1, 8), ids), want)
    assert np.array_equal(one_by_one(decoder, decoder.new_cache(1, 8), ids), want)
    assert steps.taken == 15


@pytest.mark.parametrize(
    "options",
    [
        {"codes": "dense-int4"},
        {"codes": "dense-int3", "transform": "dct"},
        {"codes": "sparse-int8", "density": 0.5},
        {"grid": 4, "shrink": 0.0},
        {"grid": 4, "shrink": 0.0, "factor": 9},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_compressed_weights(name: str, options: dict[str, Any], steps: Steps) -> None:
    check(compressed(name, **options), steps, TOKENS - 3)


def test_int8_activations(steps: Steps) -> None:
    decoder = compressed("llama", grid=4, shrink=0.0)
    names = [key for key in decoder.tensors() if ".down_proj." in key or ".q_proj." in key]
    check(decoder.with_int8_activations(names), steps, TOKENS - 3)


def test_weights_without_a_matvec_kernel(steps: Steps) -> None:
    """A weight with a basis is multiplied in tiles."""
    check(compressed("llama", codes="dense-int4", basis=True), steps, TOKENS - 3)


def test_decoded_weights(steps: Steps) -> None:
    """Such a model goes op by op."""
    decoder = compressed("llama", codes="dense-int4")
    for layer in decoder.layers:
        layer.ffn.down.method = "decode"
    check(decoder, steps, 0)


def test_half_types_and_batches_go_op_by_op(steps: Steps) -> None:
    half = Decoder(model("llama").tensors(), CONFIGS["llama"], dtype="float16")
    check(half, steps, 0)
    decoder, steps.allowed = model("llama"), True
    cache = decoder.new_cache(2, 8)
    ids = inputs()[:2, :5]
    decoder.logits(ids, cache=cache, last=True)
    together = decoder.logits(inputs()[:2, 5:6], cache=cache, last=True)
    assert steps.taken == 0
    # one text is left: its row of the same memory
    cache.keep([1])
    left = decoder.logits(inputs()[1:2, 6:7], cache=cache, last=True)
    assert steps.taken == 1
    alone = decoder.new_cache(1, 8)
    want = [decoder.logits(inputs()[1:2, i : i + 1], cache=alone, last=True) for i in range(7)]
    for got, expected in ((together[1:], want[5]), (left, want[6])):
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_states_that_are_not_finite(steps: Steps) -> None:
    """A compressed weight does not take them: the token goes op by op, with the results that this has."""
    tensors = dict(compressed("llama", codes="dense-int4", transform="dct").tensors())
    table = np.array(model("llama").tensors()["model.embed_tokens.weight"])
    table[7, 3] = np.inf
    decoder = model("llama").with_tensors({**tensors, "model.embed_tokens.weight": table})
    ids = np.array([3, 4, 5, 7, 8])
    steps.allowed = True
    cache = decoder.new_cache(1, 8)
    logits = one_by_one(decoder, cache, ids)
    assert steps.taken == 0  # the infinite value is in the cache from then on
    steps.allowed = False
    assert np.array_equal(one_by_one(decoder, decoder.new_cache(1, 8), ids), logits, equal_nan=True)
    assert not np.isfinite(logits[1:]).any()


def test_another_number_of_threads_another_cache_and_more_positions(steps: Steps) -> None:
    decoder = model("qwen3")
    ids = np.resize(inputs()[0], 40)
    want = one_by_one(decoder, decoder.new_cache(1, 40), ids)
    before = rbe.get_num_threads()
    first, second = decoder.new_cache(1, 40), decoder.new_cache(1, 64)
    try:
        for i, token in enumerate(ids):
            rbe.set_num_threads(1 + i % 2)
            for cache in (first, second):
                got = decoder.logits(np.array([[token]]), cache=cache, last=True)[0]
                if i >= 3:
                    assert np.abs(got - want[i - 2]).max() <= 1e-5 * np.abs(want[i - 2]).max()
    finally:
        rbe.set_num_threads(before)
    assert steps.taken == 37 + 2 * 40
    with pytest.raises(ValueError, match="has room for 40"):
        decoder.logits(np.array([[1]]), cache=first)
    assert first.lengths.tolist() == [40]


def test_tables_of_angles_grow(steps: Steps) -> None:
    """They begin with 256 positions."""
    decoder = Decoder(model("llama").tensors(), {**CONFIGS["llama"], "max_position_embeddings": 600})
    check(decoder, steps, 600 - 3, tokens=600)


@pytest.mark.parametrize(
    "change", [{"num_layers": 1}, {"num_kv_heads": 1}, {"head_dim": 2}, {"dtype": np.float16}]
)
def test_a_cache_of_another_model(change: dict[str, Any], steps: Steps) -> None:
    decoder, c = model("llama"), model("llama").settings
    sizes = {"num_layers": c.num_layers, "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim, **change}
    cache = KVCache(batch=1, capacity=8, **sizes)
    for tokens in (1, 3):
        with pytest.raises(ValueError, match=r"KVCache\(.* is not of this model; make one with new_cache"):
            decoder.logits(inputs()[:1, :tokens], cache=cache)


def test_forgotten_tokens(steps: Steps) -> None:
    decoder, ids = model("mistral"), np.resize(inputs()[0], 20)
    cache = decoder.new_cache(1, 20)
    want = one_by_one(decoder, cache, ids)
    cache.lengths[0] = 12
    again = [decoder.logits(ids[None, i : i + 1], cache=cache, last=True)[0] for i in range(12, 20)]
    assert np.array_equal(again, want[10:])
