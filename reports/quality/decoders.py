"""Print a table of quantised decoders: bytes, perplexity, and divergence of the predictions from the dense model's.

    python -m rbe_gpu.reports.quality.decoders MODEL.gguf --texts texts.txt smollm2.rbe.safetensors ...

Every tool quantises the same weights: those that MODEL decodes to. llama.cpp (through llama-cpp-python) makes whole
files with `llama_model_quantize`, from MODEL itself, also with the importance matrix of the text of `--imatrix`; rows
that are not multiples of 256 fall back to other types there, so that the bytes are what they are.

bitsandbytes and HQQ quantise the linear weights and, so that the bytes compare, the table of words too; all else is
counted as float16. All weights are decoded and run in this project's dense decoder, in float32: only they differ.
Tools that are not installed are named.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from rbe_gpu.blocks import Array
from rbe_gpu.evaluate_decoders import WINDOW, evaluate_decoders
from rbe_gpu.layers import RBELinear
from rbe_gpu.matmul import PreparedInput
from rbe_gpu.models.decoder import Decoder
from rbe_gpu.models.decoder_tensors import LINEAR_PARTS, linear_weights
from rbe_gpu.models.load import load_decoder

from ..harness.baselines import F32
from ..harness.rows import write_table
from . import quantizers

_COLUMNS = ("name", "bytes", "bits_per_weight", "perplexity", "kl", "kl_p99", "top_1", "tokens", "seconds")
#: types that llama-quantize makes
LLAMA_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ2_M")
#: settings of `quantizers.torch_tools`
TORCH_SETTINGS = {
    "bitsandbytes": ("nf4", "nf4 double", "fp4 double"),
    "hqq": (
        "4 bits, groups of 64", "4 bits, groups of 128", "3 bits, groups of 64", "3 bits, groups of 128",
        "2 bits, groups of 16", "2 bits, groups of 32",
    ),
}  # fmt: skip
#: llama.cpp's names of `decoder_tensors.LINEAR_PARTS`
_GGUF_PARTS = {
    "query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output", "gate": "ffn_gate",
    "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


class Candidate(NamedTuple):
    """A quantised model: its name in the table, all its bytes, the decoder that it leaves, and the seconds that
    quantising took."""

    name: str
    nbytes: int
    model: Decoder
    seconds: float


class _Recorder(RBELinear):
    """A linear layer that sums the squares of its inputs by column."""

    def __init__(self, linear: RBELinear) -> None:
        super().__init__(linear.weight, linear.bias, linear.activation)
        self.squares = np.zeros(linear.in_features)
        self.count = 0

    def __call__(self, x: Array | PreparedInput, *args: Any, **kwargs: Any) -> Array:
        rows = np.asarray(x.array if isinstance(x, PreparedInput) else x).reshape(-1, self.in_features)
        self.squares += np.square(rows, dtype=np.float64).sum(axis=0)
        self.count += len(rows)
        return super().__call__(x, *args, **kwargs)


def importance(model: Decoder, texts: list[str], window: int = WINDOW) -> dict[str, F32]:
    """Mean squares of the input columns of every linear layer over texts, by llama.cpp's names: its imatrix.

    model : its layers are replaced
    """
    recorders: dict[str, _Recorder] = {}
    for i, layer in enumerate(model.layers):
        for part in LINEAR_PARTS:
            owner = layer.ffn if part in ("gate", "up", "down") else layer.attention
            recorder = _Recorder(layer.linear(part))
            setattr(owner, part, recorder)
            recorders[f"blk.{i}.{_GGUF_PARTS[part]}.weight"] = recorder
    ids = np.asarray(model.token_ids("\n\n".join(texts)), np.int64)
    for start in range(0, ids.size, window):
        model.forward(ids[None, start : start + window])
    return {name: (r.squares / r.count).astype(np.float32) for name, r in recorders.items()}


def llama(source: Path, columns: Mapping[str, F32] | None) -> Iterator[Candidate]:
    """llama.cpp's files of `LLAMA_TYPES`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quantised.gguf"
        for kind in LLAMA_TYPES:
            start = time.perf_counter()
            try:
                quantizers.llama.mixture(source, out, kind, columns)
            except RuntimeError as error:  # such as IQ2 without an importance matrix
                print(error)
                continue
            seconds = time.perf_counter() - start
            name = f"llama.cpp {kind}{'' if columns is None else ', imatrix'}"
            yield Candidate(name, out.stat().st_size, load_decoder(out), seconds)


