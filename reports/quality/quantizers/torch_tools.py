"""Weight-only quantisers of PyTorch: bitsandbytes, HQQ, optimum-quanto and torchao, on a CPU.

Each weight goes through the tool's own module (`Linear4bit`, `HQQLinear`, ...), and what the module's state dict
holds is what is counted and written: `linear_bytes` are its codes, scales, zeros and codebooks; the file is a
safetensors file of the state dicts of all modules, small descriptions included, with all that the tool leaves alone
at float16. The weights that run are those that the tool decodes, widened to float32. LLM.int8 and torchao could
quantise activations too; they do not here, which is kinder.

As it is, a setting quantises only the linear layers, which is what these tools do: the word table, half of a MiniLM's
weights, stays float16. In "+ words" the word table goes through the same module, a token a row (what bitsandbytes'
`Embedding4bit` computes). Not every tool offers or saves that; it is the smallest file the tool could make.
torchao's int4 cannot: its kernel takes 16 rows at a time, and 30522 tokens are not a multiple.

bitsandbytes decodes to float32, HQQ to float16 (its default). optimum-quanto and torchao get float16 weights, so that
their scales are float16 where the tool follows the weights' type; the rounding of the weights to float16 is far below
the quantiser's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ...harness.baselines import F32
from .source import WORDS, Baseline, Source

#: what state dicts hold beside codes, scales, zeros and codebooks: descriptions of a few bytes, and scales of
#: activations, which are not quantised
_DESCRIPTIONS = (
    "quant_state.", "weight_format", "input_scale", "output_scale",  # bitsandbytes, optimum-quanto
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",  # HQQ
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A quantised weight.

    Attributes
    ----------
    state : what the tool saves: name within the module -> tensor
    weight : what the tool decodes, (rows, columns) float32
    """

    state: dict[str, Any]
    weight: F32

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and codebooks."""
        return sum(
            t.numel() * t.element_size() for name, t in self.state.items() if not name_is_description(name)
        )


Quantise = Callable[[F32], Stored]


def name_is_description(name: str) -> bool:
    """Whether an entry of a state dict says how to read the others, e.g. "weight.quant_state.bitsandbytes__nf4"."""
    return any(name.removeprefix("weight.").startswith(d) for d in _DESCRIPTIONS)


def _torch() -> Any:
    return import_module("torch")


def _linear(weight: F32, dtype: Any = None) -> Any:
    """An `nn.Linear` without bias over a copy of the weight."""
    torch = _torch()
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    values = torch.from_numpy(np.array(weight)).to(dtype or torch.float32)
    module.weight = torch.nn.Parameter(values, requires_grad=False)
    return module


def _decoded(tensor: Any) -> F32:
    array: F32 = tensor.detach().to(_torch().float32).contiguous().numpy()
    return array


# --- bitsandbytes ---------------------------------------------------------------------------------------------


def bitsandbytes_4bit(kind: str, double: bool) -> Quantise:
    """NF4 or FP4 (Dettmers et al. 2023) in blocks of 64; `double`: the blocks' float32 scales in 8 bits."""

    def quantise(weight: F32) -> Stored:
        torch, bnb = _torch(), import_module("bitsandbytes")
        module = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, quant_type=kind, compress_statistics=double
        )
        module.load_state_dict({"weight": torch.from_numpy(np.array(weight))})
        module = module.to("cpu")  # quantises
        decoded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return Stored(dict(module.state_dict()), _decoded(decoded))

    return quantise


def bitsandbytes_int8(weight: F32) -> Stored:
    """LLM.int8 (Dettmers et al. 2022): a scale per row, float32."""
    torch, bnb = _torch(), import_module("bitsandbytes")
    module = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    module.load_state_dict({"weight": torch.from_numpy(np.array(weight))})
    state = dict(module.to("cpu").state_dict())
    decoded = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
    return Stored(state, _decoded(decoded))


def bitsandbytes_settings() -> dict[str, Quantise]:
    """4 bits with and without double quantisation, and int8."""
    return {
        "int8": bitsandbytes_int8,
        "nf4": bitsandbytes_4bit("nf4", False),
        "nf4 double": bitsandbytes_4bit("nf4", True),
        "fp4": bitsandbytes_4bit("fp4", False),
        "fp4 double": bitsandbytes_4bit("fp4", True),
    }


# --- HQQ ------------------------------------------------------------------------------------------------------


def hqq(bits: int, group: int, axis: int) -> Quantise:
    """Half-quadratic quantisation (Badri and Shaji 2023), scales and zeros float16.

    3-bit codes take 32 bits for 10, and along axis 0 a group of 64 takes 7 words for 6.4.
    """

    def quantise(weight: F32) -> Stored:
        torch, core = _torch(), import_module("hqq.core.quantize")
        config = core.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
        module = core.HQQLinear(
            _linear(weight), config, compute_dtype=torch.float16, device="cpu", del_orig=False
        )
        return Stored(dict(module.state_dict()), _decoded(module.dequantize()))

    return quantise


def hqq_settings() -> dict[str, Quantise]:
    """Groups along rows (the tool's default) at 4, 3 and 2 bits; groups of 64 along columns too."""
    rows = ((4, 128), (4, 64), (4, 32), (3, 128), (3, 64), (3, 32), (2, 64), (2, 32), (2, 16))
    return {
        **{f"{bits} bits, groups of {group}": hqq(bits, group, 1) for bits, group in rows},
        **{f"{bits} bits, groups of 64, axis 0": hqq(bits, 64, 0) for bits in (4, 3, 2)},
    }


# --- optimum-quanto -------------------------------------------------------------------------------------------


