"""Small GGUF files with made-up weights and vocabularies, as llama.cpp's converter writes them.

Weights are multiples of 2^-12 from an integer hash, the same on every machine.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

T = gguf.GGUFValueType
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
#: transformers does not read it: a qwen2 has HIDDEN / HEADS there, a qwen3 128
HEAD_DIM = {"llama": 32, "qwen2": 16, "qwen3": 128, "gemma3": 32}
_SPACE = "\u2581"
_WORDS = ("he", "hel", "hell", "hello", "th", "the", "in", "ing", "wor", "worl", "world", "12", "123")


def alphabet() -> list[str]:
    """The character of every byte in GPT-2's byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def byte_level(user_defined: Sequence[str] = ("<think>",)) -> dict[str, Any]:
    """Keys of a byte-level vocabulary: bytes, some merges, then tokens of every type."""
    tokens = alphabet()
    space = tokens[32]
    merges = ["h e", "t h", "i n", "l l", "he ll", "hell o", "th e", "in g", f"{space} the", f"{space} w"]
    merges += ["o r", f"{space}w or", f"{space}wor l", f"{space}worl d", f"{space} {space}", "1 2", "12 3"]
    merges += [f"{tokens[10]} {tokens[10]}", f"{tokens[195]} {tokens[169]}"]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [1] * len(tokens)
    control = ("<|end|>", "<|user|>", "<|endoftext|>")
    others = ((control, 3), (user_defined, 4), (("[PAD0]",), 5))
    for token, kind in ((token, kind) for group, kind in others for token in group):
        tokens.append(token)
        types.append(kind)
    end = tokens.index("<|end|>")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.unknown_token_id": tokens.index("<|endoftext|>"),
    }


def sentencepiece(prefix: bool = True) -> dict[str, Any]:
    """Keys of a SentencePiece vocabulary: special tokens, bytes, pieces with scores, and user-defined tokens."""
    tokens, types = ["<unk>", "<s>", "</s>"], [2, 3, 3]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [6] * 256
    scores = [-1000.0] * 3 + [0.0] * 256
    words = [*_WORDS, *(_SPACE + word for word in ("the", "world", "w", "he", "hello"))]
    pieces = [word for word in words if len(word) > 1]
    pieces += sorted(
        {character for word in words for character in word} | set("abcdefgxyz .,!\n()1234567890é")
    )
    for i, piece in enumerate(pieces):
        if piece not in tokens and piece != " ":
            tokens.append(piece)
            types.append(1)
            scores.append(-float(i))
    for token in ("  ", "    ", "<mark>"):
        tokens.append(token)
        types.append(4)
        scores.append(-1000.0)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32).tolist(),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def weights(name: str, *shape: int) -> np.ndarray:
    """Made-up float32 weights between -0.5 and 0.5."""
    n = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))
    hashed = (n * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(52)
    return (hashed.astype(np.float32) / np.float32(4096) - np.float32(0.5)).reshape(shape)


def checkpoint(
    architecture: str, vocab_size: int, head: bool = False, biases: bool | None = None
) -> dict[str, Any]:
    """Hugging Face's tensors of a small model, by name. biases: of q, k and v, and of a llama's o."""
    head_dim = HEAD_DIM[architecture]
    width, kv_width = HEADS * head_dim, KV_HEADS * head_dim
    biases = architecture == "qwen2" if biases is None else biases
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, HIDDEN)}
    if head:
        shapes["lm_head.weight"] = (vocab_size, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        if architecture == "gemma3":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes |= {f"{layer}{norm}.weight": (HIDDEN,) for norm in norms}
        if architecture in ("qwen3", "gemma3"):
            shapes |= {f"{layer}self_attn.{p}_norm.weight": (head_dim,) for p in "qk"}
        for p, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("o", HIDDEN)):
            shapes[f"{layer}self_attn.{p}_proj.weight"] = (rows, width if p == "o" else HIDDEN)
            if biases and (p != "o" or architecture == "llama"):
                shapes[f"{layer}self_attn.{p}_proj.bias"] = (rows,)
        shapes |= {f"{layer}mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INNER)
    shapes["model.norm.weight"] = (HIDDEN,)
    return {name: weights(name, *shape) for name, shape in shapes.items()}


def stored(architecture: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp's converter writes them: its names, interleaved rows of q and k, norms of 1 + w."""
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), LAYERS)
    result = {}
    for name, a in tensors.items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        heads = {"q": HEADS, "k": KV_HEADS}.get(name.split("_proj")[0][-1]) if "_proj" in name else None
        if architecture == "llama" and heads is not None:
            a = a.reshape(heads, 2, HEAD_DIM[architecture] // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)
        if architecture == "gemma3" and "norm" in name:
            a = a + np.float32(1)
        result[mapped] = np.ascontiguousarray(a)
    return result


def keys(architecture: str, vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a small model."""
    own = {
        "context_length": 256,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM[architecture],
        "attention.value_length": HEAD_DIM[architecture],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 50000.0,
    }
    if architecture == "gemma3":
        own["attention.sliding_window"] = 16
    if architecture == "llama":
        own["rope.dimension_count"] = HEAD_DIM[architecture]
    general = {"general.architecture": architecture, "general.type": "model", "general.name": "small"}
    return {
        **general,
        **{f"{architecture}.{key}": value for key, value in own.items()},
        **vocabulary,
        "general.quantization_version": 2,
    }


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, str] | None = None,
) -> Path:
    """Write a file with gguf's writer. kinds : the type of tensors that are not F32; None as a value: no such key."""
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if value is None or key == "general.architecture":
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list | tuple):
            writer.add_array(key, list(value))
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, a in tensors.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        data = gguf.quants.quantize(a, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small(
    path: Path,
    architecture: str = "llama",
    *,
    head: bool = False,
    biases: bool | None = None,
    kinds: Mapping[str, str] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    vocabulary_of: Mapping[str, Any] | None = None,
    **changed: Any,
) -> Path:
    """Write a small model.

    Parameters
    ----------
    tensors : further ones, as the file stores them, or None for one to leave out
    vocabulary_of : keys of the vocabulary
    changed : keys, "__" for each "." and a leading "arch__" for the architecture's; None: left out
    """
    vocabulary = sentencepiece(prefix=False) if architecture == "gemma3" else byte_level()
    if vocabulary_of is not None:
        vocabulary = dict(vocabulary_of)
    metadata = keys(architecture, vocabulary)
    for key, value in changed.items():
        key = key.replace("__", ".")
        metadata[f"{architecture}.{key[5:]}" if key.startswith("arch.") else key] = value
    vocab_size = len(vocabulary.get("tokenizer.ggml.tokens", byte_level()["tokenizer.ggml.tokens"]))
    made = stored(architecture, checkpoint(architecture, vocab_size, head, biases))
    for name, a in (tensors or {}).items():
        if a is None:
            del made[name]
        else:
            made[name] = a
    return write(path, metadata, made, kinds)


def realigned(source: Path, path: Path, alignment: int) -> Path:
    """A copy of a file with another general.alignment."""
    writer = gguf.GGUFWriter(path, "copy")
    writer.data_alignment = alignment
    reader = gguf.GGUFReader(source)
    writer.kv_data[0].clear()
    for key, value in reader.fields.items():
        if not key.startswith("GGUF."):
            kinds = [*value.types, None]
            writer.add_key_value(key, value.contents(), kinds[0], kinds[1])
    writer.add_uint32("general.alignment", alignment)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
