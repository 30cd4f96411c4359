"""attention by wgmma: when it runs, its results in host emulation, broken copies, and gates on its machine code."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from rbe_gpu.reports.gpu import conformance

from rbe_gpu import dispatch, ops, reference, registry
from rbe_gpu.gpu import _execute, _source, attention_wgmma
from rbe_gpu.gpu import attention as launcher
from rbe_gpu.gpu._launch import SUFFIX, Launch
from rbe_gpu.gpu._launch import Kernel as LaunchedKernel

from . import real
from .cases.attention import CASES as ATTENTION
from .host import build, machine_code, nvrtc
from .host.executor import CAPABILITY, KernelError, Library, library
from .host.machine_code import Code, Kernel
from .host.mutants import replaced
from .host.virtual import virtual
from .test_launch_attention import (
    BFLOAT16,
    CASES,
    POKES,
    REPAIR,
    attend,
    check,
    error,
    pack,
    packed,
    planned,
    qkv,
)

ROOT = Path(__file__).parent.parent
HALVES = pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=["float16", "bfloat16"])


@contextmanager
def hopper(kernel: str = "wgmma", capability: tuple[int, int] = CAPABILITY) -> Iterator[None]:
    """Launches as on a GPU of this capability, with one kernel preferred; nothing runs."""
    with (
        attention_wgmma.preferring(kernel),
        _execute.executor(lambda launches: pytest.fail(f"launched {launches}"), capability),
    ):
        yield


# --- when it runs -------------------------------------------------------------------------------------


def on_hopper(*shape: int, dtype: Any = np.float16, **given: Any) -> Launch:
    with hopper():
        return planned(shape, dtype, **given)


@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 128])
@HALVES
def test_kernel_of_every_head_dim(head_dim: int, dtype: np.dtype) -> None:
    launch = on_hopper(3, 1000, 4, head_dim, dtype=dtype)
    width = 64 if head_dim <= 64 else 128
    tile = attention_wgmma.TILES[width]
    assert launch.entry == f"attention_wgmma_{SUFFIX[dtype]}_{width}"
    assert (launch.op, launch.block) == ("attention_wgmma", (tile.threads, 1, 1))
    assert launch.grid == (-(-1000 // tile.queries) * 4, 3, 1)
    assert launch.shared == tile.shared <= 227 << 10
    library("attention_wgmma").check(launch)


def test_every_kernel_is_used() -> None:
    entries = {on_hopper(1, 1, 1, d, dtype=t).entry for d in (64, 128) for t in (np.float16, BFLOAT16)}
    assert entries == set(library("attention_wgmma").index)


def test_grid_of_packed_sequences() -> None:
    with hopper():
        assert packed(1000, 7, 3, 64).grid == ((1000 // 192 + 7) * 3, 1, 1)
        assert packed(1000, 7, 3, 128).grid == ((1000 // 128 + 7) * 3, 1, 1)


OTHERS = {
    "float32": lambda: on_hopper(1, 100, 1, 64, dtype=np.float32),
    "head_dim 32": lambda: on_hopper(1, 100, 1, 32),
    "head_dim 136": lambda: on_hopper(1, 100, 1, 136),
    "rows of parts of chunks": lambda: on_hopper(1, 100, 1, 60),
    "a mask": lambda: on_hopper(1, 100, 1, 64, mask=virtual((1, 1, 100, 100), bool)),
    "softcap": lambda: on_hopper(1, 100, 1, 64, softcap=2.0),
    "a scale that is not positive": lambda: on_hopper(1, 100, 1, 64, scale=0.0),
    "k not aligned": lambda: on_hopper(1, 100, 1, 64, k=virtual((1, 100, 1, 64), np.float16, offset=1)),
    "out not aligned": lambda: on_hopper(1, 100, 1, 64, out=virtual((1, 100, 1, 64), np.float16, offset=1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_left_to_the_other_kernels(name: str) -> None:
    assert OTHERS[name]().op == "attention"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_architectures(capability: tuple[int, int]) -> None:
    with hopper(capability=capability):
        assert planned().op == "attention"


def test_it_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def op() -> str:
        with _execute.executor(lambda launches: None, CAPABILITY):
            return planned().op

    monkeypatch.delenv("RBE_GPU_ATTENTION", raising=False)
    assert op() == "attention"
    for value, chosen in (("", "attention"), ("mma", "attention"), ("wgmma", "attention_wgmma")):
        monkeypatch.setenv("RBE_GPU_ATTENTION", value)
        assert op() == chosen
    with attention_wgmma.preferring("mma"):
        assert op() == "attention"
    monkeypatch.setenv("RBE_GPU_ATTENTION", "wmma")
    with pytest.raises(ValueError, match="RBE_GPU_ATTENTION='wmma' is not known; use one of mma, wgmma"):
        op()


# --- conformance on a GPU -----------------------------------------------------------------------------


def conformance_tests(*options: str, kernel: str = "wgmma") -> subprocess.CompletedProcess[str]:
    """The command of the GPU check's second pass over attention, in host emulation, with further options."""
    command = [("host" if word == "cuda" else word) for word in conformance.command(conformance.WGMMA)]
    environment = {**os.environ, attention_wgmma.VARIABLE: kernel}
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_second_pass_over_attention_selects_what_is_taken() -> None:
    """Every case that launches these kernels on a Hopper GPU, and no other."""
    taken = set()
    for case in ATTENTION.cases:
        for dtype in case.dtypes:
            launched: list[Launch] = []
            args = case.make(real, registry.DTYPES[dtype])
            launchers = dispatch.Backend("host", "rbe_gpu.gpu")
            with (
                mock.patch.object(dispatch, "CPU", launchers),
                attention_wgmma.preferring("wgmma"),
                _execute.executor(launched.extend, CAPABILITY),
            ):
                ops.attention(**args)
            if any(launch.op == "attention_wgmma" for launch in launched):
                taken.add(f"attention-{case.name}-{dtype}".replace(" ", "_"))
    listed = conformance_tests("--collect-only", "-q", "-q").stdout
    assert set(re.findall(r"::test_value\[host-(.*)\]$", listed, re.MULTILINE)) == taken
    assert set(re.findall(r"::test_out\[host-(.*)\]$", listed, re.MULTILINE)) == taken
    assert len(taken) >= 24


