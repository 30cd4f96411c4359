"""One op, one name, everywhere; every module in its place; no path of a machine in any source."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rbe_gpu import dispatch, ops, reference, spec

ROOT = Path(__file__).parent.parent

#: The modules of the package, beside one file per op where the folder holds ops.
PACKAGE = {
    "__init__": "the public names; the checkout path hook",
    "ops": "one thin dispatching function per op",
    "spec": "OPS: what every op promises",
    "reference": "float64 NumPy definition of every op",
    "dispatch": "which backend runs an op",
    "blocks": "RBEMatrix, RBEVectors",
    "transforms": "synthesis matrices",
    "packing": "b-bit codes in bytes",
    "encode": "dense -> blocks",
    "entropy": "grid integers <-> streams",
    "coding": "coefficients -> stored codes",
    "plans": "the ways to store, what each costs, which suits a target",
    "feedback": "codes chosen by what they do to a layer's outputs",
    "evaluate": "a compressed model beside its dense one, in figures",
    "container": "blocks <-> .rbe.safetensors",
    "mapped": "arrays straight from a file",
    "transfer": "arrays, weights, layers and models between devices",
    "cache": "decoded panels under a byte budget",
    "workspace": "scratch memory kept between calls",
    "machine": "what this machine has, and what is missing",
    "warmup": "a model's kernels before its first batch",
    "planner": "which way a product takes",
    "tuning": "the planner's numbers, measured",
    "threads": "how many threads kernels and BLAS use",
    "cli": "the command line",
}
FOLDERS = {"layers", "models", "gpu"}
CPU = {
    *("__init__", "_jit", "_parts", "_pool", "simd", "unpack"),
    *("quantize", "feedback"),  # the encoder's loops
    *("matmul_tiles", "product", "vector_product", "codes", "operand"),  # of linear
    *("fast_transform", "fixed_point"),
}
#: Sources that an op has beside its own: compiled when a launch asks for one of their kernels.
FURTHER = {"linear_transform"}  # of linear, method="transform"
GPU = {"__init__", "_load", "_launch", "_rows", "_elements", "graph", *FURTHER}
REPORTS = {
    *(
        "__init__",
        "bench",
        "plot",
        "page",
        "run",
        "inputs",
        "peers",
        "quality",
        "gpu_check",
        "aims",
        "readme",
    ),
    *(
        "tradeoff",
        "tradeoff_points",
        "tradeoff_findings",
        "tradeoff_page",
        "tradeoff_plot",
        "tradeoff_readme",
        "speed_readme",
        "readme",
    ),
}
QUANTIZERS = {"__init__", "__main__", "source", "gguf_file", "llama", "onnx_runtime", "torch_tools"}
CASES = {"__init__", "model"}
GPU_CHECK = {
    *("__init__", "stage", "device", "timing", "targets", "checkout", "pack"),
    *(
        "conformance",
        "minilm",
        "bandwidth",
        "weights",
        "crossover",
        "attention",
        "encoder",
        "latency",
        "sanitizer",
    ),
}


def sources() -> list[Path]:
    """Every file under version control, or about to be."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def modules(folder: str, suffix: str = ".py") -> set[str]:
    return {path.stem for path in (ROOT / folder).glob(f"*{suffix}")}


OPS = pytest.mark.parametrize("op", spec.OPS)


@OPS
def test_op_has_a_dispatching_function_and_a_reference(op: str) -> None:
    assert callable(getattr(ops, op))
    assert callable(getattr(reference, op))


@OPS
def test_op_has_a_cpu_kernel(op: str) -> None:
    assert callable(getattr(dispatch.CPU, op))
    assert (ROOT / "cpu_fallback" / f"{op}.py").is_file()


@OPS
@pytest.mark.parametrize("place", ["tests/test_{}.py", "reports/cases/{}.py"])
def test_op_has_a_test_and_a_benchmark(place: str, op: str) -> None:
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


def test_ops_are_the_public_functions_of_ops() -> None:
    public = {n for n, f in vars(ops).items() if callable(f) and getattr(f, "__module__", "") == ops.__name__}
    assert {n for n in public if not n.startswith("_")} == set(spec.OPS)


def test_package_modules() -> None:
    assert modules("rbe_gpu") <= set(PACKAGE)
    folders = {p.name for p in (ROOT / "rbe_gpu").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= FOLDERS


def test_backend_folders_hold_one_file_per_op() -> None:
    assert modules("cpu_fallback") == CPU | set(spec.OPS)
    assert modules("rbe_gpu/gpu") == GPU | set(spec.OPS)
    assert modules("cuda_src", ".cu") == set(spec.OPS) | FURTHER
    assert modules("cuda_src", ".cuh") == {"common", "linear"}


def test_report_modules() -> None:
    assert modules("reports") <= REPORTS
    assert modules("reports/cases") <= CASES | set(spec.OPS)
    assert modules("reports/quantizers") <= QUANTIZERS
    assert modules("reports/gpu") <= GPU_CHECK


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
