"""GGUF files of the model, and the quantisers that the `gguf` package writes in NumPy.

A file holds what llama.cpp's converter puts in one for a BERT encoder: the vocabulary, the tables, the linear layers
and the norms; the pooler's dense layer is left out. What is stored how follows llama.cpp:

- matrices of the linear layers and the word table are quantised; position and type tables, norms and biases are
  float32, alvariants;
- a type whose blocks do not divide a row falls back: types with blocks of 256 to Q4_0 (TQ1_0, TQ2_0, Q2_K, Q3_K),
  Q5_0 (Q4_K), Q5_1 (Q5_K), Q8_0 (Q6_K) or IQ4_NL (every IQ type). Rows of 384 are not multiples of 256, so of a
  MiniLM only `ffn_down` (rows of 1536) really is a K-quant or a ternary type.

Where llama.cpp's mixtures would give the word table Q8_0 (it shares the output layer's type), it gets the type of the
rest here, as `--pure` does: the smaller file.

"Across rows" favours the type over any file that llama.cpp runs: a (rows, 384) matrix is passed to the quantiser as
(rows / 2, 768), so that every type gets its whole blocks, the word table included. `gguf` reads such a file;
llama.cpp does not run it.

The weights that run are read back from the file that was written.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...harness.baselines import F32
from .source import POSITIONS, WORDS, Baseline, Source

#: every type that the package quantises to, in order of size
TYPES_OF_PACKAGE = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0")
#: llama.cpp's fallbacks for rows that are not whole blocks
_FALLBACK = {
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_K", "Q3_K"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
BLOCK = 256  # weights of the longest blocks of any type
#: quantise(matrix, type name) -> bytes as the file stores them, (rows, bytes) uint8 (or the floats of F16)
Quantise = Callable[[str, F32, str], NDArray[Any]]
_FILE = "model.gguf"


def package() -> Any:
    """The module `gguf`."""
    return import_module("gguf")


def type_for(gguf: Any, name: str, columns: int) -> str:
    """The type that llama.cpp stores rows of `columns` weights in when asked for the type `name`."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]
    if columns % block == 0:
        return name
    fallback = _FALLBACK.get(name, "IQ4_NL")
    return "F16" if columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[fallback]][0] else fallback