def torch_tools(dense: Decoder, tool: str) -> Iterator[Candidate]:
    """Settings of bitsandbytes or HQQ, for the linear weights and the table of words."""
    every = getattr(quantizers.torch_tools, f"{tool}_settings")()
    tensors = dense.tensors()
    matrices = [*linear_weights(dense.config), *(name for name in tensors if "embed_tokens" in name)]
    for setting in TORCH_SETTINGS[tool]:
        quantise: Callable[[F32], Any] = every[setting]
        start = time.perf_counter()
        stored = {name: quantise(np.asarray(tensors[name], np.float32)) for name in matrices}
        seconds = time.perf_counter() - start
        rest = sum(2 * cast(Any, tensor).size for name, tensor in tensors.items() if name not in stored)
        nbytes = rest + sum(part.nbytes for part in stored.values())
        model = dense.with_tensors({name: part.weight for name, part in stored.items()})
        yield Candidate(f"{tool} {setting}", nbytes, model, seconds)


def candidates(source: Path, files: list[Path], imatrix: list[str], tools: list[str]) -> Iterator[Candidate]:
    """Files of this project, then those of the tools that are installed."""
    for file in files:
        yield Candidate(
            file.name.removesuffix(".rbe.safetensors"), file.stat().st_size, load_decoder(file), 0.0
        )
    dense = load_decoder(source)
    for tool, module in (("llama.cpp", "llama_cpp"), ("bitsandbytes", "bitsandbytes"), ("hqq", "hqq")):
        if tool not in tools:
            continue
        if find_spec(module) is None:
            print(f"{tool} is not installed")
        elif tool != "llama.cpp":
            yield from torch_tools(dense, tool)
        elif source.is_file():
            yield from llama(source, None)
            if imatrix:
                yield from llama(source, importance(load_decoder(source), imatrix))
        else:
            print("llama.cpp quantises GGUF files only")


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rbe_gpu.reports.quality.decoders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="the dense model: a GGUF file, or a folder")
    parser.add_argument("files", type=Path, nargs="*", help="files that `rbe-gpu compress` made of it")
    parser.add_argument("--texts", type=Path, required=True, help="held-out text, one a line")
    parser.add_argument("--imatrix", type=Path, help="text for llama.cpp's importance matrix, one a line")
    parser.add_argument("--tool", action="append", choices=("llama.cpp", "bitsandbytes", "hqq"))
    parser.add_argument("--csv", type=Path, help="write the rows there too")
    options = parser.parse_args(arguments)
    texts = options.texts.read_text("utf-8").splitlines()
    imatrix = [] if options.imatrix is None else options.imatrix.read_text("utf-8").splitlines()
    dense = load_decoder(options.model)
    weights, window = dense.dense_nbytes // 4, min(WINDOW, dense.settings.max_positions)
    tools = options.tool or ["llama.cpp", "bitsandbytes", "hqq"]
    print(f"{'':34}{'bytes':>12} {'bits':>5} {'perplexity':>10} {'KL':>7} {'99%':>6} {'top 1':>6}")
    rows: list[dict[str, Any]] = []
    for name, nbytes, model, seconds in candidates(options.model, options.files, imatrix, tools):
        evaluation = evaluate_decoders(model, dense, texts, window=window)
        if not rows:
            print(f"{'dense':34}{dense.dense_nbytes:12,} {32:5.2f} {evaluation.dense.perplexity:10.2f}")
        c = evaluation.compressed
        values = (
            name,
            nbytes,
            8 * nbytes / weights,
            c.perplexity,
            c.kl,
            c.kl_p99,
            c.top_1,
            c.tokens,
            seconds,
        )
        rows.append(dict(zip(_COLUMNS, values, strict=True)))
        print(
            f"{name:34}{nbytes:12,} {8 * nbytes / weights:5.2f} {c.perplexity:10.2f} {c.kl:7.3f} {c.kl_p99:6.2f} "
            f"{c.top_1:6.1%}",
            flush=True,
        )
    if options.csv:
        write_table(options.csv, _COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
