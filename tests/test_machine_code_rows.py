"""Gates on the machine code of the elementwise ops and of the ops over rows."""

from __future__ import annotations

from functools import lru_cache

import pytest

from rbe_gpu.gpu import _source

from .host import machine_code
from .host.machine_code import Kernel

#: Instructions for a chunk of 8 half values, with what a bias would take. An H100 has some 280 issue slots for the 32
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


@lru_cache
def changed(op: str, old: str, new: str, entry: str) -> Kernel:
    """The kernel `entry` of a source with `old` exchanged."""
    text = _source.source(op)
    assert old in text, f"{old!r} is not in the source"
    return machine_code.kernels_of(text.replace(old, new), 90)[entry]


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
