"""Gates on the machine code of linear with int8 activations for sm_90, and broken copies that each gate refuses.

A gate is a function of a kernel that returns what is wrong with it, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from rbe_gpu.gpu import _source, linear
from rbe_gpu.gpu._launch import Launch

from .host import machine_code
from .host.machine_code import Kernel
from .host.mutants import replaced
from .host.virtual import VirtualWorkspace, dense_codes, grid_codes, matrix, virtual
from .test_machine_code_linear import in_registers, late_use

F16 = np.dtype(np.float16)
SIZE = 4096


def of_linear(tokens: int, codes: Any) -> tuple[Launch, ...]:
    weight: Any = matrix(SIZE, SIZE, transform="none", codes=codes)
    x, out = virtual((tokens, SIZE), F16), virtual((tokens, SIZE), F16)
    return linear.launches(
        x, weight, virtual((SIZE,), F16), None, None, out, VirtualWorkspace(), activation_bits=8
    )


#: By name and bits: 4096 x 4096, grid codes; dense ones in groups of 64.
LAUNCHES = {
    (launch.entry.removeprefix("linear_integers_") + ("_dense" if codes is dense_codes else ""), bits): launch
    for bits in (4, 8)
    for codes in (grid_codes, dense_codes)
    for tokens in (16, 2048)
    for launch in of_linear(tokens, codes(SIZE, SIZE, bits))
    if launch.op == "linear_integers"
}


@lru_cache
def kernel(name: str, bits: int, broken: tuple[str, str] | None = None, architecture: int = 90) -> Kernel:
    """The kernel for 4096 x 4096; `broken`: with a piece of its source replaced."""
    launch = LAUNCHES[name, bits]
    text = _source.kernel_source(launch.kernel)
    text = replaced(text, *broken) if broken else text
    return machine_code.kernels_of(text, architecture)[launch.entry]


# --- gates --------------------------------------------------------------------------------------------


def matrix_instructions(count: int, per: float) -> Callable[[Kernel], str]:
    """`count` IMMA of 16 x 8 x 32 in the innermost loop, and at most `per` instructions each."""

    def gate(k: Kernel) -> str:
        loop = k.innermost("IMMA")
        matrix = loop.count("IMMA")
        shapes = {i.opcode for i in loop.of("IMMA")}
        if matrix != count or not all("16832" in shape and "S8.S8" in shape for shape in shapes):
            return f"{matrix} IMMA, {shapes}"
        return f"{len(loop)} instructions for {count} IMMA" if len(loop) > per * count else ""

    return gate


def late_words(k: Kernel) -> str:
    """Codes of the next tile are first read when all products of this one are under way."""
    return late_use(k, "IMMA")


def unpacking(k: Kernel) -> str:
    """64 codes of a thread become int8: 16 words, 6 instructions each."""
    region = k.region("unpack")
    return f"{len(region)} instructions unpack 64 codes" if len(region) > 16 * 6 + 8 else ""


def wide_loads(k: Kernel) -> str:
    """Codes are loaded in 16 bytes, z by cp.async; nothing else is loaded in the loop."""
    narrow = [i for i in k.innermost("IMMA").of("LDG") if i.bits != 128]
    return f"{narrow[0]}" if narrow else ""


def no_conversions(k: Kernel) -> str:
    """The sums of groups are floats as they are."""
    return next((str(i) for i in k.innermost("IMMA").of("I2FP?")), "")


def two_blocks(k: Kernel) -> str:
    launch = next(x for x in LAUNCHES.values() if x.entry == k.name)
    blocks = k.blocks_per_sm(launch.block[0], launch.shared)
    return f"{blocks} blocks a multiprocessor, {k.usage}" if blocks < 2 else ""


_LOAD = "          loader.load(codes, first_n, rows, k + BK);\n"
_EARLY = (_LOAD, _LOAD + "          loader.store(codes, k + BK, next + A);\n")
_NARROW = ("  if (bits % 4 == 0) {\n", "  if (bits % 16 == 0) {\n")
_SLOW = (
    "    return (odd ? 2 * u + 0x01010101u * (129 - 2 * half) : u + 0x01010101u * (128 - half)) ^ 0x80808080u;\n",
    "    u32 r = 0;\n"
    "    for (int i = 0; i < 4; ++i) r |= (((u >> 8 * i & 0xffu) - half) & 0xffu) << 8 * i;\n"
    "    return r;\n",
)
_TWICE = ("  mma_16x8x32_s8(c, a, b, c);\n", "  mma_16x8x32_s8(c, a, b, c);\n  mma_16x8x32_s8(c, a, b, c);\n")
_CONVERTED = (
    "__uint_as_float(sums[m][n][i]) - (wide(c) ? UNITS : HALVES);",
    "static_cast<float>(sums[m][n][i]) - (wide(c) ? UNITS : HALVES);",
)
_BOUNDS = "KERNEL(linear_integers_{}, 256, RESIDENT)"


def bounds(name: str, blocks: str) -> tuple[str, str]:
    declared = _BOUNDS.format(name)
    return declared, declared.replace("RESIDENT", blocks)


#: (kernel, bits, gate, what a broken copy has instead)
GATES: list[tuple[str, int, str, Callable[[Kernel], str], tuple[str, str]]] = [
    ("tiles", 4, "matrix_instructions", matrix_instructions(64, 5), _TWICE),
    ("tiles", 4, "instructions", matrix_instructions(64, 5), _SLOW),
    ("tiles", 4, "late_words", late_words, _EARLY),
    ("tiles", 4, "unpacking", unpacking, _SLOW),
    ("tiles", 4, "wide_loads", wide_loads, _NARROW),
    ("tiles", 4, "two_blocks", two_blocks, bounds("tiles", "1")),
    ("tiles", 4, "in_registers", in_registers, bounds("tiles", "RESIDENT + 1")),
    ("few", 4, "matrix_instructions", matrix_instructions(8, 26), _TWICE),
    ("few", 4, "late_words", late_words, _EARLY),
    ("few", 4, "wide_loads", wide_loads, _NARROW),
    # a loop of two steps of 32 columns: 131 instructions
    ("groups_dense", 4, "instructions", matrix_instructions(16, 8.5), _CONVERTED),
    ("groups_dense", 4, "no_conversions", no_conversions, _CONVERTED),
    ("groups_dense", 4, "two_blocks", two_blocks, bounds("groups", "1")),
    ("groups_dense", 4, "in_registers", in_registers, bounds("groups", "RESIDENT + 1")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "bits", "gate", "broken"),
    [(name, bits, gate, broken) for name, bits, _, gate, broken in GATES],
    ids=[f"{name}-{bits}-{label}" for name, bits, label, *_ in GATES],
)
def test_gate(name: str, bits: int, gate: Callable[[Kernel], str], broken: tuple[str, str]) -> None:
    """The kernel passes, and a copy with the fault that the gate is for does not."""
    assert gate(kernel(name, bits)) == ""
    assert gate(kernel(name, bits, broken))


@pytest.mark.parametrize(("name", "bits"), LAUNCHES)
def test_nothing_is_in_local_memory(name: str, bits: int) -> None:
    assert in_registers(kernel(name, bits)) == ""


@pytest.mark.parametrize(("architecture", "count"), [(75, 256), (80, 64)])
def test_older_tensor_cores_multiply_integers(architecture: int, count: int) -> None:
    """sm_75 has products of 8 x 8 x 16, four in the place of one."""
    assert kernel("tiles", 4, None, architecture).innermost("IMMA").count("IMMA") == count
