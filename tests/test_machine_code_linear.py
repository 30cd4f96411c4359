"""Gates on the machine code of linear and decode for sm_90, and broken copies that each gate refuses.

A gate is a function of a kernel that returns what is wrong with it, or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from rbe_gpu.gpu import _source, decode, linear
from rbe_gpu.gpu._launch import Launch

from .host import machine_code
from .host.machine_code import Kernel
from .host.mutants import replaced
from .host.virtual import VirtualWorkspace, matrix, virtual

F16 = np.dtype(np.float16)
SIZE = 4096


def of_linear(tokens: int) -> tuple[Launch, ...]:
    """4-bit codes in groups of 64, blocks of 64 under the DCT, float16."""
    weight: Any = matrix(SIZE, SIZE)
    x, out = virtual((tokens, SIZE), F16), virtual((tokens, SIZE), F16)
    return linear.launches(x, weight, virtual((SIZE,), F16), None, None, out, VirtualWorkspace())


def of_decode(transform: str) -> tuple[Launch, ...]:
    return decode.launches(
        matrix(SIZE, SIZE, transform=transform), virtual((SIZE, SIZE), F16), VirtualWorkspace()
    )


LAUNCHES = {
    launch.entry: launch
    for launches in (*map(of_linear, (1, 3, 16, 64, 512, 2048)), of_decode("dct"), of_decode("none"))
    for launch in launches
}


#: In the place of a replaced piece of source: the kernel that takes its configuration as parameters.
UNSPECIALISED = ("", "")


@lru_cache
def kernel(entry: str, broken: tuple[str, str] | None = None) -> Kernel:
    """The kernel for 4096 x 4096; `broken`: with a piece of its source replaced."""
    configured = LAUNCHES[entry].kernel
    if broken == UNSPECIALISED:
        text = _source.kernel_source(replace(configured, constants=()))
    else:
        text = _source.kernel_source(configured)
        text = replaced(text, *broken) if broken else text
    return machine_code.kernels_of(text, 90)[entry]


# --- gates --------------------------------------------------------------------------------------------


def late_use(k: Kernel, product: str = "HMMA") -> str:
    """Codes and scales of the next tile are first read when all products of this one are under way."""
    loop = k.innermost(product)
    loads = loop.of("LDG")
    if len(loads) < 2:
        return f"{len(loads)} loads in the loop"
    for load in loads:
        distance = loop.first_use(load)
        products = 0 if distance is None else loop.between(load, distance, product)
        if products < loop.count(product):
            return f"{load} is read after {products} of {loop.count(product)} products"
    return ""


def unpacking(k: Kernel) -> str:
    """32 codes: a PRMT, an HADD2 and an HFMA2 for two, and some 8 instructions more for 8."""
    region = k.region("unpack")
    packed = region.count("PRMT|HADD2|HFMA2")
    if packed > 3 * 16 + 2:
        return f"{packed} instructions unpack 32 codes"
    return f"{len(region)} instructions for 32 codes" if len(region) > 100 else ""


def wide_loads(k: Kernel) -> str:
    """Codes are loaded in 16 bytes, scales in 2."""
    narrow = [i for i in k.innermost("HMMA").of("LDG") if i.bits not in (128, 16)]
    return f"{narrow[0]}" if narrow else ""


def in_registers(k: Kernel) -> str:
    if k.local or k.usage.spills or k.usage.stack:
        return f"{k.local} accesses of local memory, {k.usage}"
    return ""


def few_moves(k: Kernel) -> str:
    loop = k.innermost("HMMA")
    return f"{loop.moves} of {len(loop)}" if loop.moves > 8 else ""


def all_rows_in_flight(k: Kernel) -> str:
    """The codes of a warp's four rows are asked for before the first of them is unpacked."""
    before = k.instructions[: k.instructions.index(k.loop("dot").instructions[0])]
    loads = [i for i in before if i.is_a("LDG") and i.bits == 128]
    if len(loads) < 4:
        return f"{len(loads)} loads of 16 bytes in front of the loop"
    loaded: set[int] = set()
    for i in before[before.index(loads[0]) : before.index(loads[3])]:
        if i.reads & loaded:
            return f"{i} waits"
        loaded = loaded | i.writes if i in loads else loaded - i.writes
    return ""


