"""One op, one name, everywhere; every module in its place; no path of a machine in any source."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rbe_gpu
from rbe_gpu import cli, dispatch, ops, reference, registry

ROOT = Path(__file__).parent.parent

#: The modules of the package, beside one file per op where the folder holds ops.
PACKAGE = {
    "__init__": "the public names; the checkout path hook",
    "registry": "OPS: signature, result and tolerances of every op",
    "reference": "float64 NumPy definition of every op",
    "dispatch": "which backend runs an op",
    "blocks": "RBEMatrix, RBEVectors",
    "transforms": "synthesis matrices",
    "encode": "dense -> blocks",
    "feedback": "codes chosen by what they do to a layer's outputs",
    "evaluate": "a compressed model beside its dense one, in figures",
    "evaluate_decoders": "a compressed decoder beside its dense one, in figures",
    "container": "blocks <-> .rbe.safetensors",
    "stored": "one tensor of a file, every rule checked",
    "output": "files that are written: complete or not at all",
    "memory": "how much the machine has, and how much is available",
    "json_checks": "strict JSON and checks of its values",
    "mapped": "arrays straight from a file",
    "transfer": "arrays, weights, layers and models between devices",
    "cache": "decoded panels under a byte budget",
    "workspace": "scratch memory kept between calls",
    "machine": "what this machine has, and what is missing",
    "profiler": "calls, time, bytes and algorithms of the ops",
    "warmup": "a model's kernels before its first batch",
    "kernel_struct": "parameters of kernels with names, defined once for Python, Numba and CUDA",
    "matmul": "what a matmul algorithm is, and how a backend chooses one",
    "compile_ahead": "compiles some of a model's CPU kernels, for a second process",
    "tuning": "measures the CPU's cost model of matmul",
    "forks": "whether this process is a fork of one that imported the package",
    "threads": "how many threads kernels and BLAS use",
}
FOLDERS = {
    *("ops", "codecs", "layers", "models", "gpu", "train", "integrations", "cli"),
    *("cluster", "embed_files"),
}
COMMANDS = {"compress", "distill", "inspect", "embed", "generate", "eval", "report", "warmup", "tune", "info"}
CLI = {
    *("__init__", "__main__", "_app", "_environment", "_errors", "_files", "_inputs", "_measure", "_options"),
    *("_compiling", "_compile_later", "_eval_decoders", "_output", "_signals", "_streams"),
    *("_cluster", "_embed_files"),
}
CPU = {
    *("__init__", "_jit", "_disk_cache", "_numba_internals", "arrays", "isa", "params", "unpack"),
    *("_atomics", "_workers", "_pool", "_parts"),  # threads
    *("simd", "simd_emit", "simd_math"),
    *("quantize", "feedback"),  # the encoder's loops
    *("bit_planes", "grid_planes"),  # of the int8 matmuls
    "grid_rows",  # of embedding
    "attention_few_queries",
    *("decoder_step", "encoder_step", "prepared_matmul"),
    "norm_rows",  # of the norms
    "stack",  # of dropout and softmax
    *("matmul_algorithms", "matmul_costs"),
    *("matmul_tiles", "matmul_rows", "matvec", "int8_dot", "codes", "exceptions", "operand"),  # of linear
    *(
        "int8_tiles",
        "int8_matvec",
        "int8_rows",
        "int8_input",
        "int8_codes",
        "int8_exceptions",
        "int8_simd",
    ),  # of int8 activations
    *("transform_in", "epilogue", "fast_transform"),
}
#: Sources that an op has beside its own: compiled when a launch asks for one of their kernels.
FURTHER = {
    # of linear: few tokens, method="transform", activation_bits=8
    *("linear_few", "linear_transform", "linear_integers"),
    "attention_wgmma",  # of attention: Hopper, where it is asked for
}
GPU = {
    *("__init__", "_execute", "_load", "_launch", "_params", "_rows", "_elements", "_source", "_splits"),
    "graph",
    "matmul_algorithms",
    *FURTHER,
}
HEADERS = {
    *(
        "activations",
        "async_copy",
        "attention",
        "basis",
        "codes",
        "division",
        "elementwise",
        "finish",
        "linear",
        "mma",
        "reduce",
        "rows",
        "tiles",
    ),
    *("transforms", "types", "vector_io", "wgmma"),
}
REPORTS = {
    "": {"__init__", "__main__", "compare", "corpus", "run", "scale", "targets"},
    "harness": {
        *("__init__", "row_names", "rows", "timing", "memory", "process", "measure", "weight_error"),
        *("inputs", "token_ids", "baselines", "text", "plots", "page", "readme", "significance"),
        *("libraries", "mpnet", "noise", "nvml"),
    },
    "speed": {
        *("__init__", "compression", "costs", "machine_plots", "original", "page", "panel_cache", "plots"),
        *("processes", "readme", "roofline", "run", "short", "summary", "utilisation"),
    },
    "speed/cases": {"__init__", "model", *registry.OPS},
    "quality": {
        *("__init__", "decoders", "measure", "points", "findings", "plots", "page", "readme", "run", "summary")
    },
    "quality/quantizers": {
        "__init__", "__main__", "source", "gguf_file", "llama", "onnx_runtime", "torch_tools"
    },
    "quality/small_good_fast": {"__init__", "__main__", "measure", "openvino", "peers", "plots", "page"},
    "gpu": {
        *("__init__", "check", "plan", "stage", "device", "cards", "checkout", "pack", "wheels", "deliver"),
        *("launch", "conformance", "minilm", "bandwidth", "weights", "crossover", "attention", "encoder", "latency"),
        "sanitizer",
    },
}  # fmt: skip
#: What cases of several ops share.
SHARED_CASES = {"__init__", "_case", "_arrays", "_errors", "_weights", "_norm", "_elementwise"}


def sources() -> list[Path]:
    """Every file under version control, or about to be."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def modules(folder: str, suffix: str = ".py") -> set[str]:
    return {path.stem for path in (ROOT / folder).glob(f"*{suffix}")}


