"""Gates on the machine code of attention: what its loop over tiles of keys is made of."""

from __future__ import annotations

from functools import lru_cache

import pytest

from rbe_gpu.gpu import _source
from rbe_gpu.gpu import attention as launcher

from .host import machine_code
from .host.machine_code import Kernel

NOT_CAPPED = {"AttentionParams.capped": 0}
#: By head size: tiles of 16 queries a warp, whether queries stay in shared memory, blocks of a multiprocessor.
SCHEDULES = {32: (2, True, 3), 64: (2, False, 2), 96: (2, True, 2), 128: (2, True, 2), 256: (1, True, 2)}
#: Register moves among the instructions of the scores, and of the weighted values: ptxas places accumulators anew
MOVES = {32: (0, 8), 64: (0, 4), 96: (0, 40), 128: (0, 32), 256: (0, 8)}


def violations(kernel: Kernel, head_dim: int) -> set[str]:
    """The gates that a kernel of half types does not pass."""
    tiles, stays, blocks = SCHEDULES[head_dim]
    tile = launcher.HALVES[head_dim]
    loop, scores, values = kernel.loop("tiles"), kernel.region("scores"), kernel.region("values")
    fragments = head_dim // 16 * (tile.keys // 16)
    rescale = {i.address for i in kernel.region("rescale")}
    always = [i for i in kernel.region("weights") if i.address not in rescale]
    copies = [i for i in loop.of("LDGSTS") if i.bits == 128]
    most_scores, most_values = MOVES[head_dim]
    gates = {
        "tensor cores": scores.count("HMMA") == values.count("HMMA") == 2 * tiles * fragments,
        "loads of fragments": values.count("LDSM") == fragments
        and scores.count("LDSM") == fragments + stays * tiles * head_dim // 16
        and all(i.bits == 128 for code in (scores, values) for i in code.of("LDSM")),
        "moves in the scores": scores.moves <= most_scores,
        "moves in the values": values.moves <= most_values,
        "copies of 16 bytes": len(copies)
        == loop.count("LDGSTS")
        == 2 * tile.keys * head_dim * 2 // 16 // 128,
        "sums rescaled in a branch": sum(i.is_a("FMUL") for i in always) <= 4 * 2 * tiles,
        "one exponential a score": sum(i.is_a(r"MUFU\.EX2") for i in always) == 2 * tiles * tile.keys // 4,
        "no local memory": kernel.local == 0,
        "blocks of a multiprocessor": kernel.blocks_per_sm(128, tile.shared) >= blocks,
    }
    return {name for name, passed in gates.items() if not passed}


@pytest.mark.parametrize("head_dim", SCHEDULES)
@pytest.mark.parametrize("type_name", ["f16", "bf16"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_loop_over_tiles(head_dim: int, type_name: str, architecture: int) -> None:
    kernel = machine_code.kernels("attention", architecture, **NOT_CAPPED)[
        f"attention_{type_name}_{head_dim}"
    ]
    assert violations(kernel, head_dim) == set()


@pytest.mark.parametrize("head_dim", SCHEDULES)
def test_capped_scores(head_dim: int) -> None:
    """They take no local memory, and leave the loop's other parts as they are."""
    kernel = machine_code.kernels("attention", 90, **{"AttentionParams.capped": 1})[
        f"attention_f16_{head_dim}"
    ]
    assert not violations(kernel, head_dim) & {
        "tensor cores", "loads of fragments", "copies of 16 bytes", "no local memory", "blocks of a multiprocessor",
    }  # fmt: skip


Changes = tuple[tuple[str, str], ...]


@lru_cache
def changed(changes: Changes, head_dim: int, schedule: str) -> Kernel:
    """A kernel of the source with every first text in the place of its second."""
    text = _source.expand("attention.cu", _source.read("attention.cu"), NOT_CAPPED)
    for old, new in changes:
        assert old in text, f"{old!r} is not in the source"
        text = text.replace(old, new)
    head, entries, _ = text.partition("ALL_HALVES(f16, f16)\n")
    assert entries
    kernels = machine_code.kernels_of(f"{head}HALVES(f16, f16, {head_dim}, {schedule})\n", 90)
    return kernels[f"attention_f16_{head_dim}"]


STAY, MOVE = "3, 2, 64, true, 32, 16", "2, 2, 64, false, 32, 32"
VALUES = "v_tile + k * 16 * D + fragment(n)"
#: Worse copies of the source, by the gates that tell: what is exchanged, head size and schedule.
WORSE: dict[str, tuple[set[str], Changes, int, str]] = {
    "K fragments in registers that are no neighbours": (
        {"moves in the scores"},
        (
            ("fragments_at(lane / 16 * 8 + lane % 8, lane / 8 % 2)", "fragment"),
            ("s[2 * i + 1][2 * n], a[i], b[0], b[1]);", "s[2 * i + 1][2 * n], a[i], b[0], b[2]);"),
            ("s[2 * i + 1][2 * n + 1], a[i], b[2], b[3]);", "s[2 * i + 1][2 * n + 1], a[i], b[1], b[3]);"),
        ),
        64, MOVE,
    ),
    "sums rescaled for every tile": (
        {"sums rescaled in a branch"}, (("// hot: rescale\n", "\n"), ("if (__any_sync(ALL_LANES, moved)) {", "{"),
         ("bool apart = false;", "bool apart = false;\n// hot: rescale\nif (l[0] == 1.5f) l[0] = 0.0f;")), 64, MOVE,
    ),
    "element by element": ({"copies of 16 bytes"}, (("if (aligned & ALIGNED_INPUT) {", "if (false) {"),), 32, STAY),
    "two matrices a load": (
        {"loads of fragments"},
        ((f"ldmatrix_transposed(b, {VALUES});",
          f"u32 low[2], high[2]; ldmatrix_transposed(low, {VALUES}); ldmatrix_transposed(high, {VALUES}); "
          "b[0] = low[0]; b[1] = low[1]; b[2] = high[0]; b[3] = high[1];"),),
        32, STAY,
    ),
    "no tensor cores": (
        {"tensor cores"}, (("mma_16x8x16<T>(sum, a, b);", "sum[0] += __uint_as_float(a[0] * b[0]);"),), 32, STAY,
    ),
    "64 queries a warp": ({"blocks of a multiprocessor"}, (), 32, "1, 4, 64, true, 32, 16"),
    "an array indexed at run time": (
        {"no local memory"}, (("float sum = l[r];", "float sum = l[(r + a.group) % LINES];"),), 32, STAY,
    ),
    "an exponential more": (
        {"one exponential a score"},
        (("sum += s[r][n][e];", "sum += s[r][n][e] + exp2f(s[r][n][e]);"),), 32, STAY,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORSE)
def test_worse_copies_are_seen(name: str) -> None:
    gates, changes, head_dim, schedule = WORSE[name]
    assert gates <= violations(changed(changes, head_dim, schedule), head_dim)


@pytest.mark.parametrize(("head_dim", "schedule"), [(32, STAY), (64, MOVE)])
def test_a_copy_unchanged_passes(head_dim: int, schedule: str) -> None:
    assert violations(changed((), head_dim, schedule), head_dim) == set()
