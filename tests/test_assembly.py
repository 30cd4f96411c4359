"""The machine code of the hot loops: packed FMAs, or what a loop has in their place, at full width for AVX2, AVX-512
and NEON; byte dot products for VNNI.

Each target gets a process of its own, in which Numba compiles the kernels for that instruction set
(`isa.select(name, compile_only=True)`) and nothing is executed: every target compiles on every host.

A kernel's hot loop is the innermost one with the most packed instructions of its kind. It must hold as many as the
table says, and no call, no single instruction of that kind and, but for what `KERNELS` excepts, no access to the
stack: a sum or a constant that was spilled.
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
from types import FunctionType
from typing import Any

import pytest
from rbe_gpu.cpu_fallback import isa


@dataclass(frozen=True)
class Stack:
    """Accesses to the stack: by the stack pointer, or by the frame pointer.

    A loop that changes the frame pointer's register uses it as any other.
    """

    access: str
    pointer: str
    frame: str
    changed_frame: str

    def search(self, loop: str) -> re.Match[str] | None:
        pointers = (
            self.pointer
            if re.search(self.changed_frame, loop, re.MULTILINE)
            else f"(?:{self.pointer}|{self.frame})"
        )
        return re.search(self.access.replace("POINTER", pointers), loop)


@dataclass(frozen=True)
class Target:
    """How packed and single instructions of a kind, and accesses to the stack, look in an instruction set's code."""

    packed: dict[str, str]
    single: dict[str, str]
    stack: Stack


_X86 = {"fma": r"vfn?m(?:add|sub)\d+", "add": "vadd", "div": "vdiv"}
_X86_SINGLE = {kind: rf"{name}ss\s" for kind, name in _X86.items()}
_X86_STACK = Stack(r"%[yz]mm\d+, .*\(POINTER\)|\(POINTER\), %[yz]mm", "%rsp", "%rbp", r", %rbp$")
_NEON_STACK = Stack(r"(?:ldr|str|ldp|stp)\s+q\d+.*\[POINTER", "sp", "x29", r"^\s+(?:add|sub|mov|ldr)\s+x29,")
_FADD, _FADD_S = r"fadd\s+v\d+\.4s", r"fadd\s+s\d+"
_WORDS = r"vpmuludq\s.*"  # products of words, 64 bits each


def _x86(register: str) -> Target:
    packed = {kind: rf"{name}ps\s.*%{register}" for kind, name in _X86.items()}
    packed |= {"add of 8": r"vaddps\s.*%ymm", "words": rf"{_WORDS}%{register}"}
    return Target(
        {
            **packed,
            "pairs": rf"vpmaddubsw\s.*%{register}",
        },
        {
            **_X86_SINGLE,
            "add of 8": _X86_SINGLE["add"],
            "words": rf"{_WORDS}%xmm",
            "pairs": r"vpmaddubsw\s.*%xmm",
        },
        _X86_STACK,
    )


#: by the names of `isa.ISAS`
TARGETS = {
    "avx2": _x86("ymm"),
    "avx512": _x86("zmm"),
    "neon": Target(
        {"fma": r"fml[as]\s+v\d+\.4s", "add": _FADD, "add of 8": _FADD, "div": r"fdiv\s+v\d+\.4s"},
        {"fma": r"fn?m(?:add|sub)\s+s\d+", "add": _FADD_S, "add of 8": _FADD_S, "div": r"fdiv\s+s\d+"},
        _NEON_STACK,
    ),
    # sums of four byte products
    "avx512-vnni": Target({"bytes": r"vpdpbusd\s.*%zmm"}, {"bytes": r"vpdpbusd\s.*%[xy]mm"}, _X86_STACK),
    "neon-dotprod": Target({"bytes": r"sdot\s+v\d+\.4s"}, {"bytes": r"sdot\s+v\d+\.2s"}, _NEON_STACK),
}


#: the arguments of `int8_block`, behind its literals
_INT8_BLOCK = "{} i u1 i i u1 i i w1 i i w1 w1 i"


