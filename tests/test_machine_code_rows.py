"""Gates on the machine code of the elementwise ops and of the ops over rows."""

from __future__ import annotations

from functools import lru_cache

import pytest

from rbe_gpu.gpu import _source
from rbe_gpu.gpu._launch import Kernel as Launched

from .host import machine_code
from .host.machine_code import Kernel

#: Instructions for a chunk of 8 half values, with what a bias would take. An H100 has some 280 issue slots for the
#: chunks of a warp in the time that its memory takes to move them (71 cycles of 4 schedulers).
ELEMENTWISE = {"gelu_{}_erf": 215, "gelu_{}_tanh": 215, "silu_{}": 200}


def elementwise_violations(kernel: Kernel, most: int) -> set[str]:
    loop = max(kernel.loops, key=len)
    gates = {
        "instructions": len(loop) <= most,
        "no division": kernel.count("CALL|FCHK") == 0,
        "loads and stores of 16 bytes": 128
        in {i.bits for i in loop.of("LDG")} & {i.bits for i in loop.of("STG")},
        "no local memory": kernel.local == 0,
        "blocks of a multiprocessor": kernel.blocks_per_sm(256) == 8,
    }
    return {name for name, passed in gates.items() if not passed}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("type_name", ["f16", "bf16"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_elementwise(name: str, type_name: str, architecture: int) -> None:
    kernel = machine_code.kernels(name.partition("_")[0], architecture)[name.format(type_name)]
    assert elementwise_violations(kernel, ELEMENTWISE[name]) == set()


#: `store` of vector_io.cuh one by one
STORE_EACH = """
template <int N, class T>
__device__ __forceinline__ void store_each(T* p, const float (&v)[N]) {
  for (int i = 0; i < N; ++i) p[i] = from_float<T>(v[i]);
}"""


@lru_cache
def changed(op: str, old: str, new: str, entry: str) -> Kernel:
    """The kernel `entry` of a source with `old` exchanged, compiled alone, as for a GPU."""
    text = _source.kernel_source(Launched(op, entry))
    assert old in text, f"{old!r} is not in the source"
    text = text.replace("struct Words;", f"struct Words;{STORE_EACH}").replace(old, new)
    return machine_code.kernels_of(text, 90)[entry]


@pytest.mark.parametrize(
    ("gates", "op", "old", "new", "name"),
    [
        ({"instructions", "no division"}, "silu", "0.25f * t * reciprocal(", "0.25f * t / (", "silu_{}"),
        ({"instructions", "no division"}, "gelu", "return t * reciprocal(", "return t / (", "gelu_{}_tanh"),
        (
            {"instructions"},
            "gelu",
            "float tail = exp2f(p);",
            "float tail = 0.5f * erfcf(a * 0.70710678f);",
            "gelu_{}_erf",
        ),
        ({"loads and stores of 16 bytes"}, "silu", "T, VECTOR<T>) ", "T, 4)  ", "silu_{}"),
        (
            {"blocks of a multiprocessor"},
            "silu",
            "    float v[VEC];",
            "__shared__ volatile float more[8192]; more[threadIdx.x] = 0.0f; float v[VEC];",
            "silu_{}",
        ),
    ],
)
def test_worse_elementwise_copies_are_seen(gates: set[str], op: str, old: str, new: str, name: str) -> None:
    kernel = changed(op, old, new, name.format("f16"))
    assert gates <= elementwise_violations(kernel, ELEMENTWISE[name])


#: Rows that 512 threads hold: columns 513 to 16384.
NORMS = ("layer_norm", "rms_norm")


def norm_violations(kernel: Kernel) -> set[str]:
    loop = max(kernel.loops, key=len)
    gates = {
        "two blocks": kernel.blocks_per_sm(512) >= 2,
        "loads and stores of 16 bytes": loop.count(r"LDG\.E\.128") >= 4 and loop.count(r"STG\.E\.128") >= 8,
        "no local memory": kernel.local == 0,
    }
    return {name for name, passed in gates.items() if not passed}


@pytest.mark.parametrize(
    ("op", "type_name", "architecture"),
    [
        *((op, kind, arch) for op in NORMS for kind in ("f16", "bf16") for arch in (80, 90)),
        ("layer_norm", "f32", 90),  # before: one block
        *(("rms_norm", "f32", arch) for arch in (75, 80, 90)),
    ],
)
def test_norms_of_16384_columns(op: str, type_name: str, architecture: int) -> None:
    assert norm_violations(machine_code.kernels(op, architecture)[f"{op}_{type_name}_32"]) == set()


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize(
    ("gate", "old", "new"),
    [
        ("two blocks", "KERNEL(name, threads, blocks)", "KERNEL(name, threads, 1)"),
        ("no local memory", "KERNEL(name, threads, blocks)", "KERNEL(name, threads, 3)"),
        (
            "loads and stores of 16 bytes",
            "store<VEC>(static_cast<T*>(p.out)",
            "store_each<VEC>(static_cast<T*>(p.out)",
        ),
    ],
)
def test_worse_norms_are_seen(op: str, gate: str, old: str, new: str) -> None:
    # of float32 rows the stores of x + residual alone are as many as the gate counts
    kind = "f16" if old.startswith("store") else "f32"
    assert gate in norm_violations(changed(op, old, new, f"{op}_{kind}_32"))
