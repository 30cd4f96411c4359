"""RBE_ISA: kernels compiled for another instruction set than the host's."""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from rbe_gpu.cpu_fallback import isa

X86 = platform.machine() in ("x86_64", "AMD64")

_SOFTMAX = """
import re
import numpy as np
import rbe_gpu as rbe

x = np.arange(96, dtype=np.float32).reshape(2, 48) % 7
y = rbe.softmax(x)
from rbe_gpu.cpu_fallback import isa, softmax  # only now: nothing else may have to be imported first

e = np.exp(x.astype(np.float64))
assert np.abs(y - e / e.sum(axis=1, keepdims=True)).max() < 1e-6
code = "".join(softmax._in_parts.inspect_asm().values())
print(isa.active().name, bool(re.search("zmm", code)), bool(re.search("ymm", code)))
"""


def _run(name: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, isa.VARIABLE: name, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", _SOFTMAX], env=env, cwd=root, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not X86, reason="forces x86 instruction sets")
@pytest.mark.parametrize("name", [n for n in isa.ISAS if isa.ISAS[n].architecture == "x86_64"])
def test_a_forced_instruction_set_runs_or_is_refused(name: str, tmp_path: Path) -> None:
    done = _run(name, tmp_path)
    wanted = isa.ISAS[name]
    if isa.host().has(*wanted.features):
        assert done.returncode == 0, done.stderr
        zmm, ymm = wanted.vector_bits == 512, wanted.vector_bits == 256
        words = done.stdout.split()
        assert words[:2] == [name, str(zmm)]
        assert zmm or words[2] == str(ymm)
    else:
        assert done.returncode != 0
        assert f"RuntimeError: {isa.VARIABLE}={name}: this processor" in done.stderr


def test_an_unknown_instruction_set_is_refused(tmp_path: Path) -> None:
    done = _run("avx3", tmp_path)
    assert done.returncode != 0
    assert "ValueError: RBE_ISA='avx3' is not known; use one of sse2, avx2," in done.stderr


def test_select_names_the_missing_features(monkeypatch: pytest.MonkeyPatch) -> None:
    small = isa.Isa("host", isa.ISAS["sse2"].triple, "old", isa.ISAS["sse2"].features)
    monkeypatch.setattr(isa, "host", lambda: small)
    with pytest.raises(RuntimeError, match=r"this processor \(old\) has no avx, avx2, bmi"):
        isa.select("avx2")
    with pytest.raises(RuntimeError, match="has no neon"):
        isa.select("neon")


@pytest.mark.parametrize(
    ("name", "bits", "registers", "converts_half"),
    [
        ("sse2", 128, 16, False),
        ("avx2", 256, 16, True),
        ("avx512", 512, 32, True),
        ("avx512-vnni", 512, 32, True),
        ("neon", 128, 32, True),
    ],
)
def test_widths(name: str, bits: int, registers: int, converts_half: bool) -> None:
    described = isa.ISAS[name]
    assert (described.vector_bits, described.vector_registers) == (bits, registers)
    assert described.converts_half == converts_half


@pytest.mark.parametrize(
    ("features", "same"),
    [
        (isa.ISAS["sse2"].features | {"sse3"}, ["sse2"]),
        (isa.ISAS["avx2"].features | {"vaes", "avxifma"}, ["avx2"]),
        (isa.ISAS["avx512"].features | {"sse4a"}, ["avx512"]),
        (isa.ISAS["avx512-vnni"].features | {"avx512bf16"}, ["avx512-vnni"]),
        (isa.ISAS["avx2"].features | {"avx512f"}, []),
    ],
)
def test_compiled_kernels_that_a_host_may_run(
    monkeypatch: pytest.MonkeyPatch, features: frozenset[str], same: list[str]
) -> None:
    """Those of an instruction set that the host has and that kernels are not written differently for."""
    here = isa.Isa("host", isa.host().triple, "a processor", frozenset(features))
    monkeypatch.setattr(isa, "ISAS", {n: i for n, i in isa.ISAS.items() if n.startswith(("sse", "avx"))})
    monkeypatch.setattr(isa, "active", lambda: here)
    expected = [(here.triple, isa.ISAS[n].cpu, isa.ISAS[n].llvm_features) for n in same]
    assert list(isa.precompiled_targets.__wrapped__()) == (expected if here.architecture == "x86_64" else [])


def test_features_that_kernels_ask_for_are_decisive() -> None:
    asked: set[str] = set()
    for file in Path(isa.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="has"), args=features):
                    asked |= {f.value for f in features if isinstance(f, ast.Constant)}
                case ast.Compare(
                    left=ast.Constant(value=str(feature)), comparators=[ast.Attribute(attr="features")]
                ):
                    asked.add(feature)
    assert {"avx512vnni", "avx", "f16c"} <= asked
    assert asked <= isa.DECISIVE


_COMPILED = """
import re
import numba
from rbe_gpu.cpu_fallback import isa
wanted = isa.select("avx512-vnni", compile_only=True)
from rbe_gpu.cpu_fallback import matmul_tiles

kernel = matmul_tiles._densify_panel
signature = numba.types.void(*[numba.types.int64] * kernel.__code__.co_argcount)
code = numba.cfunc(signature, error_model="numpy")(kernel).inspect_llvm()
from llvmlite import binding
machine = binding.Target.from_triple(wanted.triple).create_target_machine(wanted.cpu, wanted.llvm_features, opt=3)
print(" ".join(sorted(set(re.findall(r"\\t(v?[a-z0-9]+)\\t", machine.emit_assembly(binding.parse_assembly(code)))))))
"""


@pytest.mark.skipif(not X86, reason="x86 instructions")
def test_no_instruction_that_the_host_was_not_asked_for() -> None:
    """A CPU's name stands for features, too: icelake-server's counted bits by one that Cascade Lake lacks."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], cwd=root, capture_output=True, text=True, check=True
    )
    used = done.stdout.split()
    assert "vmovups" in used or "vmovdqu64" in used
    assert not [name for name in used if name.startswith(("vpopcnt", "vpermb", "vpshld", "vpshrd", "vgf2p8"))]


_INT8 = """
import numpy as np
import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.cpu_fallback import isa
x = np.sin(np.arange(24 * 128, dtype=np.float32)).reshape(24, 128)
weight = rbe.compress(np.cos(np.arange(64 * 128, dtype=np.float32) * 0.7).reshape(64, 128), codes="dense-int5")
y = rbe.linear(x, weight, activation_bits=8)
print(isa.active().vector_bits, isa.precompiled_targets() == (), np.abs(y - x @ weight.decode().T).max() < 0.5)
"""


@pytest.mark.skipif(not X86, reason="forces x86 instruction sets")
@pytest.mark.parametrize(
    "setting", [{"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, {"NUMBA_ENABLE_AVX": "0"}], ids=str
)
def test_settings_of_numba_count(setting: dict[str, str], tmp_path: Path) -> None:
    """Weights were packed for the host, and multiplied by kernels for what Numba was told: wrong results."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "1", **setting}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _INT8], env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    bits, _, right = done.stdout.split()
    assert (bits, right) == ("128", "True")