def next_rows_in_flight(k: Kernel) -> str:
    """The codes of the next four rows are on their way while the sums of these are reduced."""
    loop = k.loop("dot")
    loads = [i for i in loop.of("LDG") if i.bits == 128]
    if len(loads) != 4:
        return f"{len(loads)} loads of 16 bytes in the loop"
    for load in loads:
        distance = loop.first_use(load)
        shuffles = 0 if distance is None else loop.between(load, distance, "SHFL")
        if shuffles < 20:
            return f"{load} is read after {shuffles} of 20 shuffles"
    return ""


def parts_are_visible(k: Kernel) -> str:
    """Stored, a fence, the block is counted, a fence, and loaded past the first-level cache."""
    code = list(k)
    (count,) = (n for n, i in enumerate(code) if i.is_a("ATOMG"))
    fences = [n for n, i in enumerate(code) if i.is_a("MEMBAR") and "GPU" in i.opcode]
    stores = [n for n, i in enumerate(code[:count]) if i.is_a("STG")]
    loads = [n for n, i in enumerate(code) if i.is_a("LDG") and "STRONG.GPU" in i.opcode and i.bits == 128]
    if not stores or not any(stores[-1] < fence < count for fence in fences):
        return "no fence between the parts and the count"
    if len(loads) < 4 or not any(count < fence < loads[0] for fence in fences):
        return f"{len(loads)} loads of parts, fences at {fences}"
    return ""


def counts_wrap(k: Kernel) -> str:
    """The increment of the last block sets the counter to 0; a store would lose counts of overlapping launches."""
    (count,) = (i for i in k if i.is_a("ATOMG"))
    return "" if ".INC" in count.opcode else f"{count.opcode} counts the blocks"


def codes_on_their_way(k: Kernel) -> str:
    """The codes of the block are prefetched to the second-level cache ahead of the first barrier."""
    barrier = next(n for n, i in enumerate(k) if i.is_a("BAR"))
    prefetches = [n for n, i in enumerate(k) if i.is_a("CCTL") and "PF2" in i.opcode]
    return (
        "" if prefetches and prefetches[0] < barrier else f"prefetches at {prefetches}, barrier at {barrier}"
    )


def parts_in_flight(k: Kernel) -> str:
    """decode_plain: the codes of 32 coefficients are asked for before the first is unpacked."""
    part = k.region("part")
    loads = [i for i in part.of("LDG") if i.bits == 64]
    if len(loads) != 4:
        return f"{len(loads)} loads of 8 bytes"
    last = part.instructions.index(loads[-1])
    return next((f"{i} waits" for i in part.instructions[:last] if i.is_a("PRMT")), "")


def no_division(k: Kernel) -> str:
    """A division of 64 bits is a call."""
    return next((str(i) for i in k.of("CALL") if re.search("div|rem", " ".join(i.operands))), "")


def sixteen_bytes(k: Kernel) -> str:
    """decode_plain: 16 bytes a store, and 24 instructions for 4 coefficients at most."""
    part = k.region("part")
    if [i.bits for i in part.of("STG")] != [128] * 4:
        return f"stores of {[i.bits for i in part.of('STG')]} bits"
    return f"{len(part)} instructions for 32 coefficients" if len(part) > 8 * 24 else ""


def tile_unpacking(k: Kernel) -> str:
    """decode_64: 20 instructions for 4 coefficients at most, on their way to shared memory."""
    region = k.region("unpack_tiles")
    return f"{len(region)} for 64 coefficients" if len(region) > 16 * 20 else ""


def blocks(least: int) -> Callable[[Kernel], str]:
    def at_once(k: Kernel) -> str:
        launch = LAUNCHES[k.name]
        found = k.blocks_per_sm(launch.block[0], launch.shared)
        return f"{found} blocks a multiprocessor, {k.usage}" if found < least else ""

    at_once.__name__ = f"at_least_{least}_blocks"
    return at_once


_FENCE = "  __threadfence();  // each thread's parts, before the block is counted\n"
_UNFENCED = (_FENCE, "")
_CACHED = ("ld.global.cg.v4.u32", "ld.global.v4.u32")
_STORED = ("atomicInc(counter, last)", "atomicAdd(counter, 1u)")
_LATE_CODES = ('asm volatile("prefetch.global.L2 [%0];" ::"l"(p));', "")
_STORE = "          loader.load(codes, first_n, rows, k + BK);\n"
_WIDE = "  if (bits % 4 == 0) {\n"
_NEXT = "        if (i + 1 < rows) source += stride;\n"
_NEXT_ANEW = "        source = i + 1 < rows ? from + k + (i + 1) * stride : from;\n"
_LINE = "      load_activations(p.x, token, col, v);\n"
_DIVIDED = "      token = (first + line) / per_token;\n" + _LINE
_WIDE_STORE = "    if (p.wide) {\n      store_any<VEC>"

