"""Hidden states, logits and greedy texts of every supported decoder are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import rbe_gpu as rbe
from rbe_gpu.layers import KVCache, RBEAttention, RBERotary
from rbe_gpu.models.decoder import Decoder
from rbe_gpu.models.decoder_tensors import parts_of
from rbe_gpu.models.decoders import DECODERS, DecoderConfig, decoder_config
from rbe_gpu.models.load import load

from .cases import weights
from .decoder_cases import CONFIGS, LENGTHS, NEW_TOKENS, inputs

RECORDED = np.load(Path(__file__).with_name("decoder_states.npz"))
#: of the largest value: float32 sums in another order, three layers
TOLERANCE = 1e-5


def tensors(name: str) -> dict[str, NDArray[np.float32]]:
    shapes = json.loads(str(RECORDED[f"{name}.shapes"]))
    return weights({key: tuple(shape) for key, shape in shapes.items()})


def folder(name: str, path: Path, **changes: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIGS[name], **changes}))
    save_file(tensors(name), path / "model.safetensors")
    return path


def named(name: str) -> dict[str, NDArray[np.float32]]:
    """The tensors as a decoder takes them."""
    stored = tensors(name)
    parts = parts_of(stored, CONFIGS[name])
    if parts is None:
        return stored
    return {
        here: np.ascontiguousarray((stored[p.name].T if p.transposed else stored[p.name])[p.start : p.stop])
        for here, p in parts.items()
    }


def model(name: str) -> Decoder:
    return Decoder(named(name), CONFIGS[name])


def packed(states: Any) -> NDArray[np.float32]:
    return np.concatenate([states[i, :n] for i, n in enumerate(LENGTHS.tolist())])


def close(got: NDArray[Any], want: NDArray[Any], tolerance: float = TOLERANCE) -> bool:
    return bool(np.abs(got - want).max() <= tolerance * np.abs(want).max())


def test_every_model_type_is_recorded() -> None:
    generate = {name for name, family in DECODERS.items() if not family.encoder}  # others: test_embedders
    assert {config["model_type"] for config in CONFIGS.values()} == generate
    assert {key.rpartition(".")[0] for key in RECORDED.files} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_logits(name: str, tmp_path: Path) -> None:
    decoder = load(folder(name, tmp_path / "model"))
    states = decoder.hidden_states(inputs(), LENGTHS)
    for got, want in zip(states, RECORDED[f"{name}.states"], strict=True):
        assert close(packed(got), want)
    assert close(packed(decoder.logits(inputs(), LENGTHS)), RECORDED[f"{name}.logits"])
    assert np.array_equal(decoder.forward(inputs(), LENGTHS), states[-1])
    last = decoder.logits(inputs(), LENGTHS, last=True)
    assert close(last, RECORDED[f"{name}.logits"][np.cumsum(LENGTHS) - 1])


LONG = "phi3, beyond the first context of longrope"


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != LONG])
def test_a_cache_changes_nothing(name: str) -> None:
    """In pieces of any size, each text with a past of its own, and one token of each at a time."""
    decoder, ids = model(name), inputs()
    want = np.split(RECORDED[f"{name}.logits"], np.cumsum(LENGTHS)[:-1])
    for pieces in ([7, 1, 30], [1] * 20, [150]):
        cache = decoder.new_cache(3, 150)
        done = np.zeros(3, np.int64)
        for piece in pieces:
            counts = np.minimum(piece, LENGTHS - done)
            rows = np.zeros((3, piece), np.int64)
            for b in range(3):
                rows[b, : counts[b]] = ids[b, done[b] : done[b] + counts[b]]
            logits = decoder.logits(rows, counts, cache)
            for b in range(3):
                got = logits[b, : counts[b]]
                if counts[b]:
                    assert close(got, want[b][done[b] : done[b] + counts[b]], 2 * TOLERANCE)
            done += counts
            assert np.array_equal(cache.lengths, done)


def test_a_text_that_goes_beyond_its_first_context() -> None:
    """Its cached tokens are rotated as of a short text: it is refused until all are passed again, other texts go on.
    One that begins beyond it goes on in pieces, and token by token.
    """
    decoder, ids = model(LONG), inputs()
    context = decoder.settings.first_context
    assert context == 30
    want = np.split(RECORDED[f"{LONG}.logits"], np.cumsum(LENGTHS)[:-1])[1]
    cache = decoder.new_cache(2, 200)
    counts = np.array([100, 5])
    got = decoder.logits(ids[[1, 0], :100], counts, cache)
    assert cache.long.tolist() == [True, False]
    pieces = [decoder.logits(ids[[1, 0], 100:120], np.array([20, 0]), cache)[0, :20]]
    cache.keep([0])
    pieces += [decoder.logits(ids[1:2, i : i + 1], cache=cache)[0] for i in range(120, 150)]
    assert close(np.concatenate([got[0], *pieces]), want, 2 * TOLERANCE)
    short = decoder.new_cache(1, 40)
    decoder.logits(ids[1:2, :30], cache=short)
    with pytest.raises(ValueError, match=r"text 0 has 31 tokens with these; with more than 30 its"):
        decoder.logits(ids[1:2, 30:31], cache=short)
    short.lengths[0] = 0
    decoder.logits(ids[1:2, :31], cache=short)
    assert short.long.tolist() == [True]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_texts(name: str) -> None:
    """Of one prompt and of a batch, which texts leave when they end."""
    decoder = model(name)
    prompts = [inputs()[b, :n].tolist() for b, n in enumerate(LENGTHS.tolist())]
    together = decoder.generate(prompts, NEW_TOKENS, ignore_eos=True)
    for prompt, got, want in zip(prompts, together, RECORDED[f"{name}.tokens"], strict=True):
        assert list(got.ids) == want.tolist()
        assert (got.reason, got.prompt_tokens) == ("length", len(prompt))
    ends = int(RECORDED[f"{name}.tokens"][0, 5])
    stopped = Decoder(named(name), {**CONFIGS[name], "eos_token_id": [ends]}).generate(prompts, NEW_TOKENS)
    for got, want in zip(stopped, RECORDED[f"{name}.tokens"].tolist(), strict=True):
        expected = want[: want.index(ends) + 1] if ends in want else want
        assert list(got.ids) == expected
        assert got.reason == ("eos" if ends in want else "length")


@pytest.mark.parametrize("name", CONFIGS)
def test_compressed_files_are_loaded(name: str, tmp_path: Path) -> None:
    """Those of 12-bit codes are close to the dense model, and say what they are of."""
    source = folder(name, tmp_path / "model")
    rbe.compress_model(source, tmp_path / "m.rbe.safetensors", codes="dense-int12", transform="none")
    decoder, dense = load(tmp_path / "m.rbe.safetensors"), load(source)
    got, want = (packed(m.logits(inputs(), LENGTHS)) for m in (decoder, dense))
    assert np.linalg.norm(got - want) <= 5e-3 * np.linalg.norm(want)
    assert decoder.settings == dense.settings
    assert decoder.tensors().keys() == dense.tensors().keys()
    again = dense.with_tensors(dense.tensors())
    assert close(packed(again.logits(inputs(), LENGTHS)), want, 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_half_types(name: str, dtype: str) -> None:
    decoder = Decoder(named(name), CONFIGS[name], dtype=dtype)
    got = packed(decoder.logits(inputs(), LENGTHS))
    want = RECORDED[f"{name}.logits"]
    assert got.dtype == np.float32
    assert np.linalg.norm(got - want) <= {"float16": 0.01, "bfloat16": 0.06}[dtype] * np.linalg.norm(want)


_YARN = {"rope_type": "yarn", "factor": 4.0}
_LONG = {"type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1]}
_BY_TYPE = {kind: {"rope_type": "default"} for kind in ("full_attention", "sliding_attention")}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"model_type": "gpt_neo"},
            "model_type 'gpt_neo'; supported: .*llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, gpt2",
        ),
        (
            "llama",
            {"num_key_value_heads": 4},
            "num_key_value_heads=4; needs a divisor of num_attention_heads=6",
        ),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0; needs a positive integer"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; needs at most 10000"),
        ("llama", {"num_hidden_layers": 999}, "999 layers, but there are 30 tensors"),
        ("llama", {"num_hidden_layers": 4}, "no tensor 'model.layers.3.self_attn.q_proj.weight'"),
        (
            "llama",
            {"vocab_size": 62},
            r"model.embed_tokens.weight has shape \(61, 24\), config.json says \(62, 24\)",
        ),
        ("llama", {"head_dim": 7}, "head_dim=7; needs an even number"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 'rotary embedding "dynamic"'),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "factor of the rotary embedding=null"),
        ("llama", {"rope_scaling": {**_YARN, "beta_fast": -1}}, "beta_fast of the rotary embedding=-1"),
        ("llama", {"rope_scaling": {**_YARN, "attention_factor": "x"}}, "attention_factor of the rotary"),
        ("llama", {"rope_scaling": {**_YARN, "truncate": False}}, "truncate of the rotary embedding=false"),
        ("llama", {"rope_scaling": {**_YARN, "low_freq_factor": 1}}, "low_freq_factor=1 of rope_scaling"),
        ("llama", {"rope_theta": 1, "rope_scaling": _YARN}, "rope_theta of the rotary embedding=1; needs"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor of the rotary embedding=null"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "beta": 1}},
            "beta=1 of rope_scaling",
        ),
        ("llama", {"rope_theta": None}, "rope_theta=null; needs a positive number"),
        ("llama", {"rope_theta": -1.0}, "rope_theta of the rotary embedding=-1.0; needs a positive number"),
        ("llama", {"hidden_act": "snake"}, 'hidden_act="snake"'),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2: split matrices"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"new_key": 1}, 'unknown key "new_key"'),
        ("llama", {"eos_token_id": "x"}, 'eos_token_id="x"; needs a token id'),
        ("mistral", {"sliding_window": 0}, "sliding_window=0; needs a positive integer"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types="),
        ("qwen3", {"use_sliding_window": True, "sliding_window": -1}, "sliding_window=-1"),
        ("qwen3", {"layer_types": [[], [], []]}, "layer_types="),
        ("llama", {"rope_theta": 10**400}, "needs a positive number"),
        ("gemma3_text", {"query_pre_attn_scalar": 1e300}, "query_pre_attn_scalar=1e\\+300"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window=null; needs a positive integer"),
        (
            "gemma3_text",
            {"rope_scaling": None, "rope_parameters": {"rope_theta": 1e6}},
            "for each type of layers",
        ),
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": _BY_TYPE},
            "rope_scaling=.*; needs absent, beside rope_parameters",
        ),
        ("gemma3_text", {"rope_scaling": None, "rope_local_base_freq": None}, "rope_local_base_freq=null"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: soft caps"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "vectors of texts, and needs modules.json"),
        ("llama", {"use_bidirectional_attention": True}, "only causal attention"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1]}},
            r"short_factor=\[1\]; needs 2 pos",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1, 1]}},
            "long_factor=null; needs 2 positive",
        ),
        (
            "phi3",
            {"rope_scaling": {**_LONG, "attention_factor": -1}},
            "attention_factor of the rotary embedding=-1",
        ),
        ("phi3", {"rope_scaling": _LONG, "original_max_position_embeddings": 1}, "=1; needs more than 1"),
        ("phi3", {"rope_scaling": _LONG, "original_max_position_embeddings": "x"}, '="x"; needs a positive'),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, '"yarn" .*supported: default, longrope$'),
        ("llama", {"rope_scaling": _LONG}, 'rotary embedding "longrope"'),
        (
            "phi3",
            {"partial_rotary_factor": 0.75},
            "partial_rotary_factor=0.75; needs an even part of head_dim=4",
        ),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5; needs a number above 0"),
        (
            "phi3",
            {"num_key_value_heads": 3},
            r'qkv_proj.weight" has shape \(40, 24\), but config.json says 48 rows',
        ),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod=2: every layer attends alike"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias=true: Phi-3 has no biases"),
        ("phi3", {"attention_bias": True}, "attention_bias=true: Phi-3 has no biases"),
        ("gpt2", {"n_layer": 0}, "n_layer=0; needs a positive integer"),
        ("gpt2", {"n_layer": 10**9}, "n_layer=1000000000; needs at most 10000"),
        ("gpt2", {"n_embd": "x"}, 'n_embd="x"; needs a positive integer'),
        ("gpt2", {"n_head": 5}, "n_head=5; needs a divisor of n_embd=24, with heads of an even width"),
        ("gpt2", {"n_head": 8}, "n_head=8; needs a divisor of n_embd=24, with heads of an even width"),
        (
            "gpt2",
            {"n_inner": None},
            r'c_fc.(weight" has shape \(24, 40\), but config.json says 96 columns|bias" .* 96 rows)',
        ),
        (
            "gemma2",
            {"attn_logit_softcapping": 0},
            "attn_logit_softcapping=0; needs a number from 1e-6 to 1e6",
        ),
        ("gemma2", {"final_logit_softcapping": "x"}, 'final_logit_softcapping="x"; needs a number from 1e-6'),
        ("gemma2", {"sliding_window": None}, "sliding_window=null; needs a positive integer"),
        ("gemma2", {"use_bidirectional_attention": True}, "only causal attention is supported"),
        ("gpt2", {"n_positions": 100}, r"position_embeddings.weight has shape \(200, 24\)"),
        ("gpt2", {"activation_function": "snake"}, 'activation_function="snake"'),
        ("gpt2", {"layer_norm_epsilon": -1}, "layer_norm_epsilon=-1; needs a number from 0 to 1"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scores that are scaled by the layer"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true"),
        ("gpt2", {"hidden_size": 24}, 'unknown key "hidden_size"'),
    ],
)
def test_what_is_not_supported_is_named(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder(name, tmp_path / "model", **changes))


def test_defaults_are_those_of_transformers() -> None:
    def of(name: str, **changes: Any) -> DecoderConfig:
        return decoder_config({**CONFIGS[name], **changes})

    assert [of(name).eos for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2")] == [
        (2,), (2,), (), (), (1,), (32000,), (50256,),
    ]  # fmt: skip
    assert of("phi3", sliding_window=None).windows == (None,) * 3
    assert of("gpt2", n_inner=None).intermediate_size == 96
    assert of("llama", eos_token_id=None).eos == ()
    assert of("llama", eos_token_id=[5, 6]).eos == (5, 6)
    assert not of("mistral", attention_bias=True).output_bias
    assert not of("qwen2", attention_bias=True).output_bias
    assert of("qwen2", attention_bias=False).qkv_bias
    assert not of("qwen2", mlp_bias=True).ffn_bias
    window = {"use_sliding_window": True, "max_window_layers": 1}
    assert of("qwen3", **window).windows == (None, 4096, 4096)
    assert of("qwen3", **{**window, "max_window_layers": 0}).windows == (4096,) * 3
    assert of("qwen3", sliding_window=7).windows == (None,) * 3  # use_sliding_window is false
    both = of(
        "llama", rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 1.0}
    )
    assert both.rotary["full_attention"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    gemma = of("gemma3_text", rope_theta=5e5).rotary
    assert gemma["sliding_attention"] == {"rope_theta": 10000.0}
    assert gemma["full_attention"] == {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0}
    assert of("mistral", sliding_window=10**40).windows == (1 << 30,) * 3
    gemma2 = {k: v for k, v in CONFIGS["gemma2"].items() if "softcap" not in k and k != "sliding_window"}
    assert decoder_config(gemma2).windows == (4096, None, 4096)
    assert (decoder_config(gemma2).attention_softcap, decoder_config(gemma2).logit_softcap) == (50.0, 30.0)
    uncapped = of("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (uncapped.attention_softcap, uncapped.logit_softcap) == (None, None)
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}
    gemma = decoder_config({**CONFIGS["gemma3_text, of transformers 5"], "rope_parameters": nested}).rotary
    assert gemma["full_attention"]["rope_theta"] == 1e6
    assert gemma["sliding_attention"]["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("name", "key"), [("mistral", "sliding_window"), ("gemma2", "sliding_window"), ("phi3", "sliding_window")]
)
def test_a_window_larger_than_any_integer_of_a_kernel(name: str, key: str, tmp_path: Path) -> None:
    large, all_tokens = (
        load(folder(name, tmp_path / str(i), **{key: window})).forward(inputs(), LENGTHS)
        for i, window in enumerate((10**40, 1000))
    )
    np.testing.assert_array_equal(large, all_tokens)


def test_a_long_model_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json has model_type") as error:
        load(folder("llama", tmp_path / "m", model_type=["llama"] * 1000))
    assert len(str(error.value)) < 400


def test_a_decoder_and_an_encoder_are_told_apart(tmp_path: Path) -> None:
    from rbe_gpu.models.architectures import embeds, generates

    decoder = load(folder("llama", tmp_path / "model"))
    assert generates(decoder, "x") is decoder
    with pytest.raises(ValueError, match="x is a decoder, which makes no vectors of texts"):
        embeds(decoder, "x")


def test_masks_of_gpt2_are_not_read(tmp_path: Path) -> None:
    """Checkpoints hold them as weights; those of a model without a head have no prefix."""
    path = folder("gpt2", tmp_path / "model")
    stored = {name.removeprefix("transformer."): a for name, a in tensors("gpt2").items()}
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 200, 200), np.uint8) for i in range(3)}
    save_file(
        {**stored, **masks, "h.0.attn.masked_bias": np.full(1, -1e4, np.float32)}, path / "model.safetensors"
    )
    decoder = load(path)
    assert close(packed(decoder.logits(inputs(), LENGTHS)), RECORDED["gpt2.logits"])
    rbe.compress_model(path, tmp_path / "m.rbe.safetensors", codes="dense-int12", transform="none")
    assert "bias" not in " ".join(rbe.load_file(tmp_path / "m.rbe.safetensors")[0]).replace(
        "proj.bias", ""
    ).replace("norm.bias", "")


def test_a_cache_keeps_the_features_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are those of every later call: no call with a cache has them in the transform domain."""
    random = np.random.default_rng(0)
    q, k, v, o = (random.standard_normal((128, 128)).astype(np.float32) / 8 for _ in range(4))
    attention = RBEAttention.from_dense(q, k, v, o, 2, causal=True, codes="dense-int8", transform="dct")
    derived = attention._transform_domain()
    assert derived is not None
    monkeypatch.setattr(attention, "projections", lambda tokens, *_: derived if tokens > 1 else attention)
    x = random.standard_normal((9, 128)).astype(np.float32)
    want = attention(x, cu_seqlens=np.array([0, 9]))
    cache = KVCache(1, 1, 16, 2, 64)
    first = attention(x[:8], cu_seqlens=np.array([0, 8]), cache=cache.layer(0))
    cache.lengths += 8
    last = attention(x[8:], cu_seqlens=np.array([0, 1]), cache=cache.layer(0))
    assert close(np.concatenate([first, last]), want)


