"""Every CUDA source compiles with NVRTC for every architecture that has machine code of its own, without a warning,
and nothing spills.

Kernels that are compiled for a configuration: those of KERNELS, each width and kind of codes, transform, block size,
dtype and kind of index among them. All of them are compiled for the architectures of WHOLE, for the others COVERING.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rbe_gpu.gpu import _load, _source, decode, embedding, linear
from rbe_gpu.gpu._launch import Kernel, Launch
from rbe_gpu.matmul import int8_support

from .host import nvrtc, virtual

ROOT = Path(__file__).parent.parent
CONFIGURED = ("decode", "embedding", "linear", "linear_few", "linear_transform", "linear_integers")
#: Not those for one architecture alone: attention_wgmma is compiled by test_attention_wgmma.py.
EVERYWHERE = [p for p in sorted((ROOT / "cuda_src").glob("*.cu")) if p.stem not in _load.ONLY]
FILES = [p for p in EVERYWHERE if p.stem not in CONFIGURED]
FILES += sorted((ROOT / "tests" / "host").glob("*.cu"))
#: 75 has code of its own (`__CUDA_ARCH__ < 800`). NVRTC generates two forms of PTX for 80 and newer, for 100 and 120
#: with instructions on pairs of floats: of either the architecture whose launch bounds leave the fewest registers
#: (RESIDENT in linear.cuh). The others translate the same PTX with as many registers or more.
WHOLE = (75, 90, 100)
#: Files, the constants of those that have some, and the architecture. Attention without capped scores is the same
#: code with less in it: for those of WHOLE, and for 80, whose machine code is read (test_machine_code_attention.py).
SOURCES = [(path, {}, of) for path in FILES if path.stem != "attention" for of in nvrtc.ARCHITECTURES]
SOURCES += [
    (ROOT / "cuda_src" / "attention.cu", {"AttentionParams.capped": capped}, of)
    for capped, architectures in ((0, (80, *WHOLE)), (1, nvrtc.ARCHITECTURES))
    for of in architectures
]

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
ROWS, COLS = 256, 1024
#: Weights, with the dtype of x: each value of each setting stands in one of them at least.
WEIGHTS: list[tuple[Any, Any]] = [
    (virtual.matrix(ROWS, COLS), F16),
    (virtual.matrix(ROWS, COLS), F32),
    (virtual.matrix(ROWS, COLS, transform="dwt-db2", block=128, codes=virtual.dense_codes(ROWS, COLS, 3)), BF16),
    (virtual.matrix(ROWS, COLS, transform="hadamard", block=32, codes=virtual.dense_codes(ROWS, COLS, 6)), F16),
    (virtual.matrix(ROWS, COLS, transform="dwt-bior3.1", codes=virtual.dense_codes(ROWS, COLS, 8)), F16),
    (virtual.matrix(ROWS, COLS, transform="none", codes=virtual.dense_codes(ROWS, COLS, 12)), F16),
    (
        virtual.matrix(ROWS, COLS, basis=virtual.virtual((4, 16, 8), F16), codes=virtual.dense_codes(ROWS, COLS, 2)),
        F16,
    ),
    *(
        (virtual.matrix(ROWS, COLS, transform="none", codes=virtual.grid_codes(ROWS, COLS, bits)), F16)
        for bits in range(2, 9)
    ),
    (virtual.matrix(ROWS, COLS, transform="dwt-haar", codes=virtual.grid_codes(ROWS, COLS, 5)), F32),
    (virtual.matrix(ROWS, COLS, block=32, codes=virtual.sparse_codes(ROWS, COLS, "int8", "delta")), F16),
    (virtual.matrix(ROWS, COLS, block=128, codes=virtual.sparse_codes(ROWS, COLS, "int4", "bitmap")), F32),
    (virtual.matrix(ROWS, COLS, codes=virtual.sparse_codes(ROWS, COLS, "f16", "full")), BF16),
]  # fmt: skip
#: Weights of which only the matmul with int8 activations is compiled: it keeps the sums and scales of groups in
#: registers, 16 words of codes of 8 bits beside them.
INT8_WEIGHTS = [
    virtual.matrix(ROWS, COLS, block=block, codes=virtual.dense_codes(ROWS, COLS, bits, group))
    for bits in (5, 8)
    for group, block in ((32, 128), (128, 64))
]


def launches_of(weight: Any, dtype: Any) -> Iterator[Launch]:
    ws: Any = virtual.VirtualWorkspace()
    yield from decode.launches(weight, virtual.virtual(weight.shape, dtype), ws)
    ids = virtual.virtual((9,), np.int64)
    yield from embedding.launches(ids, weight, virtual.virtual((9, COLS), dtype), ws)
    bias = virtual.virtual((ROWS,), dtype)
    # 40 split k; then short and tall tiles (gpu/_splits.py)
    few = ((1, None), (3, None), (9, None))
    for tokens, method in (*few, (40, None), (40, "transform"), (8192, None), (1 << 16, None)):
        x, out = virtual.virtual((tokens, COLS), dtype), virtual.virtual((tokens, ROWS), dtype)
        activation = "gelu" if tokens >= 40 else None
        yield from linear.launches(x, weight, bias, activation, out, out, ws, None, method)
        if method is None and int8_support(weight)[0]:
            yield from linear.launches(x, weight, bias, activation, out, out, ws, activation_bits=8)


def int8_launches(weight: Any) -> Iterator[Launch]:
    """The matmuls of `linear_integers` of few tokens and of many."""
    for tokens in (9, 8192):
        x, out = virtual.virtual((tokens, COLS), F16), virtual.virtual((tokens, ROWS), F16)
        ws: Any = virtual.VirtualWorkspace()
        launches = linear.launches(x, weight, None, None, None, out, ws, activation_bits=8)
        yield from (
            one for one in launches if one.op == "linear_integers" and one.entry != "linear_integers_inputs"
        )


def kernels() -> list[Kernel]:
    found = dict.fromkeys(launch.kernel for w in WEIGHTS for launch in launches_of(*w))
    found |= dict.fromkeys(launch.kernel for w in INT8_WEIGHTS for launch in int8_launches(w))
    dense = virtual.virtual((ROWS, COLS), BF16)
    for tokens in (1, 3, 9, 40):
        x, out = virtual.virtual((tokens, COLS), BF16), virtual.virtual((tokens, ROWS), BF16)
        ws: Any = virtual.VirtualWorkspace()
        launched = linear.launches(x, dense, None, None, None, out, ws)
        found |= dict.fromkeys(launch.kernel for launch in launched)
    ids = virtual.virtual((9,), np.int64)
    launched = embedding.launches(ids, dense, virtual.virtual((9, COLS), BF16), virtual.VirtualWorkspace())
    return list(found | dict.fromkeys(launch.kernel for launch in launched))


def covering(kernels: list[Kernel]) -> list[Kernel]:
    """Some of the kernels, with every entry and every value of every constant among them."""
    values = {k: {k.entry, *k.constants} for k in kernels}
    missing = set().union(*values.values())
    chosen: list[Kernel] = []
    while missing:
        chosen.append(max(kernels, key=lambda kernel: len(values[kernel] & missing)))
        missing -= values[chosen[-1]]
    return chosen


KERNELS = kernels()
COVERING = covering(KERNELS)


def compiled_for(architecture: int) -> list[Kernel]:
    """Those of KERNELS that are compiled for an architecture."""
    return KERNELS if architecture in WHOLE else COVERING


def text(path: Path, constants: dict[str, int]) -> str:
    return _source.expand(path.name, path.read_text(encoding="utf-8"), constants)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> None:
    """What the selected tests ask for, two at a time."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    jobs = [(text(p["path"], p["constants"]), p["architecture"]) for p in selected if "constants" in p]
    jobs += [
        (_source.kernel_source(k), p["of"]) for p in selected if "of" in p for k in compiled_for(p["of"])
    ]
    nvrtc.compile_all(jobs)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("of", nvrtc.ARCHITECTURES)