@pytest.mark.parametrize("kernel", ["wgmma", "mma"])
def test_a_pass_that_launches_other_kernels_fails(kernel: str) -> None:
    done = conformance_tests("-k", "test_value and head_dim_64 and _lse-float16", kernel=kernel)
    counts, bad = conformance.outcomes(done.stdout)
    if kernel == "wgmma":
        assert (done.returncode, bad) == (0, [])
        assert counts["passed"]
    else:
        assert done.returncode == 1
        assert len(bad) == sum(counts.values())
        assert "launched attention, and not attention_wgmma" in done.stdout


# --- results ------------------------------------------------------------------------------------------

LARGE: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "three tiles of queries, causal": ((1, 400, 400, 1, 1, 64), {"causal": True}),
    "three tiles of keys": ((1, 130, 300, 2, 1, 128), {}),
    "several tiles, causal, lengths": (
        (2, 260, 300, 1, 1, 128),
        {"causal": True, "lengths": np.array([300, 131])},
    ),
    "lengths 0 and 1": ((2, 40, 70, 1, 1, 128), {"lengths": np.array([0, 1])}),
    "scores of 100": ((1, 40, 270, 1, 1, 64), {"scale": 2.0}),
}
EDGES = LARGE | {
    name: case
    for name, case in CASES.items()
    if case[0][-1] in (40, 64, 80, 96, 128) and "mask" not in case[1]
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, np.dtype(np.float16)) for name in EDGES), *((name, BFLOAT16) for name in LARGE)],
)
def test_edges(name: str, dtype: np.dtype) -> None:
    """In both orders of warps and lanes, with the same bits; float16 without a repair of NaN."""
    shape, options = EDGES[name]
    arrays = qkv(*shape, dtype)
    lib = library("attention_wgmma")
    with hopper():
        y = check(arrays, lib, **options)
        other = copies() if dtype == np.float16 else lib
        assert y.tobytes() == attend(arrays, other, reverse=True, **options).tobytes()


@POKES
def test_nan_and_inf(poke: Any) -> None:
    """Seen, they spread as in the reference; unseen, they do not."""
    q, k, v = qkv(2, 70, 72, 2, 1, 64, np.float16)
    poke(q, k, v)
    with hopper():
        for options in ({"causal": True}, {"window": (9, -1), "lengths": np.array([72, 68])}):
            check((q, k, v), library("attention_wgmma"), **options)