#: (kernel, gate, what a broken copy has instead)
GATES: list[tuple[str, Callable[[Kernel], str], tuple[str, str]]] = [
    ("linear_mma_codes", late_use, (_STORE, _STORE + "          loader.store(codes, k + BK, next + A);\n")),
    ("linear_mma_codes_64", late_use, (_STORE, _STORE + "          loader.store(codes, k + BK, next + A);\n")),
    ("linear_mma_codes_64", in_registers, ("name, 256, RESIDENT)", "name, 256, RESIDENT + 3)")),
    ("linear_mma_parts", in_registers, ("parts, 256, RESIDENT)", "parts, 256, RESIDENT + 3)")),
    ("linear_few_mma", late_use, (_STORE, _STORE + "          loader.store(codes, k + BK, next + A);\n")),
    ("linear_mma_codes", unpacking, ("      if (c.bits <= 8) {\n", "      if (c.bits <= 2) {\n")),
    ("linear_few_mma", unpacking, ("      if (c.bits <= 8) {\n", "      if (c.bits <= 2) {\n")),
    ("linear_mma_codes", wide_loads, (_WIDE, "  if (bits % 8 == 0) {\n")),
    ("linear_mma_codes", few_moves, (_NEXT, _NEXT_ANEW)),
    ("linear_mma_codes", in_registers, ("name, 256, RESIDENT)", "name, 256, RESIDENT + 1)")),
    ("linear_mma_codes", blocks(2), ("name, 256, RESIDENT)", "name, 256, 1)")),
    ("linear_few_dot_1", all_rows_in_flight, (_WIDE, "  if (bits % 8 == 0) {\n")),
    ("linear_few_dot_1", next_rows_in_flight, ("      if (!ahead) now.load(", "      now.load(")),
    ("linear_few_dot_1", in_registers, ("DOT(1, 128, ONE_RESIDENT)", "DOT(1, 128, 12)")),
    ("linear_few_dot_4", in_registers, ("DOT(4, 128, 2)", "DOT(4, 128, 10)")),
    ("linear_few_mma", in_registers, ("few_mma, 256, FEW_RESIDENT)", "few_mma, 256, FEW_RESIDENT + 1)")),
    *((few, parts_are_visible, _UNFENCED) for few in ("linear_few_dot_1", "linear_few_mma")),
    *((few, parts_are_visible, _CACHED) for few in ("linear_few_dot_1", "linear_few_mma")),
    *((few, counts_wrap, _STORED) for few in ("linear_few_dot_1", "linear_few_mma")),
    *((few, codes_on_their_way, _LATE_CODES) for few in ("linear_few_dot_1", "linear_few_mma")),
    ("linear_inputs", no_division, (_LINE, _DIVIDED)),
    ("linear_inputs", in_registers, ("KERNEL(linear_inputs, 128, 2)", "KERNEL(linear_inputs, 128, 16)")),
    ("decode_plain", parts_in_flight, ("VEC>(at.runs + k", "VEC>(at.runs + (k && v[0][0] < 0.0f) + k")),
    ("decode_plain", sixteen_bytes, (_WIDE_STORE, _WIDE_STORE.replace("p.wide", "false"))),
    ("decode_plain", no_division, ("i64 row = quotient(w, p.by_pieces)", "i64 row = w / parts")),
    ("decode_plain", blocks(4), ("KERNEL(decode_plain, 256)", "KERNEL(decode_plain, 256, 1)")),
    ("decode_64", tile_unpacking, UNSPECIALISED),
    ("decode_64", no_division, ("i64 row_of_tiles = quotient(w, p.by_pieces)", "i64 row_of_tiles = w / per_row")),
    ("decode_64", in_registers, ("ENTRY(64, 128)", "ENTRY(64, 1024)")),
]  # fmt: skip
IDS = [f"{entry}-{gate.__name__}" for entry, gate, _ in GATES]


@pytest.mark.parametrize(("entry", "gate", "broken"), GATES, ids=IDS)
def test_gate(entry: str, gate: Callable[[Kernel], str], broken: tuple[str, str]) -> None:
    """The kernel passes, and a copy with the fault that the gate is for does not."""
    assert gate(kernel(entry)) == ""
    assert gate(kernel(entry, broken))


@pytest.mark.parametrize("entry", LAUNCHES)
def test_nothing_is_in_local_memory(entry: str) -> None:
    assert in_registers(kernel(entry)) == ""