def test_kernels_compile_for_their_configuration(of: int) -> None:
    """No message, no register spilled to memory, no array indexed into memory."""
    wrong = []
    for kernel in compiled_for(of):
        result = nvrtc.compile_source(_source.kernel_source(kernel), of)
        assert list(result.kernels) == [kernel.entry]
        usage = result.kernels[kernel.entry]
        assert usage.registers
        if result.warnings or usage.spills or usage.stack:
            wrong.append(f"{kernel.entry}: {usage}, {result.warnings}, {dict(kernel.constants)}")
    assert not wrong, "\n".join(wrong)


def test_configurations_are_many() -> None:
    """Every width of codes and every kernel of the sources stands among them."""
    settings = {item for kernel in KERNELS for item in kernel.constants}
    for name, values in {
        "Codes.bits": {2, 3, 4, 5, 6, 7, 8, 12, 16}, "Codes.kind": {0, 1, 2}, "Codes.index_kind": {0, 1, 2},
        "Codes.group": {32, 64, 128}, "DecodeParams.transform": set(range(6)), "DecodeParams.type": {0, 1, 2},
        "Epilogue.activation": {0, 2}, "MmaParams.block": {32, 64, 128}, "InputsParams.layout": {0, 1},
    }.items():  # fmt: skip
        assert values <= {value for key, value in settings if key == name}, name
    entries = {kernel.entry for kernel in KERNELS}
    for op in CONFIGURED:
        declared = re.findall(r"KERNEL\((\w+),", _source.read(f"{op}.cu"))
        assert set(declared) <= entries


def test_covering_has_every_kernel_and_every_value() -> None:
    def values(kernels: list[Kernel]) -> set[Any]:
        return {item for k in kernels for item in k.constants} | {k.entry for k in kernels}

    assert values(COVERING) == values(KERNELS)
    assert len(COVERING) < 0.4 * len(KERNELS)  # 0.31 of them


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("path", "constants", "architecture"),
    [
        pytest.param(*one, id="-".join((one[0].stem, *map(str, (*one[1].values(), one[2])))))
        for one in SOURCES
    ],
)
def test_compiles(path: Path, constants: dict[str, int], architecture: int) -> None:
    """No message, no register spilled to memory, no array indexed into memory."""
    result = nvrtc.compile_source(text(path, constants), architecture)
    assert not result.warnings
    assert result.kernels
    for name, usage in result.kernels.items():
        assert usage.registers, f"{name}: the log says nothing of registers"
        assert usage.spills == 0, f"{name}: {usage}"
        assert usage.stack == 0, f"{name}: {usage}"