def quanto(kind: str, optimizer: str | None = None) -> Quantise:
    """qint8 with a scale per row; qint4 and qint2 in groups of 128; the optimizer None is the tool's own choice."""

    def quantise(weight: F32) -> Stored:
        torch, tool = _torch(), import_module("optimum.quanto")
        holder = torch.nn.Sequential(_linear(weight, torch.float16))
        tool.quantize(holder, weights=getattr(tool, kind), optimizer=optimizer and getattr(tool, optimizer)())
        tool.freeze(holder)
        return Stored(dict(holder[0].state_dict()), _decoded(holder[0].weight.dequantize()))

    return quantise


def quanto_settings() -> dict[str, Quantise]:
    """8, 4 and 2 bits, and the lower ones with HQQ's optimisation."""
    return {
        "qint8": quanto("qint8"),
        "qfloat8": quanto("qfloat8"),
        "qint4": quanto("qint4"),
        "qint4 hqq": quanto("qint4", "HqqOptimizer"),
        "qint2": quanto("qint2"),
        "qint2 hqq": quanto("qint2", "HqqOptimizer"),
    }


# --- torchao --------------------------------------------------------------------------------------------------


def torchao(config: Callable[[], Any]) -> Quantise:
    """A weight-only configuration of torchao; the decoded weight is its matmul with the unit matrix."""

    def quantise(weight: F32) -> Stored:
        torch = _torch()
        tool = import_module("torchao.quantization")
        holder = torch.nn.Sequential(_linear(weight, torch.float16))
        tool.quantize_(holder, config())
        tensor = holder[0].weight
        names = [*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", [])]
        state = {n: getattr(tensor, n) for n in names if getattr(tensor, n, None) is not None}
        with torch.inference_mode():
            decoded = holder(torch.eye(weight.shape[1], dtype=torch.float16)).T
        return Stored(state, _decoded(decoded))

    return quantise


def torchao_int8() -> Any:
    """int8, a scale per row."""
    return import_module("torchao.quantization").Int8WeightOnlyConfig()


def torchao_int4(group: int, algorithm: str) -> Callable[[], Any]:
    """int4 for CPUs, which is among torchao's prototypes; scale and zero float16."""

    def config() -> Any:
        prototype = import_module("torchao.prototype.quantization.int4")
        return prototype.PrototypeInt4WeightOnlyConfig(
            group_size=group, int4_choose_qparams_algorithm=algorithm, set_inductor_config=False
        )

    return config


def torchao_settings() -> dict[str, Quantise]:
    """int8, and int4 by round to nearest and by HQQ."""
    return {
        "int8": torchao(torchao_int8),
        "int4, groups of 64": torchao(torchao_int4(64, "tinygemm")),
        **{f"int4 hqq, groups of {group}": torchao(torchao_int4(group, "hqq")) for group in (128, 64, 32)},
    }


# --- all of them ----------------------------------------------------------------------------------------------


def save(path: Path, source: Source, stored: dict[str, Stored], rest: str = "float16") -> None:
    """A safetensors file: what the tool stored, and all other tensors of the model in the type `rest`."""
    torch = _torch()
    tensors = {}
    for name, tensor in source.tensors.items():
        if name not in stored:
            tensors[name] = torch.from_numpy(np.array(tensor)).to(getattr(torch, rest))
            continue
        for part, value in stored[name].state.items():
            tensors[name.removesuffix("weight") + part] = value.detach().contiguous()
    import_module("safetensors.torch").save_file(tensors, path)


def _file_bytes(source: Source, stored: dict[str, Stored], rest: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(path, source, stored, rest)
        return path.stat().st_size


def baseline_of(
    source: Source, tool: str, version: str, setting: str, quantise: Quantise, tables: Sequence[str] = ()
) -> Baseline:
    """Quantise the linear weights and the `tables`, write the file, and make the encoders.

    With tables the linear layers are those of the setting without, so `linear` is None.
    """
    start = time.perf_counter()
    stored = {name: quantise(source.tensors[name]) for name in (*source.linears, *tables)}
    seconds = time.perf_counter() - start
    weights = {name: s.weight for name, s in stored.items()}
    rest = {
        name: tensor.astype(np.float16).astype(np.float32)
        for name, tensor in source.tensors.items()
        if name not in stored
    }
    return Baseline(
        tool,
        version,
        setting + " + words" * (WORDS in tables),
        sum(stored[name].nbytes for name in source.linears),
        source.weights,
        _file_bytes(source, stored, "float16"),
        source.encoder({**weights, **rest}),
        None if tables else source.only_linears(weights),
        file_bytes_float32=_file_bytes(source, stored, "float32"),
        seconds=seconds,
        note="all else float16",
    )


#: settings whose file is made with the word table too
WITH_WORDS = (
    "int8", "nf4", "nf4 double", "4 bits, groups of 64", "3 bits, groups of 64", "2 bits, groups of 64",
    "2 bits, groups of 16", "qint8", "qint4 hqq", "qint2 hqq",
)  # fmt: skip


def baselines_of(
    tool: str, settings: Callable[[], dict[str, Quantise]]
) -> Callable[[Source, str], Iterator[Baseline]]:
    """The baselines of a tool: every setting as it is, and those of `WITH_WORDS` with the word table."""

    def baselines(source: Source, version: str) -> Iterator[Baseline]:
        for setting, quantise in settings().items():
            yield baseline_of(source, tool, version, setting, quantise)
            if setting in WITH_WORDS:
                yield baseline_of(source, tool, version, setting, quantise, (WORDS,))

    return baselines