#: Ops that a module of `reports/gpu` of their own measures; `bandwidth` has all others.
GPU_MODULES = {"attention": "attention", "decode": "weights", "linear": "weights"}

OPS = pytest.mark.parametrize("op", registry.OPS)


@OPS
def test_op_has_a_dispatching_function_and_a_reference(op: str) -> None:
    assert callable(getattr(ops, op))
    assert callable(getattr(reference, op))


@OPS
def test_op_has_a_cpu_kernel(op: str) -> None:
    assert callable(getattr(dispatch.CPU, op))
    assert (ROOT / "cpu_fallback" / f"{op}.py").is_file()


@OPS
@pytest.mark.parametrize("place", ["tests/test_{}.py", "tests/cases/{}.py", "reports/speed/cases/{}.py"])
def test_op_has_tests_cases_and_a_benchmark(place: str, op: str) -> None:
    assert (ROOT / place.format(op)).is_file(), f"{place.format(op)} is missing"


@OPS
def test_cpu_kernel_opens_with_its_equation(op: str) -> None:
    first = (ROOT / "cpu_fallback" / f"{op}.py").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith('"""')
    assert "=" in first, f"cpu_fallback/{op}.py opens with {first!r}"


@OPS
def test_op_has_its_place_on_the_page_of_kernels(op: str) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"| `{op}` |" in page or f"\n## {op}\n" in page


def test_every_cuda_source_has_a_mutant() -> None:
    """A mistake in it that a case of the op catches (tests/test_mutants.py)."""
    from .cases import CASES

    sources = {mutant.source or op for op in registry.OPS for mutant in CASES[op].mutants}
    assert sources == modules("cuda_src", ".cu")


def test_every_op_has_a_hot_loop_whose_machine_code_is_checked() -> None:
    """Or a reason why not."""
    from . import test_assembly

    assert set(test_assembly.KERNELS) == set(registry.OPS) - test_assembly.WITHOUT.keys()
    assert all(test_assembly.KERNELS.values())


def test_every_op_is_measured_on_a_gpu() -> None:
    from rbe_gpu.reports.gpu import bandwidth

    for ops_of in ({case.op for case in bandwidth.cases()}, set(bandwidth.OURS_OF), set(bandwidth.TORCH_OF)):
        assert ops_of == set(registry.OPS) - GPU_MODULES.keys()
    for module in GPU_MODULES.values():
        assert (ROOT / "reports" / "gpu" / f"{module}.py").is_file()


def test_every_op_is_in_the_roofline() -> None:
    """But those that only read weights, and have no operations of their own."""
    from rbe_gpu.reports.speed import costs, machine_plots

    without = {"decode", "embedding"}
    assert {op for _, _, _, group in machine_plots._STYLES for op in group} == set(registry.OPS) - without
    assert set(costs._PER_ELEMENT) == set(registry.OPS) - without - {"linear", "attention"}


