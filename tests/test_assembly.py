"""The machine code of the hot loops: packed FMAs, at full width, for AVX2, AVX-512 and NEON, products of bytes for
VNNI.

Each target gets a process of its own, in which kernels are compiled as on such a machine: `simd` is told the
target's features, Numba makes LLVM IR, and LLVM makes the assembly for the target's CPU. The explicit vectors of the
kernels are in the IR; the machine at hand only decides about loops that LLVM vectorises by itself.

A kernel's hot loop is the innermost one with the most packed FMAs. It must hold as many as the table says, and no
call, no single FMA and, but for what `KERNELS` excepts, no access to the stack: a sum or a constant that was spilled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Target:
    """A kind of machine: how LLVM calls it, and what its packed and single FMAs and its stack look like."""

    triple: str
    cpu: str
    features: str
    packed: str
    single: str
    stack: str


_V3 = "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
_V4 = f"{_V3},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"
TARGETS = {
    "x86-64-v3": Target(
        "x86_64-unknown-linux-gnu",
        "x86-64-v3",
        _V3,
        packed=r"vfn?m(?:add|sub)\d+ps\s.*%ymm",
        single=r"vfn?m(?:add|sub)\d+ss\s",
        stack=r"%[yz]mm\d+, .*\(%r[sb]p\)|\(%r[sb]p\), %[yz]mm",
    ),
    "x86-64-v4": Target(
        "x86_64-unknown-linux-gnu",
        "x86-64-v4",
        _V4,
        packed=r"vfn?m(?:add|sub)\d+ps\s.*%zmm",
        single=r"vfn?m(?:add|sub)\d+ss\s",
        stack=r"%[yz]mm\d+, .*\(%r[sb]p\)|\(%r[sb]p\), %[yz]mm",
    ),
    "aarch64": Target(
        "aarch64-unknown-linux-gnu",
        "generic",
        "+neon",
        packed=r"fml[as]\s+v\d+\.4s",
        single=r"fn?m(?:add|sub)\s+s\d+",
        stack=r"(?:ldr|str|ldp|stp)\s+q\d+.*\[(?:sp|x29)",
    ),
    # what counts here are sums of four products of bytes
    "avx512-vnni": Target(
        "x86_64-unknown-linux-gnu",
        "icelake-server",
        f"{_V4},+avx512vnni",
        packed=r"vpdpbusd\s.*%zmm",
        single=r"vpdpbusd\s.*%[xy]mm",
        stack=r"%[yz]mm\d+, .*\(%r[sb]p\)|\(%r[sb]p\), %[yz]mm",
    ),
}


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes
    ----------
    place : "module.function" in cpu_fallback
    signature : one word per argument: f1, f2 (float32 arrays), l1, w1, u1 (int64, int32, uint8 arrays),
        f (float64), s (float32), i, b, none
    least : packed FMAs in the hot loop, in the order of `TARGETS`; 0, or nothing, where the kernel is not used
    spills : targets on which the hot loop may go to the stack: LLVM unrolls loops twofold, and the constants of two
        polynomials are more than 16 registers of 8 floats or 32 of 4 hold beside their vectors
    """

    place: str
    signature: str
    least: tuple[int, ...]
    spills: str = ""

    def least_on(self, target: str) -> int:
        return dict(zip(TARGETS, self.least, strict=False)).get(target, 0)


KERNELS = (
    # four vectors of tokens for an entry
    Kernel("product.sparse_rows", "i l1 i i w1 i f1 f1 i i b f1 i i", (8, 4, 16)),
    # 4 rows x 4 vectors where there are 32 registers of 16 floats, else 4 rows x 1
    Kernel("product.dense_rows", "i i f1 i i f1 i i b f1 i i", (8, 16, 16)),
    # one token: 4 vectors, 32 codes, or entries spread over 32 columns at a time
    Kernel("vector_product._float_row", "f1 i i f1 i", (8, 4, 16)),
    Kernel("vector_product._int_row", "u1 i i f1 i i i f1 i f1 i", (4, 2, 8)),
    Kernel("vector_product._bitmap_row", "f1 i u1 i i f1 i", (0, 2, 0)),
    # 4 rows x 3 digits x 2 halves of bytes; and what other machines have of it compiles
    Kernel("fixed_point.digit_rows", "i u1 i f1 i i u1 s f1 i", (0, 0, 0, 24)),
    # 4 rows x 2 halves of a vector; 4 rows x 4 vectors; 4 rows x 4 quarters
    Kernel("attention._product", "i i b i f1 i i i i i i i", (8, 16, 16)),
    # exp: 8 FMAs a vector, of 2, 1 and 4 registers
    Kernel("attention._softmax_step", "f1 i i i i i i i b b i i i", (16, 8, 32), spills="x86-64-v3 aarch64"),
    Kernel("softmax._rows", "f2 f none none f2 i i", (16, 8, 32), spills="x86-64-v3 aarch64"),
    # one FMA a vector for the squares, two for the result
    Kernel("layer_norm._rows", "f2 f1 f1 f none f2 none i i", (4, 2, 8)),
    Kernel("layer_norm._rows", "f2 f1 f1 f f2 f2 f2 i i", (4, 2, 8), spills="aarch64"),
    Kernel("rms_norm._rows", "f2 f1 f none f2 none i i", (4, 2, 8)),
    # 14 FMAs a vector; exp and a division
    Kernel("gelu._span", "f2 none b f2 i i", (28, 14, 56), spills="x86-64-v3 aarch64"),
    Kernel("silu._span", "f2 none f2 i i", (16, 8, 32), spills="x86-64-v3 aarch64"),
    Kernel("swiglu._span", "f2 none f2 i i", (16, 8, 32), spills="x86-64-v3 aarch64"),
)