def test_positions_of_longrope() -> None:
    decoder = model(LONG)
    assert (decoder.settings.first_context, decoder.settings.max_positions) == (30, 400)
    with pytest.raises(ValueError, match="a text has 401 tokens, the model has 400 positions"):
        decoder.forward(np.full((1, 401), 3))
    assert model("phi3, longrope").rotary["full_attention"].rotary_dim == 12
    # a first context beyond all positions, of whatever size, adds no rows to the tables
    never = decoder_config({**CONFIGS[LONG], "original_max_position_embeddings": 10**12})
    assert (never.first_context, never.max_positions) == (None, 400)
    with pytest.raises(
        ValueError, match=r"long_frequencies have shape \(2,\), frequencies \(3,\), with context=4"
    ):
        RBERotary([1.0, 0.5, 0.1], long_frequencies=[1.0, 0.5], context=4)


@pytest.mark.parametrize("shape", [(), (72,), (0,), (72, 24, 1)])
def test_stacked_tensors_of_another_shape_are_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    path, name = folder("gpt2", tmp_path / "model"), "transformer.h.1.attn.c_attn.weight"
    save_file({**tensors("gpt2"), name: np.zeros(shape, np.float32)}, path / "model.safetensors")
    for call in (lambda: load(path), lambda: rbe.compress_model(path, tmp_path / "c", codes="dense-int8")):
        with pytest.raises(ValueError, match=r"c_attn.weight|q_proj.weight has shape"):
            call()
