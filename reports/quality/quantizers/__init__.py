"""The quantisers that people use, on the model of the reports, each at its own bytes.

    for baseline in baselines(model_folder()):
        print(baseline.name, baseline.bits_per_weight, baseline.file_bytes, baseline.whole.embed(texts))

Every tool quantises the same float32 weights. Weight-only tools decode their own codes, and the decoded weights run
in this project's dense encoder, so that only weights differ; ONNX Runtime runs its own graph. Bytes are those of real
files and of the tensors in them. Where a choice was open, the one that favours the tool was taken; the modules say
which.

`python -m rbe_gpu.reports.quality.quantizers` prints a table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from . import gguf_file, llama, onnx_runtime, torch_tools
from .source import Baseline, Encoder, Source

__all__ = ["TOOLS", "Baseline", "Encoder", "Source", "Tool", "baselines", "missing"]


@dataclass(frozen=True)
class Tool:
    """A tool, what it needs, and its settings.

    Attributes
    ----------
    name : as `Baseline.tool`
    distribution : what its version is asked of
    modules : importable names it needs
    requirement : what to give pip
    baselines : (source, version) -> its baselines, one at a time
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    requirement: str
    baselines: Callable[[Source, str], Iterator[Baseline]]

    @property
    def absent(self) -> tuple[str, ...]:
        """The modules that are not installed."""
        return tuple(m for m in self.modules if not _installed(m))


def _installed(module: str) -> bool:
    top, _, inner = module.partition(".")
    return find_spec(top) is not None and (not inner or find_spec(module) is not None)


_TORCH = ("torch", "safetensors")
TOOLS = (
    Tool("gguf", "gguf", ("gguf",), "gguf", gguf_file.baselines),
    Tool("llama.cpp", "llama-cpp-python", ("gguf", "llama_cpp"), "gguf llama-cpp-python", llama.baselines),
    Tool(
        "bitsandbytes", "bitsandbytes", (*_TORCH, "bitsandbytes"), "bitsandbytes",
        torch_tools.baselines_of("bitsandbytes", torch_tools.bitsandbytes_settings),
    ),
    Tool("hqq", "hqq", (*_TORCH, "hqq"), "hqq", torch_tools.baselines_of("hqq", torch_tools.hqq_settings)),
    Tool(
        "optimum-quanto", "optimum-quanto", (*_TORCH, "optimum.quanto"), "optimum-quanto",
        torch_tools.baselines_of("optimum-quanto", torch_tools.quanto_settings),
    ),
    Tool(
        "torchao", "torchao", (*_TORCH, "torchao"), "torchao",
        torch_tools.baselines_of("torchao", torch_tools.torchao_settings),
    ),
    Tool(
        "onnxruntime", "onnxruntime", ("onnx", "onnxruntime", "onnx_ir", "torch"), "onnx onnxruntime onnx_ir torch",
        onnx_runtime.baselines,
    ),
)  # fmt: skip


def _chosen(tools: Collection[str] | None) -> list[Tool]:
    known = {tool.name: tool for tool in TOOLS}
    if unknown := [name for name in tools or () if name not in known]:
        raise ValueError(f"no tool is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [tool for tool in TOOLS if tools is None or tool.name in tools]


def missing(tools: Collection[str] | None = None) -> dict[str, str]:
    """The tools that are not installed here: name -> the command that mends it."""
    return {t.name: f"pip install {t.requirement}" for t in _chosen(tools) if t.absent}


def baselines(folder: Path, tools: Collection[str] | None = None) -> Iterator[Baseline]:
    """The baselines of every installed tool, made one at a time; `missing` names the tools that are not installed.

    folder : a model folder, as `rbe_gpu.models.locate.model_folder` gives
    tools : only these

    Raises
    ------
    ValueError : an unknown tool
    """
    chosen = _chosen(tools)
    source = Source(folder)
    for tool in chosen:
        if not tool.absent:
            yield from tool.baselines(source, version(tool.distribution))