def name_of(gguf: Any, source: Source, name: str) -> str:
    """What llama.cpp calls a tensor: "blk.0.attn_q.weight" for "encoder.layer.0.attention.self.query.weight"."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, source.config["num_hidden_layers"])
    mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if mapped is None:
        raise KeyError(f"gguf has no name for {name}")
    return str(mapped)


def _tokens(gguf: Any, source: Source) -> tuple[list[str], list[int]]:
    """The vocabulary as llama.cpp wants WordPiece: a mark before words instead of `##` before what continues one."""
    vocabulary = source.folder.tokenizer.get_vocab(with_added_tokens=True)
    special = {t.content for t in source.folder.tokenizer.get_added_tokens_decoder().values() if t.special}
    tokens: list[str] = []
    types: list[int] = []
    for token in sorted(vocabulary, key=lambda t: vocabulary[t]):
        control = token in special
        types.append(int(gguf.TokenType.CONTROL if control else gguf.TokenType.NORMAL))
        tokens.append(
            token if control else token.removeprefix("##") if token.startswith("##") else "\u2581" + token
        )
    return tokens, types


def _describe(gguf: Any, writer: Any, source: Source, file_type: int, vocabulary: bool) -> None:
    """The keys that llama.cpp reads."""
    c = source.config
    writer.add_type("model")
    writer.add_name(Path(c.get("_name_or_path", "model")).name)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_layer_norm_eps(c["layer_norm_eps"])
    writer.add_file_type(file_type)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(c["type_vocab_size"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if not vocabulary:
        return
    tokens, types = _tokens(gguf, source)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ids = {
        name: source.folder.tokenizer.token_to_id(f"[{name}]")
        for name in ("CLS", "SEP", "PAD", "UNK", "MASK")
    }
    writer.add_bos_token_id(ids["CLS"])
    writer.add_sep_token_id(ids["SEP"])
    writer.add_pad_token_id(ids["PAD"])
    writer.add_unk_token_id(ids["UNK"])
    writer.add_mask_token_id(ids["MASK"])


def write(
    path: Path,
    source: Source,
    types: Mapping[str, str],
    quantise: Quantise | None = None,
    *,
    across: bool = False,
    file_type: int = 0,
    vocabulary: bool = True,
) -> None:
    """Write a GGUF file.

    Parameters
    ----------
    types : tensor (the checkpoint's name) -> type; all else is float32
    quantise : (tensor, matrix, type) -> its bytes; None: the package's own
    across : matrices are quantised with their rows joined to multiples of 256
    file_type : llama.cpp's number of the mixture; 0 is float32
    vocabulary : store the tokens

    Raises
    ------
    ValueError : a type whose blocks do not divide a row
    """
    gguf = package()
    quantise = quantise or _numpy_quantise
    writer = gguf.GGUFWriter(path, "bert")
    _describe(gguf, writer, source, file_type, vocabulary)
    for name, tensor in source.tensors.items():
        kind = types.get(name, "F32")
        if kind == "F32":
            writer.add_tensor(name_of(gguf, source, name), tensor)
            continue
        data = quantise(name, joined(tensor) if across else tensor, kind)
        writer.add_tensor(
            name_of(gguf, source, name), np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def joined(matrix: F32) -> F32:
    """(rows, columns) as (rows / n, n columns), where n columns are a multiple of 256."""
    rows, columns = matrix.shape
    n = BLOCK // int(np.gcd(BLOCK, columns))
    if rows % n:
        raise ValueError(f"{rows} rows of {columns} do not join to rows of a multiple of {BLOCK}")
    return matrix.reshape(rows // n, n * columns)


def _numpy_quantise(name: str, matrix: F32, kind: str) -> NDArray[Any]:
    gguf = package()
    codes: NDArray[Any] = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[kind])
    return codes


def read(path: Path, source: Source) -> tuple[dict[str, F32], dict[str, str], dict[str, int]]:
    """What a GGUF file holds of the model: tensors decoded by the package, their types, and their stored bytes."""
    gguf = package()
    reader = gguf.GGUFReader(path)
    stored = {t.name: t for t in reader.tensors}
    tensors: dict[str, F32] = {}
    types: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for name, dense in source.tensors.items():
        t = stored[name_of(gguf, source, name)]
        decoded = gguf.quants.dequantize(np.ascontiguousarray(t.data), t.tensor_type)
        tensors[name] = np.array(decoded, np.float32).reshape(dense.shape)
        types[name] = t.tensor_type.name
        sizes[name] = int(t.n_bytes)
    return tensors, types, sizes


@lru_cache(maxsize=1)
def vocabulary_bytes(source: Source) -> int:
    """Bytes of a file that are the tokenizer's: a file with them less a file without, before alignment."""
    gguf = package()
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in (True, False):
            path = Path(folder) / f"{vocabulary}.gguf"
            writer = gguf.GGUFWriter(path, "bert")
            _describe(gguf, writer, source, 0, vocabulary)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            sizes.append(path.stat().st_size)
    return sizes[0] - sizes[1]


def baseline_of(
    path: Path, source: Source, tool: str, version: str, setting: str, seconds: float, note: str = ""
) -> Baseline:
    """The baseline that a file is, its weights read back from it."""
    tensors, types, sizes = read(path, source)
    counts = {
        t: sum(types[n] == t for n in source.linears) for t in dict.fromkeys(types[n] for n in source.linears)
    }
    linear = " + ".join(f"{count} {t}" for t, count in counts.items())
    return Baseline(
        tool,
        version,
        setting,
        sum(sizes[name] for name in source.linears),
        source.weights,
        path.stat().st_size,
        source.encoder({n: t for n, t in tensors.items() if types[n] != "F32"}),
        source.only_linears(tensors),
        tokenizer_bytes=vocabulary_bytes(source),
        seconds=seconds,
        note=f"linear: {linear}; words: {types[WORDS]}; positions: {types[POSITIONS]}"
        + (note and f"; {note}"),
    )


def plan(source: Source, kind: str) -> dict[str, str]:
    """The type of every matrix when all shall be `kind`, with llama.cpp's fallbacks."""
    gguf = package()
    return {name: type_for(gguf, kind, source.tensors[name].shape[1]) for name in (*source.linears, WORDS)}


def baselines(source: Source, version: str) -> Iterator[Baseline]:
    """Every type of the package on linear layers and word table alike, as llama.cpp's `--pure` would."""
    gguf = package()
    for kind in TYPES_OF_PACKAGE:
        variants = {"": plan(source, kind)}
        if gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == BLOCK:
            variants[" across rows"] = dict.fromkeys((*source.linears, WORDS), kind)
        for suffix, types in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / _FILE
                start = time.perf_counter()
                write(path, source, types, across=bool(suffix))
                seconds = time.perf_counter() - start
                baseline = baseline_of(path, source, "gguf", version, kind + suffix, seconds)
            yield baseline