# --- sm_89 runs the machine code of sm_86 -------------------------------------------------------------


def branches(architecture: int) -> list[bool]:
    """Every preprocessor condition on the architecture, of all sources, for `architecture`."""
    values = []
    for path in [*sorted((ROOT / "cuda_src").glob("*.cu*")), *sorted((ROOT / "tests" / "host").glob("*.cu"))]:
        source = path.read_text(encoding="utf-8")
        conditions = re.findall(r"^#(?:el)?if ([^/\n]*__CUDA_ARCH__[^/\n]*)", source, re.MULTILINE)
        named = sum(condition.count("__CUDA_ARCH__") for condition in conditions)
        assert named == source.count("__CUDA_ARCH__"), f"{path.name} names the architecture elsewhere"
        for condition in conditions:
            names = {"__CUDA_ARCH__": 10 * architecture, "defined": lambda _: False, "RBE_HOST": None}
            python = condition.replace("&&", " and ").replace("||", " or ").replace("!", " not ")
            values.append(bool(eval(python, {}, names)))
    return values


def test_no_source_tells_architectures_of_the_same_code_apart() -> None:
    for other, compiled_for in nvrtc.SAME_CODE.items():
        assert branches(other) == branches(compiled_for)
    # no two of those that are compiled for are the same: launch bounds differ
    assert len({tuple(branches(a)) for a in nvrtc.ARCHITECTURES}) == len(nvrtc.ARCHITECTURES)


def one_kernel_each() -> dict[str, list[Kernel]]:
    """By op: one configuration of every kernel of CONFIGURED, which is compiled for every architecture above, and one
    kernel of every other source."""
    entries: dict[str, dict[str, Kernel]] = {path.stem: {} for path in EVERYWHERE}
    for kernel in COVERING:
        entries[kernel.op][kernel.entry] = kernel
    for op, kernels in entries.items():
        if not kernels:
            entry = OF_HALVES.get(op, f"{op}_f16")
            kernels[entry] = Kernel(op, entry, (("AttentionParams.capped", 1),) if op == "attention" else ())
    return {op: list(kernels.values()) for op, kernels in entries.items()}


#: Entries for float16 of ops that have more than one: for the rows that registers hold, or by head size.
OF_HALVES = {
    "attention": "attention_f16_64", "gelu": "gelu_f16_erf",
    **{op: f"{op}_f16_32" for op in ("l2_normalize", "layer_norm", "rms_norm", "softmax")},
}  # fmt: skip


@pytest.mark.parametrize("op", one_kernel_each())
def test_same_machine_code(op: str) -> None:
    """Of one kernel each: the others are compiled for one of the two architectures only."""
    for kernel in one_kernel_each()[op]:
        text = _source.kernel_source(kernel)
        for other, compiled_for in nvrtc.SAME_CODE.items():
            here, there = (nvrtc.compile_source(text, a) for a in (other, compiled_for))
            assert list(here.kernels) == list(there.kernels) == [kernel.entry]
            assert here.digest == there.digest


def test_other_machine_code_is_seen() -> None:
    """In a source with a branch between the two."""
    text = """extern "C" __global__ void kernel(float* x) {
    #if __CUDA_ARCH__ >= 890
      x[0] += 2.0f;
    #else
      x[0] += 1.0f;
    #endif
    }"""
    digests = [nvrtc.compile_source(text, a).digest for a in (86, 89)]
    assert digests[0] != digests[1]


def test_spills_are_seen() -> None:
    """A kernel that cannot keep its values in 64 registers."""
    spilling = """#include "types.cuh"
    extern "C" __global__ void __launch_bounds__(1024) spilling(const float* x, float* y) {
      float v[100];
      #pragma unroll
      for (int i = 0; i < 100; ++i) v[i] = x[threadIdx.x + 1024 * i];
      __syncthreads();
      #pragma unroll
      for (int i = 0; i < 100; ++i) y[threadIdx.x + 1024 * i] = v[i] - v[99 - i];
    }"""
    usage = nvrtc.compile_source(_source.expand("spilling.cu", spilling), 90).kernels["spilling"]
    assert usage.spills > 0
    assert usage.registers == 64


def test_errors_are_seen() -> None:
    """With the file and the line as they are in the source."""
    broken = '// first line\n#include "types.cuh"\nextern "C" __global__ void broken() { undefined(); }\n'
    with pytest.raises(nvrtc.NvrtcError, match=r"broken\.cu\(3\).*undefined"):
        nvrtc.compile_source(_source.expand("broken.cu", broken), 75)


def test_architectures_too_old_are_refused() -> None:
    with pytest.raises(nvrtc.NvrtcError):
        nvrtc.compile_source(_source.expand("empty.cu", '#include "types.cuh"\n'), 70)