#: of `grid_sums` and `dense_sums` for codes of 5 bits, behind how many tokens
_GRID_SUMS = "{} 5 u1 i i i u1 i i i w1 i"
_DENSE_SUMS = _GRID_SUMS + " i h1 i"
#: of `digit_sums`, for codes of so many bits; of those that the kernel chooses from, a jump table hides the loops
_DIGIT_SUMS = "{} u1 i i i u1 i f1 i i"


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes
    ----------
    place : "module.function" in cpu_fallback
    signature : one word per argument: f1, f2, f4 (float32 arrays), l1, w1, h1, u1 (int64, int32, uint16, uint8), f
        (float64), s (float32), i, u, U (int64, uint32, uint64), b, none, or a number for itself
    least : packed instructions in the hot loop, in the order of `TARGETS`; 0, or nothing: not for that target
    kind : of these instructions, a key of `Target.packed`
    spills : targets on which the hot loop may go to the stack: LLVM unrolls loops twofold, and the constants of two
        polynomials are more than 16 registers of 8 floats or 32 of 4 hold beside their vectors
    by_address : the 1-D arrays are made from addresses, as the kernel's callers make them; arrays that belong to
        somebody else bring reference counts, which Numba does not always remove from the loop on NEON
    """

    place: str
    signature: str
    least: tuple[int, ...]
    kind: str = "fma"
    spills: str = ""
    by_address: bool = False

    def least_on(self, target: str) -> int:
        return dict(zip(TARGETS, self.least, strict=False)).get(target, 0)

    @property
    def name(self) -> str:
        return f"{self.place} {self.signature}"


#: by op
KERNELS: dict[str, tuple[Kernel, ...]] = {
    # 4 rows x 4 vectors where there are 32 registers of 16 floats, else 4 rows x 1
    "decode": (
        Kernel("unpack.multiply_4x16", "f1 i i f1 i i i f1 i i", (8, 4, 16), by_address=True),
        Kernel(
            "unpack.multiply_4x64",
            "f1 i i f1 i i i f1 i i",
            (32, 16, 64),
            spills="avx2 neon",
            by_address=True,
        ),
    ),
    "linear": (
        # four vectors of tokens for an entry
        Kernel("matmul_rows.sparse_rows", "i l1 i i w1 i f1 f1 i i b f1 i i", (8, 4, 16), by_address=True),
        # 4 rows x 4 vectors where there are 32 registers of 16 floats, else 4 rows x 1
        Kernel("matmul_rows.dense_rows", "i i f1 i i f1 i i b f1 i i", (8, 16, 16), by_address=True),
        # one token: 4 vectors, 32 codes, or entries spread over 32 columns at a time
        Kernel("matvec._float_row", "f1 i i f1 i", (8, 4, 16), by_address=True),
        Kernel("matvec._int_row", "u1 i i f1 i i i f1 i f1 i", (4, 2, 8), by_address=True),
        Kernel("matvec._bitmap_row", "f1 i u1 i i f1 i", (0, 2, 0), by_address=True),
        # 4 rows x 3 digits x 2 halves of bytes with 4-bit codes
        Kernel("int8_dot.digit_sums", _DIGIT_SUMS.format(4), (0, 0, 0, 24), "bytes", by_address=True),
        Kernel("int8_dot.digit_sums", _DIGIT_SUMS.format(5), (0, 0, 0, 12), "bytes", by_address=True),
        # int8 activations: a row x 64 tokens, 4 products before they are widened; eight sums of int16 and of int32
        Kernel(
            "int8_simd.int8_block", _INT8_BLOCK.format("1 4 5"), (32, 16), "pairs", "avx2", by_address=True
        ),
        # 4 rows x 64 tokens, or x 16, in 32 registers
        Kernel("int8_simd.int8_block", _INT8_BLOCK.format("4 4 5"), (0, 0, 0, 16), "bytes", by_address=True),
        Kernel(
            "int8_simd.int8_block", _INT8_BLOCK.format("4 1 5"), (0, 0, 0, 0, 16), "bytes", by_address=True
        ),
        # 64 columns of four rows and a token, or of a row and four tokens, in registers of 32 or 64 bytes
        Kernel("int8_rows.grid_sums", _GRID_SUMS.format(1), (8, 4), "pairs", by_address=True),
        Kernel("int8_rows.grid_sums", _GRID_SUMS.format(4), (8, 4), "pairs", by_address=True),
        Kernel("int8_rows.grid_sums", _GRID_SUMS.format(1), (0, 0, 0, 4, 16), "bytes", by_address=True),
        Kernel("int8_rows.dense_sums", _DENSE_SUMS.format(1), (8, 4), "pairs", by_address=True),
        Kernel("int8_rows.dense_sums", _DENSE_SUMS.format(1), (0, 0, 0, 4, 16), "bytes", by_address=True),
    ),
    "attention": (
        # 4 rows x 2 halves of a vector; 4 rows x 4 vectors; 4 rows x 4 quarters
        Kernel("attention._matmul", "i i b i f1 i i i i i i i", (8, 16, 16)),
        # exp: 8 FMAs a vector, of 2, 1 and 4 registers
        Kernel("attention._softmax_step", "f1 i i i i i i i b b i i i", (16, 8, 32), spills="avx2 neon"),
    ),
    "softmax": (Kernel("softmax._rows", "f2 f none none f2 i i", (16, 8, 32), spills="avx2 neon"),),
    # one FMA a vector for the squares, two for the result
    "layer_norm": (
        Kernel("layer_norm._rows", "f2 f1 f1 f none f2 none i i", (4, 2, 8)),
        Kernel("layer_norm._rows", "f2 f1 f1 f f2 f2 f2 i i", (4, 2, 8), spills="neon"),
    ),
    "rms_norm": (Kernel("rms_norm._rows", "f2 f1 f none f2 none i i", (4, 2, 8)),),
    # 8 lanes, whatever the width of the registers; unrolled four times on x86, the result
    "l2_normalize": (
        Kernel("l2_normalize._sum_of_squares", "f1 i i", (1, 1, 2), "add of 8"),
        Kernel("l2_normalize._rows", "f1 i f f1 i i", (8, 4, 4), "div"),
    ),
    # four vectors of columns, of 2, 1 and 4 registers
    "mean_pool": (Kernel("mean_pool._units", "f1 i l1 l1 i f1 i i", (8, 4, 16), "add"),),
    # 14 FMAs a vector; exp and a division
    "gelu": (Kernel("gelu._span", "f2 none b f2 i i", (28, 14, 56), spills="avx2 neon"),),
    "silu": (Kernel("silu._span", "f2 none f2 i i", (16, 8, 32), spills="avx2 neon"),),
    "swiglu": (Kernel("swiglu._span", "f2 none f2 i i", (16, 8, 32), spills="avx2 neon"),),
    # two FMAs for two vectors of one head; an unrolled loop has more
    "rope": (
        Kernel("rope._halves", "f4 f2 f2 l1 b f4 i i", (4, 2, 8)),
        Kernel("rope._pairs", "f4 f2 f2 l1 b f4 i i", (4, 2, 8)),
    ),
    # two products a round of Philox, of which the last needs one less; NEON multiplies them one by one
    "dropout": (Kernel("dropout._span", "f1 u s u u U none f1 i i", (19, 19, 0), "words", spills="avx2"),),
    "add": (Kernel("add._span", "f1 f1 f1 i i", (2, 1, 4), "add"),),
}
#: ops without a loop of arithmetic of their own, and why
WITHOUT = {"embedding": "copies rows, and decodes those of compressed weights with the kernels of decode"}


_LABEL = re.compile(r"(\.LBB\d+_\d+|[\w.$@]+):")
_JUMP = re.compile(r"\s+(?:j\w+|b(?:\.\w+)?|cbn?z|tbn?z)\s.*?(\.LBB\d+_\d+)$")
_LEAVES = re.compile(r"\s+(?:jmp|b|br|retq?|ud2|brk)(?:\s|$)")


@dataclass
class Block:
    """Instructions from a label or a jump to the next one."""

    lines: list[str]
    successors: set[str]


def _functions(assembly: str) -> Iterator[dict[str, Block]]:
    """The control flow graph of every function: label -> block, in the order of the text."""
    blocks: dict[str, Block] = {}
    block = None
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            name = label[1]
            if not name.startswith(".LBB"):
                if blocks:
                    yield blocks
                blocks, block = {}, None
            elif block is not None and not (block.lines and _LEAVES.match(block.lines[-1])):
                block.successors.add(name)  # falls through
            block = blocks[name] = Block([], set())
        elif block is not None and line.startswith("\t") and not line.startswith("\t."):
            block.lines.append(line)
            if jump := _JUMP.match(line):
                block.successors.add(jump[1])
                rest = f"{len(blocks)}"
                if not _LEAVES.match(line):
                    block.successors.add(rest)
                block = blocks[rest] = Block([], set())
    if blocks:
        yield blocks


def loops(assembly: str) -> Iterator[str]:
    """The instructions of every innermost loop: natural loops of the control flow graph without another inside."""
    for blocks in _functions(assembly):
        entry = next(iter(blocks))
        reached, todo = set(), [entry]
        while todo:
            if (name := todo.pop()) in blocks and name not in reached:
                reached.add(name)
                todo += blocks[name].successors
        blocks = {name: block for name, block in blocks.items() if name in reached}
        predecessors: dict[str, set[str]] = {name: set() for name in blocks}
        for name, block in blocks.items():
            for successor in block.successors & blocks.keys():
                predecessors[successor].add(name)
        dominators = {name: set(blocks) for name in blocks}
        dominators[entry] = {entry}
        changed = True
        while changed:
            changed = False
            for name in blocks:
                if name == entry:
                    continue
                new = set.intersection(*(dominators[p] for p in predecessors[name])) | {name}
                changed |= new != dominators[name]
                dominators[name] = new
        bodies: dict[str, set[str]] = {}
        for name in blocks:
            for head in blocks[name].successors & dominators[name]:
                body = bodies.setdefault(head, {head})
                todo = [name]
                while todo:
                    if (member := todo.pop()) not in body:
                        body.add(member)
                        todo += predecessors[member]
        for head, body in bodies.items():
            if not any(other in body and other != head for other in bodies):
                yield "\n".join(line for name in blocks if name in body for line in blocks[name].lines)


def hot_loop(assembly: str, packed: str) -> str:
    """The innermost loop with the most instructions that match the pattern `packed`."""
    return max(loops(assembly), key=lambda loop: len(re.findall(packed, loop)), default="")


# --- in a process of its own ------------------------------------------------------------------------------


def _compile(name: str) -> None:
    """Print {kernel: assembly} of one target as JSON."""
    isa.select(name, compile_only=True)
    from numba import types

    words: dict[str, Any] = {
        "f1": types.Array(types.float32, 1, "C"),
        "f2": types.Array(types.float32, 2, "C"),
        "f4": types.Array(types.float32, 4, "C"),
        "l1": types.Array(types.int64, 1, "C"),
        "w1": types.Array(types.int32, 1, "C"),
        "h1": types.Array(types.uint16, 1, "C"),
        "u1": types.Array(types.uint8, 1, "C"),
        "f": types.float64,
        "s": types.float32,
        "i": types.int64,
        "u": types.uint32,
        "U": types.uint64,
        "b": types.boolean,
        "none": types.none,
    }
    assembly = {}
    for kernel in (kernel for kernels in KERNELS.values() for kernel in kernels):
        if name in ("avx512-vnni", "neon-dotprod") and not kernel.least_on(name):
            continue  # the same there as without the extension
        module, function = kernel.place.split(".")
        inlined = _inlined(import_module(f"rbe_gpu.cpu_fallback.{module}"), function)
        dispatcher, signature = _called(inlined, kernel.signature.split(), words, kernel.by_address)
        dispatcher.compile(signature)
        assembly[kernel.name] = dispatcher.inspect_asm(signature)
    json.dump(assembly, sys.stdout)


def _inlined(module: Any, name: str) -> Any:
    """The kernel of that name, which is compiled or an intrinsic; or what `in_parts` has compiled of a function."""
    function = getattr(module, name)
    if not isinstance(function, FunctionType):
        return function
    compiled = (f for f in vars(module).values() if hasattr(f, "py_func"))
    kernels = (f.py_func.__globals__.get("_kernel") for f in compiled)
    return next(kernel for kernel in kernels if kernel is not None and kernel.py_func is function)


def _called(
    kernel: Any, signature: list[str], words: dict[str, Any], by_address: bool
) -> tuple[Any, tuple[Any, ...]]:
    """A compiled function that calls the kernel, and its signature; by_address : int64 instead of 1-D arrays."""
    import numba
    from rbe_gpu.cpu_fallback import arrays
    from rbe_gpu.cpu_fallback._jit import FASTMATH

    makers = {"f1": "floats_at", "l1": "longs_at", "w1": "ints_at", "h1": "halves_at", "u1": "bytes_at"}
    makers = makers if by_address else {}
    names = [f"a{i}" for i, w in enumerate(signature) if not w.isdigit()]
    places = iter(names)
    arguments = [
        w if w.isdigit() else f"{makers[w]}({next(places)})" if w in makers else next(places)
        for w in signature
    ]
    scope = {"kernel": kernel, **{maker: getattr(arrays, maker) for maker in makers.values()}}
    exec(f"def called({', '.join(names)}):\n    return kernel({', '.join(arguments)})", scope)
    compiled = numba.njit(nogil=True, error_model="numpy", fastmath=set(FASTMATH))(scope["called"])
    return compiled, tuple(words["i" if w in makers else w] for w in signature if not w.isdigit())


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
    [(n, k) for n in TARGETS for kernels in KERNELS.values() for k in kernels if k.least_on(n)],
    ids=lambda v: v if isinstance(v, str) else f"{v.place}-{v.signature.replace(' ', '_')}",
)
def test_hot_loop(compiled: dict[str, dict[str, str]], name: str, kernel: Kernel) -> None:
    target, least = TARGETS[name], kernel.least_on(name)
    pattern = target.packed[kernel.kind]
    loop = hot_loop(compiled[name][kernel.name], pattern)
    packed = len(re.findall(pattern, loop))
    assert packed >= least, (
        f"{packed} packed instructions ({kernel.kind}) in the hot loop, not {least}:\n{loop}"
    )
    assert not re.search(target.single[kernel.kind], loop), loop
    assert not re.search(r"\bcall\w*\s|\bbl\s", loop), loop
    if name not in kernel.spills:
        assert not target.stack.search(loop), loop


def test_loops_are_found() -> None:
    assembly = "f:\n.LBB0_1:\n\tvaddps\n.LBB0_2:\n\tvfmadd231ps %zmm0, %zmm1, %zmm2\n\tjne\t.LBB0_2\n\tjne\t.LBB0_1\n"
    assert list(loops(assembly)) == ["\tvfmadd231ps %zmm0, %zmm1, %zmm2\n\tjne\t.LBB0_2"]


def test_a_loop_whose_blocks_stand_apart_is_found() -> None:
    """LLVM may place the end of an outer loop between the blocks of the inner one."""
    assembly = (
        "f:\n\tmov\n.LBB0_1:\n\tldr\n\tb\t.LBB0_3\n.LBB0_2:\n\tfmla\n\tb.eq\t.LBB0_1\n"
        ".LBB0_3:\n\tld1\n\tcbz\tx1, .LBB0_4\n\tb\t.LBB0_2\n.LBB0_4:\n\tret\n"
    )
    assert list(loops(assembly)) == ["\tfmla\n\tb.eq\t.LBB0_1\n\tld1\n\tcbz\tx1, .LBB0_4\n\tb\t.LBB0_2"]