@pytest.mark.parametrize(("head_dim", "reverse"), [(64, False), (128, True)])
def test_packed_sequences_are_as_alone(head_dim: int, reverse: bool) -> None:
    """Outputs and log-sum-exps, which are those of the reference."""
    lengths = (150, 0, 1, 200)
    arrays = qkv(4, 200, 200, 2, 1, head_dim, np.float16)
    (q, k, v), ends = pack(arrays, lengths)
    out, lse = np.full_like(q, 7), np.full((2, sum(lengths)), 7, np.float32)
    lib = library("attention_wgmma")
    with hopper():
        (launch,) = launcher.launches(q, k, v, True, 0.2, None, None, (-1, -1), out, (ends, ends), lse)
        lib.launch(launch, reverse)
        for b, n in enumerate(lengths):
            alone = tuple(x[b : b + 1, :n] for x in arrays)
            if n:
                want, sums = attend(alone, lib, lse=True, scale=0.2, causal=True)
                rows = slice(*ends[b : b + 2])
                assert out[rows].tobytes() == want[0].tobytes()
                assert lse[:, rows].tobytes() == sums[0].tobytes()
    _, want = reference.attention(q, k, v, causal=True, scale=0.2, cu_seqlens_q=ends, return_lse=True)
    np.testing.assert_allclose(lse, want, rtol=2e-6, atol=2e-6)


# --- broken copies ------------------------------------------------------------------------------------

ARRIVED = "    cp_async_wait<0>();\n    fence_proxy_async();\n    __syncthreads();\n  };"
#: What is exchanged in wgmma.cuh and attention_wgmma.cu, and head size.
BROKEN: dict[str, tuple[str, str, int]] = {
    "stride of 16 rows": ("(start, 16, SWIZZLE_BYTES)", "(start, 16, 2 * SWIZZLE_BYTES)", 64),
    "distance of half a panel": ("(start, ROWS * PANEL_ROW,", "(start, ROWS * PANEL_ROW / 2,", 128),
    "64-byte swizzle": ("1ull << 62", "2ull << 62", 64),
    "chunks not swizzled": ("(lane ^ first % 8) * VEC", "lane * VEC", 64),
    "panels that begin anywhere": (
        "memory + (SWIZZLE_BYTES - shared_address(memory) % SWIZZLE_BYTES) % SWIZZLE_BYTES / BYTES", "memory", 64,
    ),
    "scores not waited for": ("wgmma_wait<1>();\n", "", 64),
    "outputs not waited for": ("wgmma_wait<0>();\n      settled(o);\n      settled(weights);", "", 64),
    "weights overwritten": ("= weigh_scores(j0);\n", "= weigh_scores(j0);\n pack_weights(seen);\n", 64),
    "keys overwritten": ("begin_keys(j0 + KEYS, stage);", "begin_keys(j0 + KEYS, stage ^ 1);", 64),
    "values overwritten": ("begin_values(j0, stage ^ 1);", "begin_values(j0, stage);", 64),
    "copies not waited for": (ARRIVED, ARRIVED.replace("cp_async_wait<0>();", ""), 64),
    "no fence of the proxy": (ARRIVED, ARRIVED.replace("fence_proxy_async();", ""), 64),
    "no barrier": (ARRIVED, ARRIVED.replace("__syncthreads();", ""), 64),
    "no fence of the registers": ("wgmma_fence();\n      issue_scores(stage ^ 1);", "issue_scores(stage ^ 1);", 64),
    "sums not rescaled": ("o[r][n][0] *= factor[r];", "", 64),
    "unseen keys that count": ("if (!seen) {", "if (false) {", 64),
    "no group": ("    wgmma_commit();\n  };\n  auto issue_values", "  };\n  auto issue_values", 64),
}  # fmt: skip


