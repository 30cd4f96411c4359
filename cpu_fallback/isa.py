"""The instruction set that kernels are compiled for: one description, from which intrinsics, kernels and tests take
vector widths and features.

By default Numba compiles for the host processor. `RBE_ISA=avx2` (any name of `ISAS`) compiles for that instruction
set instead, so that one machine can run and test the kernels of another. The variable is read once, when the first
CPU kernel is imported. Compiled kernels are cached per instruction set: Numba's cache key holds the CPU name and
the features.

`select(name, compile_only=True)` compiles for an instruction set that the host cannot execute, of any architecture:
the tests read the assembly of AVX2, AVX-512, VNNI and NEON on every machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
import numba

from ._numba_internals import Target, target_context

VARIABLE = "RBE_ISA"


@dataclass(frozen=True)
class Isa:
    """What LLVM generates code for.

    Attributes
    ----------
    name : a name of `ISAS`, or "host"
    triple : LLVM target triple, e.g. "x86_64-unknown-linux-gnu"; where the architecture is the host's, the host's own
        triple is used
    cpu : LLVM CPU name; decides instruction scheduling
    features : LLVM feature names, without "+"
    """

    name: str
    triple: str
    cpu: str
    features: frozenset[str]

    @property
    def architecture(self) -> str:
        """ "x86_64" or "aarch64" (also for triples that begin with "arm64"), else the triple's first part."""
        first = self.triple.partition("-")[0]
        return {"arm64": "aarch64", "amd64": "x86_64"}.get(first, first)

    @property
    def vector_bits(self) -> int:
        """Width of a vector register: 512, 256 or 128."""
        if "avx512f" in self.features:
            return 512
        return 256 if "avx" in self.features else 128

    @property
    def vector_registers(self) -> int:
        """Vector registers of that width: 32 with AVX-512 and on aarch64, else 16."""
        return 32 if self.vector_bits == 512 or self.architecture == "aarch64" else 16

    @property
    def converts_half(self) -> bool:
        """Whether float16 <-> float32 is an instruction; elsewhere LLVM calls a routine that the JIT cannot find."""
        return self.architecture == "aarch64" or (self.architecture == "x86_64" and "f16c" in self.features)

    def has(self, *features: str) -> bool:
        """Whether all these features are there, by LLVM's names."""
        return self.features.issuperset(features)

    @property
    def llvm_features(self) -> str:
        """The features as LLVM and NUMBA_CPU_FEATURES take them: "+avx,+avx2,..."."""
        return ",".join(f"+{feature}" for feature in sorted(self.features))


_X86, _ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
_SSE2 = frozenset({"sse", "sse2"})
# all that LLVM takes the CPU names below to have and may use: a host without one of them must be refused
_AVX2 = _SSE2 | {"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2"}
_AVX2 |= {"lzcnt", "movbe"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

#: The instruction sets that the kernels are written for and tested on.
ISAS = {
    isa.name: isa
    for isa in (
        Isa("sse2", _X86, "x86-64", _SSE2),
        Isa("avx2", _X86, "x86-64-v3", _AVX2),
        Isa("avx512", _X86, "x86-64-v4", _AVX512),
        Isa("avx512-vnni", _X86, "x86-64-v4", _AVX512 | {"avx512vnni"}),
        Isa("neon", _ARM, "generic", frozenset({"neon"})),
        Isa("neon-dotprod", _ARM, "generic", frozenset({"neon", "dotprod"})),
    )
}


#: Features that kernels are written differently for: what intrinsics emit, and layouts that weights are packed in.
DECISIVE = frozenset(
    {"ssse3", "avx", "avx2", "bmi2", "f16c", "avx512f", "avx512bw", "avx512vnni", "neon", "dotprod"}
)


@lru_cache(maxsize=8)
def _described(triple: str, cpu: str, features: str) -> Isa:
    names = frozenset(word[1:] for word in features.split(",") if word.startswith("+"))
    return Isa("host" if _selected is None else _selected.name, triple, cpu, names)


def isa_of(context: Any) -> Isa:
    """The instruction set of a Numba target context: what an intrinsic's code is generated for."""
    return _described(*context.codegen().magic_tuple())


def host() -> Isa:
    """The host processor, whatever kernels are compiled for."""
    try:
        features = frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)
    except RuntimeError:  # LLVM cannot tell on this system; Numba then compiles without any
        features = frozenset()
    return Isa("host", llvm.get_process_triple(), llvm.get_host_cpu_name(), features)


def active() -> Isa:
    """What kernels of this process are compiled for: the selected instruction set, or the host's.

    Numba's own settings count (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, NUMBA_ENABLE_AVX): weights are packed for the
    kernels that will read them.
    """
    return isa_of(target_context())


@lru_cache(maxsize=1)
def precompiled_targets() -> tuple[Target, ...]:
    """The instruction sets whose compiled kernels are those of this process, but for the scheduling of instructions.

    Numba generates code for all of their features, and `DECISIVE` does not tell them from its target.
    """
    mine = active()
    return tuple(
        (mine.triple, isa.cpu, isa.llvm_features)
        for isa in ISAS.values()
        if isa.architecture == mine.architecture
        and mine.has(*isa.features)
        and isa.features & DECISIVE == mine.features & DECISIVE
    )


def select(name: str, compile_only: bool = False) -> Isa:
    """Compile every kernel of this process for `ISAS[name]`. Must come before Numba's first compilation.

    Parameters
    ----------
    name : a name of `ISAS`
    compile_only : kernels are compiled and inspected but never called, so the host need not support them

    Raises
    ------
    ValueError : unknown name
    RuntimeError : the host lacks the instructions, or Numba has already compiled for something else
    """
    global _selected
    if name not in ISAS:
        raise ValueError(f"{VARIABLE}={name!r} is not known; use one of {', '.join(ISAS)}")
    isa, here = ISAS[name], host()
    if compile_only:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        if isa.architecture != here.architecture:
            llvm.get_process_triple = lambda: isa.triple  # Numba asks for its target by this
    elif isa.architecture != here.architecture or not here.has(*isa.features):
        lacking = ", ".join(sorted(isa.features - here.features)) or isa.architecture
        raise RuntimeError(f"{VARIABLE}={name}: this processor ({here.cpu}) has no {lacking}")
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = isa.cpu, isa.llvm_features
    _selected = isa
    _described.cache_clear()
    precompiled_targets.cache_clear()
    compiled_for = isa_of(target_context())
    if (compiled_for.cpu, compiled_for.features) != (isa.cpu, isa.features):
        raise RuntimeError(
            f"{VARIABLE}={name} comes too late: Numba already compiles for {compiled_for.cpu}; "
            "import rbe_gpu before other users of Numba"
        )
    return isa


_selected: Isa | None = None
if os.environ.get(VARIABLE):
    select(os.environ[VARIABLE])