def test_ops_are_the_public_functions_of_ops() -> None:
    assert {n for n, f in vars(ops).items() if callable(f) and not n.startswith("_")} == set(registry.OPS)
    assert set(registry.OPS) <= set(rbe_gpu.__all__)


def test_launches_of_every_op_are_tested_at_large_sizes() -> None:
    from .test_launch import LAUNCHES

    files = {op for op in registry.OPS if (ROOT / "tests" / f"test_launch_{op}.py").is_file()}
    assert set(LAUNCHES) | files | {"embedding"} == set(registry.OPS)  # embedding: test_launch_decode.py


def test_package_modules() -> None:
    assert modules("rbe_gpu") <= set(PACKAGE)
    folders = {p.name for p in (ROOT / "rbe_gpu").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= FOLDERS


def test_the_page_of_the_architecture_names_every_module_of_models() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("### The modules of `models/`\n")[2].partition("\n## ")[0]
    assert modules("rbe_gpu/models") - {"__init__"} <= set(re.findall(r"`(\w+)`", table))


def test_backend_folders_hold_one_file_per_op() -> None:
    assert modules("cpu_fallback") == CPU | set(registry.OPS)
    assert modules("rbe_gpu/gpu") == GPU | set(registry.OPS)
    assert modules("cuda_src", ".cu") == set(registry.OPS) | FURTHER
    assert modules("cuda_src", ".cuh") == HEADERS


def test_cases_folder_holds_one_file_per_op() -> None:
    assert modules("tests/cases") == SHARED_CASES | set(registry.OPS)


@OPS
@pytest.mark.parametrize("name", ["CPU", "CUDA"])
def test_backend_offers_the_op_or_states_a_reason(name: str, op: str) -> None:
    backend = getattr(dispatch, name)
    if op in backend.without:
        assert backend.without[op]
        with pytest.raises(NotImplementedError, match=f"no {op}: {re.escape(backend.without[op])}"):
            getattr(backend, op)
    else:
        function = getattr(backend, op)
        assert function is getattr(importlib.import_module(f"{backend.package}.{op}"), op)
        assert vars(backend)[op] is function  # a plain attribute after the first lookup


def test_backend_declares_the_ops_of_the_registry() -> None:
    declared = {
        name for name, value in vars(dispatch.Backend).items() if isinstance(value, dispatch.BackendOp)
    }
    assert declared == set(registry.OPS)
    assert not {op for b in (dispatch.CPU, dispatch.CUDA) for op in b.without} - declared


def test_unknown_op_is_an_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="conv2d"):
        dispatch.CPU.conv2d  # noqa: B018


def test_op_without_a_kernel_on_a_backend_is_an_error_with_the_reason() -> None:
    backend = dispatch.Backend("test", "rbe_gpu.gpu", without={"silu": "not written yet"})
    with pytest.raises(NotImplementedError, match="the test backend has no silu: not written yet"):
        backend.silu  # noqa: B018


def test_cli_holds_one_file_per_command() -> None:
    assert modules("rbe_gpu/cli") == CLI | COMMANDS
    assert {command.name for command in cli.app.registered_commands} == COMMANDS


@pytest.mark.parametrize("page", ["first-steps.md", "first-steps.ko.md"])
def test_first_steps_list_every_command(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^\| `([a-z]+)` \|", text)) == COMMANDS


def test_no_product_file_is_longer_than_700_lines() -> None:
    folders = ("rbe_gpu", "cpu_fallback", "cuda_src", "reports")
    suffixes = {".py", ".cu", ".cuh"}
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 700, path


def test_report_modules() -> None:
    for folder, names in REPORTS.items():
        assert modules(f"reports/{folder}") == names, folder


@pytest.mark.parametrize("name", ["utils", "helpers", "misc", "common"])
def test_no_catch_all_modules(name: str) -> None:
    assert not [path for path in sources() if path.name == f"{name}.py"]


def test_no_numbered_variants() -> None:
    assert not [path for path in sources() if re.search(r"(_v\d+|\d)\.(py|cu|cuh)$", path.name)]


def test_sources_name_no_path_of_a_machine() -> None:
    """Neither this machine's folders nor anybody's home."""
    here = {str(ROOT), str(Path.home()), sys.prefix} - {"/", "/usr", "/usr/local"}
    homes = "|".join(("home", "Users", "root"))
    pattern = re.compile("|".join([*(re.escape(p) + r"(?!\w)" for p in here), rf"(?<![\w.:/])/({homes})/\w"]))
    found = []
    for path in sources():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a binary file
            continue
        found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in pattern.finditer(text)]
    assert not found