ISSUED = "      wgmma_fence();\n      issue_scores(stage ^ 1);\n      issue_values(stage);\n"
FIRST = "    pack_weights(weigh_scores(start));"
LAST = "    arrived();\n    wgmma_fence();\n    issue_values(stage);\n"
UNREADY = "shared memory that the wgmma of .* reads is written between its issue and the wait"
#: Races, which a GPU may not show: what is exchanged in the kernel of head size 64, and the emulation's message.
RACES: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "last values before their barrier": (
        ((LAST, "    wgmma_fence();\n    issue_values(stage);\n    arrived();\n"),),
        UNREADY,
    ),
    "matmuls before their barrier": (
        (
            (ISSUED, ""),
            ("      arrived();\n      begin_values(j0,", ISSUED + "      arrived();\n      begin_values(j0,"),
        ),
        UNREADY,
    ),
    "registers written after the fence": (
        (
            (ISSUED, ISSUED.replace("      wgmma_fence();\n", "")),
            (FIRST, f"    wgmma_fence();\n{FIRST}"),
            ("      settled(weights);", "      settled(weights);\n      wgmma_fence();"),
        ),
        "registers of the wgmma of .* are written after the last wgmma_fence",
    ),
    "weights packed after the issue": (
        (
            (FIRST, "    bool before = weigh_scores(start);"),
            (
                ISSUED,
                "      wgmma_fence();\n      issue_values(stage);\n      pack_weights(before);\n"
                "      issue_scores(stage ^ 1);\n",
            ),
            ("wgmma_wait<1>();", "wgmma_wait<0>();"),
            ("      pack_weights(seen);", "      before = seen;"),
            (LAST, f"{LAST}    pack_weights(before);\n"),
        ),
        # of a warp that sees none of the keys, zeros are written to scores, too
        "registers that the wgmma of .* reads are written between its issue and the wait|after the last wgmma_fence",
    ),
    "warps of a warpgroup with other matmuls": (
        (
            (FIRST, "    bool before = weigh_scores(start);\n    pack_weights(before);"),
            (
                "      issue_values(stage);\n      wgmma_wait<1>();",
                "      if (before) issue_values(stage); else wgmma_commit();\n      wgmma_wait<1>();",
            ),
            ("      pack_weights(seen);", "      pack_weights(seen);\n      before = seen;"),
        ),
        "in other warps of the warpgroup|the warpgroup executes",
    ),
}