_JUMP = r"\s+(?:j\w+|b(?:\.\w+)?|cbn?z|tbn?z)\s.*?(\.LBB\d+_\d+)$"


def loops(assembly: str) -> Iterator[str]:
    """The innermost loops: from a label to a jump back to it, with no other such pair inside."""
    lines = assembly.splitlines()
    labels: dict[str, int] = {}
    pairs = []
    for at, line in enumerate(lines):
        if found := re.match(r"(\.LBB\d+_\d+):", line):
            labels[found[1]] = at
        elif (found := re.match(_JUMP, line)) and found[1] in labels:
            pairs.append((labels[found[1]], at))
    for start, stop in pairs:
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in pairs):
            yield "\n".join(lines[start + 1 : stop + 1])


def hot_loop(assembly: str, target: Target) -> str:
    """The innermost loop with the most packed FMAs."""
    return max(loops(assembly), key=lambda loop: len(re.findall(target.packed, loop)), default="")


# --- in a process of its own ------------------------------------------------------------------------------


def _compile(name: str) -> None:
    """Print {kernel: assembly} of one target as JSON."""
    import llvmlite.binding as llvm
    from numba import types
    from rbe_gpu.cpu_fallback import simd

    target = TARGETS[name]
    simd._target = lambda context: (target.triple, target.features)
    words: dict[str, Any] = {
        "f1": types.Array(types.float32, 1, "C"),
        "f2": types.Array(types.float32, 2, "C"),
        "l1": types.Array(types.int64, 1, "C"),
        "w1": types.Array(types.int32, 1, "C"),
        "u1": types.Array(types.uint8, 1, "C"),
        "f": types.float64,
        "s": types.float32,
        "i": types.int64,
        "b": types.boolean,
        "none": types.none,
    }
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, jit=True
    )
    found = {}
    for kernel in KERNELS:
        if name == "avx512-vnni" and not kernel.least_on(name):
            continue  # the same there as on x86-64-v4
        module, function = kernel.place.split(".")
        dispatcher = getattr(import_module(f"rbe_gpu.cpu_fallback.{module}"), function)
        signature = tuple(words[word] for word in kernel.signature.split())
        dispatcher.compile(signature)
        source = dispatcher.inspect_llvm(signature)
        source = re.sub(r'^target (datalayout|triple) = ".*"$', "", source, flags=re.MULTILINE)
        # the reference counters of arrays hold what LLVM has made of their atomics for the machine at hand
        counter = r"define [^\n]*@(NRT_(?:in|de)cref)\([^\n]*\{\n.*?\n\}"
        source = re.sub(counter, r"declare void @\1(ptr)", source, flags=re.DOTALL)
        code = llvm.parse_assembly(source)
        code.triple, code.data_layout = target.triple, str(machine.target_data)
        found[f"{kernel.place} {kernel.signature}"] = machine.emit_assembly(code)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _compile(sys.argv[1])


# --- the tests --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Target -> kernel -> assembly; the targets are compiled side by side."""
    cache = tmp_path_factory.mktemp(
        "numba"
    )  # code for other machines must not get into the cache of this one
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "NUMBA_NUM_THREADS": "1"}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.test_assembly", name],
            cwd=Path(__file__).parents[1],
            env={**env, "NUMBA_CACHE_DIR": str(cache / name)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in TARGETS
    }
    done = {name: process.communicate() for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0, f"{name}: {done[name][1]}"
    return {name: json.loads(out) for name, (out, _) in done.items()}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [(n, k) for n in TARGETS for k in KERNELS if k.least_on(n)],
    ids=lambda v: v if isinstance(v, str) else f"{v.place}-{v.signature.replace(' ', '_')}",
)
def test_packed_fma(compiled: dict[str, dict[str, str]], name: str, kernel: Kernel) -> None:
    target = TARGETS[name]
    loop = hot_loop(compiled[name][f"{kernel.place} {kernel.signature}"], target)
    least = kernel.least_on(name)
    packed = len(re.findall(target.packed, loop))
    assert packed >= least, f"{packed} packed FMAs in the hot loop, not {least}:\n{loop}"
    assert not re.search(target.single, loop), loop
    assert not re.search(r"\bcall\w*\s|\bbl\s", loop), loop
    if name not in kernel.spills:
        assert not re.search(target.stack, loop), loop


def test_loops_are_found() -> None:
    assembly = (
        ".LBB0_1:\n\tvaddps\n.LBB0_2:\n\tvfmadd231ps %zmm0, %zmm1, %zmm2\n\tjne\t.LBB0_2\n\tjne\t.LBB0_1\n"
    )
    assert list(loops(assembly)) == ["\tvfmadd231ps %zmm0, %zmm1, %zmm2\n\tjne\t.LBB0_2"]