@lru_cache
def copies() -> Library:
    """The kernels of float16 without their repair of NaN, which would hide a tile read too early, and broken ones."""
    text = replaced(_source.source("attention_wgmma"), REPAIR, "if (false)")
    head, mark, rest = text.partition('#line 1 "wgmma.cuh"\n')
    body = (mark + rest).partition("#define ENTRY")[0]
    assert mark
    entry = (
        "KERNEL({}, {}, 1)(AttentionParams_PARAMETERS) "
        "{{ {}::attend<f16, {}, {}, {}>(AttentionParams_VALUES); }}\n"
    )

    def kernel(name: str, namespace: str, head_dim: int) -> str:
        tile = attention_wgmma.TILES[head_dim]
        return entry.format(name, tile.threads, namespace, head_dim, tile.threads // 128, tile.keys)

    parts = [head, f"namespace sound {{\n{body}}}\n"]
    parts += [kernel(f"attention_wgmma_f16_{d}", "sound", d) for d in (64, 128)]
    for i, (old, new, head_dim) in enumerate(BROKEN.values()):
        parts.append(f"namespace copy_{i} {{\n{replaced(body, old, new)}}}\n")
        parts.append(kernel(f"broken_{i}", f"copy_{i}", head_dim))
    for i, (exchanged, _) in enumerate(RACES.values()):
        copy = body
        for old, new in exchanged:
            copy = replaced(copy, old, new)
        parts.append(f"namespace racing_{i} {{\n{copy}}}\n")
        parts.append(kernel(f"race_{i}", f"racing_{i}", 64))
    return Library(build.build("".join(parts)))


class Renamed:
    """A library in which another kernel stands for that of a launch."""

    def __init__(self, lib: Library, entry: str) -> None:
        self.lib, self.entry = lib, entry

    def launch(self, launch: Launch, reverse: bool) -> None:
        values = launch.params.values
        self.lib.run(self.entry, launch.grid, launch.block, *values, shared=launch.shared, reverse=reverse)


def worst(entry: str, head_dim: int) -> float:
    """The largest error in both orders, infinite where a call fails; scores spread so far that sums are rescaled."""
    arrays = qkv(1, 140, 300, 1, 1, head_dim, np.float16)
    options: dict[str, Any] = {"causal": True, "scale": 1.0}
    largest = 0.0
    for reverse in (False, True):
        try:
            with hopper():
                y = attend(arrays, Renamed(copies(), entry), reverse, **options)  # type: ignore[arg-type]
        except KernelError:
            return np.inf
        largest = max(largest, error(y, arrays, **options))
    return largest


@pytest.mark.parametrize("name", BROKEN)
def test_broken_copies_are_wrong(name: str) -> None:
    """In one of the two orders, or by an error."""
    assert not worst(f"broken_{list(BROKEN).index(name)}", BROKEN[name][2]) <= 10


@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("name", RACES)
def test_races_are_errors(name: str, reverse: bool) -> None:
    """In either order, whatever the result. Of the first warpgroup, the first warp does not see the second tile."""
    arrays = qkv(1, 192, 300, 1, 1, 64, np.float16)
    options: dict[str, Any] = {"window": (100, 0), "scale": 1.0}
    entry = Renamed(copies(), f"race_{list(RACES).index(name)}")
    with hopper():
        check(arrays, copies(), **options)
        with pytest.raises(KernelError, match=RACES[name][1]):
            attend(arrays, entry, reverse, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_sound_copies_are_right(head_dim: int) -> None:
    assert worst(f"attention_wgmma_f16_{head_dim}", head_dim) <= 1


# --- machine code -------------------------------------------------------------------------------------

#: By head size: the most instructions, and register moves, for a tile that all queries of a warp see.
PATH = {64: (640, 16), 128: (680, 12)}


def text_of(type_name: str, head_dim: int) -> str:
    constants = (("AttentionParams.capped", 0),)
    return _source.kernel_source(
        LaunchedKernel("attention_wgmma", f"attention_wgmma_{type_name}_{head_dim}", constants)
    )


def compiled(text: str) -> tuple[Kernel, list[str]]:
    """The one kernel of a text, and what the compiler says against it."""
    (kernel,) = machine_code.kernels_of(text, "90a").values()
    log = nvrtc.compile_source(text, "90a")
    return kernel, [*log.warnings, *log.serialized]


def path_of(kernel: Kernel) -> Code:
    """What a warp executes for a tile that all of its queries see, where no sum is rescaled."""
    loop = kernel.loop("tiles")
    cold = ("masked", "unseen", "rescale", "far", "outputs rescaled")
    beside = {i.address for name in cold for i in kernel.region(name)}
    last = max(i.address for i in loop if i.target == loop.header)
    return Code(tuple(i for i in loop if i.address <= last and i.address not in beside))


def violations(text: str, head_dim: int) -> set[str]:
    """The gates that a kernel does not pass."""
    kernel, messages = compiled(text)
    tile = attention_wgmma.TILES[head_dim]
    path = path_of(kernel)
    matmuls, waits = path.of("HGMMA"), path.of(r"WARPGROUP\.DEPBAR")
    from_registers = [i for i in matmuls if any("tnspB" in operand for operand in i.operands)]
    exponentials = path.of(r"MUFU\.EX2")
    copies = path.of("LDGSTS")
    rows = tile.threads * 16 // 128  # copied at once, of a panel
    most, moves = PATH[head_dim]
    gates = {
        "nothing is said against it": not messages,
        "matmuls": len(matmuls) == head_dim // 16 + tile.keys // 16 == len(from_registers) + head_dim // 16,
        "no fragments are loaded": not path.count("LDSM|HMMA"),
        "all matmuls are issued before a wait": len(waits) == 2
        and max(i.address for i in matmuls) < waits[0].address,
        "weights beside the matmul of the values": len(exponentials) == tile.keys // 2
        and all(waits[0].address < i.address < waits[-1].address for i in exponentials),
        "copies of 16 bytes": len(copies) == 2 * -(-tile.keys // rows) * head_dim // 64
        and all(i.bits == 128 for i in copies),
        "a barrier a tile": path.count(r"BAR\.SYNC") == 1,
        "instructions": len(path) <= most,
        "moves": path.moves <= moves,
        "no local memory": kernel.local == 0,
        "registers": kernel.blocks_per_sm(tile.threads, tile.shared) >= 1,
    }
    return {name for name, passed in gates.items() if not passed}


@pytest.mark.parametrize("head_dim", [64, 128])
def test_loop_over_tiles(head_dim: int) -> None:
    assert violations(text_of("f16", head_dim), head_dim) == set()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_differs_in_the_matmuls_alone(head_dim: int) -> None:
    """It compiles to as many registers, without a message."""
    halves, bfloats = (nvrtc.compile_source(text_of(name, head_dim), "90a") for name in ("f16", "bf16"))
    assert [*bfloats.kernels.values()] == [*halves.kernels.values()]
    assert not [*bfloats.warnings, *bfloats.serialized]


#: A worse copy of the source: sums read while they are summed, weights in one block with the wait behind them.
WORSE = (
    ("wgmma_wait<1>();\n      settled(s);", ""),
    ("    if (seen) {\n      // hot: masked", "    {\n      // hot: masked"),
)


def test_a_worse_copy_is_seen() -> None:
    text = text_of("f16", 64)
    for old, new in WORSE:
        text = replaced(text, old, new)
    assert violations(text, 64) >= {
        "nothing is said against it",
        "all matmuls are issued before a wait",
        "weights beside the matmul of the values",
    }
