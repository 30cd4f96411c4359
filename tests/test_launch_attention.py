"""attention's launches and kernels without a GPU: grids, strides, shared bytes; edges of tiles; broken copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rbe_gpu import reference, registry
from rbe_gpu.gpu import _execute, _launch, _source
from rbe_gpu.gpu import attention as launcher
from rbe_gpu.gpu._launch import Launch
from rbe_gpu.gpu._params import ATTENTION
from rbe_gpu.registry import relative_error

from . import real
from .host import build
from .host.executor import HostExecutor, KernelError, Library, library
from .host.virtual import virtual

BIG = 2**31
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", registry.DTYPES.values(), ids=registry.DTYPES)
ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
TOLERANCES = registry.OPS["attention"].tolerances
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]

# --- the plan -----------------------------------------------------------------------------------------


def planned(
    shape: tuple[int, int, int, int] = (2, 100, 4, 64),
    dtype: Any = np.float16,
    seq_k: int | None = None,
    kv_heads: int | None = None,
    **given: Any,
) -> Launch:
    """The launch for q of `shape`, and k and v to go with it."""
    batch, seq_q, heads, head_dim = shape
    keys = (batch, seq_q if seq_k is None else seq_k, kv_heads or heads, head_dim)
    arguments = {
        "q": virtual(shape, dtype),
        "k": virtual(keys, dtype),
        "v": virtual(keys, dtype),
        "causal": False,
        "scale": 0.125,
        "mask": None,
        "lengths": None,
        "window": (-1, -1),
        "out": virtual(shape, dtype),
    } | given
    (launch,) = launcher.launches(**arguments)
    return launch


NUMBERS = [name for name, kind in ATTENTION.fields.items() if kind in ("i64", "int", "float")]


def numbers(launch: Launch) -> dict[str, Any]:
    """The kernel's parameters that are not arrays."""
    return {name: launch.params[name].item() for name in NUMBERS}


@DTYPES
@pytest.mark.parametrize("head_dim", [1, 31, 32, 33, 40, 64, 65, 80, 96, 97, 128, 129, 255, 256])
def test_kernel_of_every_head_dim(head_dim: int, dtype: np.dtype) -> None:
    """The narrowest that holds it; its tiles fit the 64 KiB that compute capability 7.5 gives a block."""
    launch = planned((3, 1000, 4, head_dim), dtype)
    tiles = launcher.FLOATS if dtype == np.float32 else launcher.HALVES
    width = min(d for d in tiles if d >= head_dim)
    assert launch.entry == f"attention_{_launch.SUFFIX[dtype]}_{width}"
    assert launch.grid == (-(-1000 // tiles[width].queries) * 4, 3, 1)
    assert launch.block == (128, 1, 1)
    assert launch.shared == tiles[width].shared <= 64 << 10
    assert numbers(launch)["head_dim"] == head_dim
    library("attention").check(launch)


def test_every_kernel_is_used() -> None:
    entries = {
        planned((1, 1, 1, d), dtype).entry
        for d in (32, 64, 96, 128, 256)
        for dtype in registry.DTYPES.values()
    }
    assert entries == set(library("attention").index)


def test_head_dim_over_256_is_refused() -> None:
    for dtype in registry.DTYPES.values():
        with pytest.raises(ValueError, match="head_dim=257 is not supported on the GPU; use 1 to 256"):
            planned((1, 1, 1, 257), dtype)


@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
def test_strides_over_two_gigabytes(which: str) -> None:
    """Whatever stride an axis has arrives whole, in elements; also a negative one, and 0."""
    for strides in (
        (BIG + 16, BIG * 8, BIG * 64, 1),
        (0, -BIG * 16, BIG - 16, 1),
        (2**40, 2**36, 2**50, 1),
    ):
        array = virtual((2, 100, 4, 64), np.float16, strides=strides)
        found = numbers(planned(**{which: array}))
        assert tuple(found[f"{which}_{axis}_stride"] for axis in ("batch", "row", "head")) == strides[:3]
        assert found["alignment"] == 3
        others = {"q", "k", "v", "out"} - {which}
        assert all(found[f"{name}_row_stride"] == 256 for name in others)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((1, 1, 1, 64), (1, 1, 1)),
        ((1, 128, 1, 64), (1, 1, 1)),
        ((1, 129, 1, 64), (2, 1, 1)),
        ((65535, 5, 1, 64), (1, 65535, 1)),
        ((65536, 5, 1, 64), (1, 65535, 2)),
        ((3 * 65535 + 1, 5, 2, 64), (2, 65535, 4)),
        ((BIG, 1, 1, 64), (1, 65535, 32769)),
        ((1, BIG - 1024, 1, 64), (2**24 - 8, 1, 1)),
        ((1, BIG - 1024, 127, 64), ((2**24 - 8) * 127, 1, 1)),
    ],
    ids=str,
)
def test_grid(shape: tuple[int, int, int, int], grid: tuple[int, int, int]) -> None:
    """Tiles and heads side by side; batches beyond 65535 in the third axis."""
    launch = planned(shape)
    assert launch.grid == grid
    assert grid[1] * grid[2] >= shape[0] == numbers(launch)["batch"]


def test_too_long_or_too_many_heads_are_refused() -> None:
    assert numbers(planned((1, 1, 1, 64), seq_k=BIG - 1024))["seq_k"] == BIG - 1024
    with pytest.raises(ValueError, match="up to 2147482624 of each"):
        planned((1, 1, 1, 64), seq_k=BIG - 1023)
    with pytest.raises(ValueError, match="up to 2147482624 of each"):
        planned((1, BIG, 1, 64), seq_k=1)
    with pytest.raises(ValueError, match="grid"):
        planned((1, BIG - 1024, 129, 64))
    with pytest.raises(ValueError, match="grid"):
        planned((65535 * 65535 + 1, 1, 1, 64))


@pytest.mark.parametrize(
    ("mask", "kind", "strides"),
    [
        (None, 0, (0, 0, 0, 0)),
        (virtual((2, 4, 100, 100), np.float32), 2, (160_000, 40_000, 400, 4)),
        (virtual((2, 4, 100, 100), bool), 3, (40_000, 10_000, 100, 1)),
        (np.broadcast_to(virtual((2, 1, 1, 100), bool), (2, 4, 100, 100)), 3, (100, 0, 0, 1)),
        (np.broadcast_to(virtual((100, 100), np.float32), (2, 4, 100, 100)), 2, (0, 0, 400, 4)),
        (
            virtual((2, 4, 100, 100), np.float32, strides=(BIG, 1, 2**40, -BIG)),
            2,
            (4 * BIG, 4, 2**42, -4 * BIG),
        ),
    ],
    ids=["none", "added", "keep", "padding", "of all heads", "far apart"],
)
def test_mask(mask: Any, kind: int, strides: tuple[int, ...]) -> None:
    """Kind, and strides in bytes; scores meet the mask in natural units."""
    launch = planned(mask=mask)
    found = numbers(launch)
    assert (found["mask_kind"], *(found[f"mask_{n}_stride"] for n in ("batch", "head", "row", "key"))) == (
        kind,
        *strides,
    )
    assert found["scale"] == np.float32(0.125 if kind else 0.125 / np.log(2))
    library("attention").check(launch)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-40])
def test_scale_that_exp2_cannot_take(scale: float) -> None:
    found = numbers(planned(scale=scale))
    assert (found["mask_kind"], found["scale"]) == (1, np.float32(scale))


@pytest.mark.parametrize(
    ("window", "causal", "limits"),
    [
        ((-1, -1), False, (-1, -1)),
        ((-1, -1), True, (-1, 0)),
        ((5, 7), False, (5, 7)),
        ((5, 7), True, (5, 0)),
        ((2**40, 2**40), False, (BIG - 1024, BIG - 1024)),
    ],
)
def test_window(window: tuple[int, int], causal: bool, limits: tuple[int, int]) -> None:
    found = numbers(planned(window=window, causal=causal))
    assert (found["window_left"], found["window_right"]) == limits


def test_alignment() -> None:
    """Rows of 16 bytes: of q, k and v together, and of out."""
    assert numbers(planned())["alignment"] == 3
    assert numbers(planned((1, 9, 2, 40)))["alignment"] == 3
    assert numbers(planned((1, 9, 2, 33)))["alignment"] == 0
    assert numbers(planned((1, 9, 2, 36)))["alignment"] == 0
    assert numbers(planned((1, 9, 2, 36), np.float32))["alignment"] == 3
    shape = (2, 100, 4, 64)
    for name in ("q", "k", "v"):
        assert numbers(planned(**{name: virtual(shape, np.float16, offset=1)}))["alignment"] == 2
        for axis in range(3):
            strides = [25600, 256, 64, 1]
            strides[axis] += 1
            assert (
                numbers(planned(**{name: virtual(shape, np.float16, strides=tuple(strides))}))["alignment"]
                == 2
            )
    assert numbers(planned(out=virtual(shape, np.float16, offset=1)))["alignment"] == 1
    alone = virtual(
        (1, 100, 4, 64), np.float16, strides=(7, 256, 64, 1)
    )  # the stride of one batch is nothing
    assert numbers(planned((1, 100, 4, 64), q=alone))["alignment"] == 3


def packed(
    total_q: int, batch: int, heads: int = 2, head_dim: int = 64, dtype: Any = np.float16, **given: Any
) -> Launch:
    """The plan for packed sequences, as many keys as queries."""
    shape = (total_q, heads, head_dim)
    ends = virtual((batch + 1,), np.int64)
    arrays = {name: virtual(shape, dtype) for name in ("q", "k", "v", "out")}
    return planned((1, 1, 1, head_dim), dtype, **arrays, cu_seqlens=(ends, ends), **given)


@pytest.mark.parametrize(
    ("total_q", "batch", "heads", "head_dim", "dtype", "blocks"),
    [
        (1, 1, 1, 64, np.float16, 1),
        (127, 1, 3, 64, np.float16, 3),
        (128, 1, 1, 64, np.float16, 2),  # one has nothing to do
        (1000, 20, 2, 64, np.float16, 2 * (7 + 20)),
        (1000, 20, 2, 256, np.float16, 2 * (15 + 20)),
        (1000, 20, 2, 128, np.float32, 2 * (20 + 20)),
        (BIG - 1024, 1, 100, 64, np.float16, (2**24 - 8 + 1) * 100),
        (2**20, 2**20 + 2**24, 1, 64, np.float16, 2**13 + 2**20 + 2**24),
    ],
)
def test_packed_grid(total_q: int, batch: int, heads: int, head_dim: int, dtype: Any, blocks: int) -> None:
    """From shapes alone: places for the tiles of any sequences of so many queries together."""
    launch = packed(total_q, batch, heads, head_dim, dtype)
    assert launch.grid == (blocks, 1, 1)
    found = numbers(launch)
    assert (found["batch"], found["seq_q"], found["seq_k"]) == (batch, total_q, total_q)
    assert tuple(found[f"{a}_batch_stride"] for a in ("q", "k", "v", "out")) == (0, 0, 0, 0)
    assert (found["q_row_stride"], found["q_head_stride"]) == (heads * head_dim, head_dim)
    assert found["alignment"] == 3
    library("attention").check(launch)


def test_packed_beyond_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="grid"):
        packed(BIG - 1024, 1, 129)
    with pytest.raises(ValueError, match="grid"):
        packed(1, BIG, 1)
    with pytest.raises(ValueError, match="up to 2147482624 of each"):
        packed(BIG, 1)


@pytest.mark.parametrize("rows", [24, 48, 64, 128])
def test_places_are_enough(rows: int) -> None:
    """Sequence b has the places cu[b] / rows + b and on: never fewer than its tiles, and at most one more."""
    generator = np.random.default_rng(rows)
    for _ in range(200):
        lengths = generator.integers(0, 4 * rows, generator.integers(1, 30))
        ends = np.cumsum([0, *lengths])
        places = np.diff(ends // rows + np.arange(len(ends)))
        spare = places - -(-lengths // rows)
        assert spare.min() >= 0
        assert spare.max() <= 1


def test_heads_share_keys() -> None:
    found = numbers(planned((1, 9, 12, 64), kv_heads=3))
    assert (found["num_heads"], found["group"]) == (12, 4)


# --- the kernels --------------------------------------------------------------------------------------


def qkv(
    batch: int, seq_q: int, seq_k: int, heads: int, kv_heads: int, head_dim: int, dtype: Any = np.float32
) -> Arrays:
    """Real q, k and v of MiniLM, read in another shape."""
    q, k, v, _ = real.qkv()
    shapes = ((batch, seq_q, heads, head_dim), *2 * ((batch, seq_k, kv_heads, head_dim),))
    return tuple(np.resize(x, shape).astype(dtype) for x, shape in zip((q, k, v), shapes, strict=True))


def attend(
    arrays: Arrays, lib: Library | None = None, reverse: bool = False, lse: bool = False, **options: Any
) -> Any:
    """The output (and lse) of the host build, of `lib` where given."""
    q, k, _ = arrays
    batch, seq_q, heads, head_dim = q.shape
    mask = options.pop("mask", None)
    if mask is not None:
        mask = np.broadcast_to(mask, (batch, heads, seq_q, k.shape[1]))
    out = np.full_like(q, 7, order="C", subok=False)
    sums = np.full((batch, heads, seq_q), 7, np.float32) if lse else None
    (launch,) = launcher.launches(
        *arrays,
        options.pop("causal", False),
        options.pop("scale", head_dim**-0.5),
        mask,
        options.pop("lengths", None),
        options.pop("window", (-1, -1)),
        options.pop("out", out),
        options.pop("cu_seqlens", None),
        sums,
    )
    assert not options
    (lib or library("attention")).launch(launch, reverse)
    result = launch.params["out"]
    return (result, sums) if lse else result


def error(y: np.ndarray, arrays: Arrays, **options: Any) -> float:
    """In units of the tolerance; infinite where NaN and Inf stand elsewhere than in the reference."""
    with np.errstate(all="ignore"):
        want = reference.attention(*arrays, **options)
    tol = TOLERANCES[y.dtype.name]
    return relative_error(y, want, tol.floor) / tol.rel


def check(arrays: Arrays, lib: Library | None = None, reverse: bool = False, **options: Any) -> np.ndarray:
    y = attend(arrays, lib, reverse, **options)
    assert error(y, arrays, **options) <= 1
    return y


def _holes(seq_q: int, seq_k: int) -> np.ndarray:
    i, j = np.ogrid[:seq_q, :seq_k]
    return (i * 7 + j * 5) % 11 < 6


def _added(seq_q: int, seq_k: int) -> np.ndarray:
    i, j = np.ogrid[:seq_q, :seq_k]
    return np.where(_holes(seq_q, seq_k), -np.abs(i - j) / 8, -np.inf).astype(np.float32)


LOWEST = np.finfo(np.float32).min
#: Shapes (batch, seq_q, seq_k, heads, kv_heads, head_dim) at the edges of tiles, and options.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "63 keys": ((1, 3, 63, 1, 1, 64), {}),
    "64 keys": ((1, 3, 64, 1, 1, 64), {}),
    "65 keys": ((1, 3, 65, 1, 1, 64), {}),
    "129 queries": ((1, 129, 130, 1, 1, 64), {"causal": True}),
    "1 query": ((2, 1, 200, 2, 1, 64), {"causal": True}),
    "more queries than keys": ((1, 150, 40, 1, 1, 32), {"causal": True}),
    "more keys than queries": ((1, 40, 200, 1, 1, 32), {"causal": True}),
    "grouped": ((2, 20, 70, 4, 2, 32), {"lengths": np.array([70, 65])}),
    "lengths 0": ((2, 40, 70, 1, 1, 32), {"lengths": np.array([0, 1])}),
    "lengths, causal": ((2, 140, 140, 1, 1, 32), {"lengths": np.array([64, 129]), "causal": True}),
    "window": ((1, 200, 200, 1, 1, 64), {"window": (70, 3)}),
    "narrow window": ((1, 140, 300, 1, 1, 32), {"window": (0, 0)}),
    "window to the left": ((1, 140, 140, 1, 1, 64), {"window": (65, -1)}),
    "window, causal, lengths": (
        (2, 140, 200, 1, 1, 64),
        {"window": (20, 9), "causal": True, "lengths": np.array([199, 90])},
    ),
    "mask of keys": ((2, 40, 130, 2, 1, 64), {"mask": (np.arange(130) % 5 > 1)[None, None, None]}),
    "mask of queries": ((1, 140, 70, 1, 1, 64), {"mask": (np.arange(140) % 3 > 0)[:, None]}),
    "mask of pairs": ((1, 140, 130, 1, 1, 64), {"mask": _holes(140, 130), "causal": True}),
    "mask added": ((1, 140, 130, 2, 1, 64), {"mask": _added(140, 130), "window": (90, -1)}),
    "mask added, transposed": ((1, 70, 66, 1, 1, 64), {"mask": np.ascontiguousarray(_added(70, 66).T).T}),
    "mask added, lowest": ((1, 9, 70, 1, 1, 64), {"mask": np.full((1, 70), LOWEST)}),
    "mask added, large": ((1, 9, 70, 1, 1, 64), {"mask": np.float32(-1e9) * (np.arange(70)[None] % 3 > 0)}),
    "mask added, all -inf": ((1, 9, 70, 1, 1, 64), {"mask": np.full((1, 70), np.float32(-np.inf))}),
    "head_dim 40": ((1, 70, 66, 2, 1, 40), {"causal": True}),
    "head_dim 33": ((1, 70, 66, 1, 1, 33), {"causal": True}),
    "head_dim 96": ((1, 130, 98, 1, 1, 96), {"causal": True}),
    "head_dim 80, mask": ((1, 40, 98, 1, 1, 80), {"mask": _added(40, 98)}),
    "head_dim 128": ((1, 130, 98, 1, 1, 128), {"causal": True}),
    "head_dim 256": ((1, 70, 68, 1, 1, 256), {"causal": True}),
    "head_dim 250": ((1, 20, 68, 1, 1, 250), {"window": (30, 30)}),
    "scale 0": ((1, 20, 70, 1, 1, 32), {"scale": 0.0, "causal": True}),
    "scale negative": ((1, 20, 70, 1, 1, 32), {"scale": -0.2, "lengths": np.array([66])}),
    "scale that is 0 on a GPU": ((1, 20, 70, 1, 1, 32), {"scale": 1e-40, "causal": True}),
    "scores of 100": ((1, 40, 270, 1, 1, 32), {"scale": 2.0}),
}


@lru_cache
def changed(kernels: str = "", old: str = "", new: str = "") -> Library:
    """The source without its repair of NaN, which would hide a tile read too early, and with `old` exchanged.

    `kernels` stands for the instances of the source.
    """
    text = _source.source("attention")
    for before, after in ((REPAIR, "if (false)"), (old, new)):
        assert before in text, f"{before!r} is not in the source"
        text = text.replace(before, after) if before else text
    head, found, tail = text.partition("ALL_HALVES(f16, f16)\n")
    assert found
    return Library(build.build(head + (f"{kernels}\n" if kernels else found + tail)))


REPAIR = "if (__any_sync(ALL_LANES, odd))"


@pytest.mark.parametrize("name", CASES)
@DTYPES
def test_edges(name: str, dtype: np.dtype) -> None:
    """In both orders of warps and lanes, with the same bits, and without a repair."""
    shape, options = CASES[name]
    arrays = qkv(*shape, dtype)
    y = check(arrays, **options)
    assert y.tobytes() == attend(arrays, changed(), reverse=True, **options).tobytes()


def test_lengths_are_cut() -> None:
    """On a GPU they are not checked on the host: below 0 is 0, above seq_k is seq_k, also beyond 32 bits."""
    arrays = qkv(6, 3, 5, 1, 1, 32)
    found = attend(arrays, lengths=np.array([-1, 6, 2**40, -(2**40), 2**32 + 1, 2]))
    np.testing.assert_array_equal(found, attend(arrays, lengths=np.array([0, 5, 5, 0, 5, 2])))


def pack(arrays: Arrays, lengths: tuple[int, ...]) -> tuple[Arrays, np.ndarray]:
    """The first lengths[b] rows of every sequence end to end, and where they end."""
    parts = tuple(np.concatenate([x[b, :n] for b, n in enumerate(lengths)]) for x in arrays)
    return parts, np.cumsum([0, *lengths])


@ORDERS
@DTYPES
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (20, 3)}], ids=str)
def test_packed_sequences_are_as_alone(dtype: np.dtype, options: dict[str, Any], reverse: bool) -> None:
    """The same bits, outputs and sums, as of each sequence in a call of its own."""
    lengths = (130, 0, 1, 128, 64, 0, 65)
    arrays = qkv(len(lengths), 130, 130, 2, 1, 32, dtype)
    (q, k, v), ends = pack(arrays, lengths)
    out, lse = np.full_like(q, 7), np.full((2, len(q)), 7, np.float32)
    window, causal = options.get("window", (-1, -1)), options.get("causal", False)
    (launch,) = launcher.launches(q, k, v, causal, 0.2, None, None, window, out, (ends, ends), lse)
    library("attention").launch(launch, reverse)
    for b, n in enumerate(lengths):
        if n:
            alone = tuple(x[b : b + 1, :n] for x in arrays)
            want, sums = attend(alone, lse=True, scale=0.2, **options)
            rows = slice(*ends[b : b + 2])
            assert out[rows].tobytes() == want[0].tobytes()
            assert lse[:, rows].tobytes() == sums[0].tobytes()


@ORDERS
def test_very_many_packed_sequences(reverse: bool) -> None:
    """The search goes through three levels of 32, past sequences without queries."""
    generator = np.random.default_rng(7)
    lengths, lengths_k = (generator.integers(0, 3, 1100) for _ in range(2))
    ends, ends_k = (np.cumsum([0, *n]) for n in (lengths, lengths_k))
    (q,), (k,), (v,) = (x for x in qkv(1, int(ends[-1]), int(ends_k[-1]), 1, 1, 32))
    out = np.full_like(q, 7)
    (launch,) = launcher.launches(q, k, v, False, 0.2, None, None, (-1, -1), out, (ends, ends_k))
    library("attention").launch(launch, reverse)
    want = reference.attention(q, k, v, scale=0.2, cu_seqlens_q=ends, cu_seqlens_k=ends_k)
    assert relative_error(out, want) <= TOLERANCES["float32"].rel


@pytest.mark.parametrize(
    "ends",
    [[0, 40, 30, 70], [0, 2**40, -5, 70], [-(2**33), 5, 2**33, 2**33 + 9], [70, 40, 20, 0], [9, 9, 9, 9]],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_wrong_ends_stay_within_the_arrays(ends: list[int], dtype: Any) -> None:
    """On a GPU they are not checked on the host: what is computed is undefined, where it is written is not."""
    q, k, v = (x[0] for x in qkv(1, 70, 70, 1, 1, 32, dtype))
    frame, sums = np.full((270, 1, 32), 7, dtype), np.full(270, 7, np.float32)
    cu = np.array(ends)
    inside = frame[100:170], sums[100:170].reshape(1, 70)
    (launch,) = launcher.launches(q, k, v, True, 0.2, None, None, (-1, -1), inside[0], (cu, cu), inside[1])
    for reverse in (False, True):
        library("attention").launch(launch, reverse)
    assert (frame[:100] == 7).all()
    assert (frame[170:] == 7).all()
    assert (sums[:100] == 7).all()
    assert (sums[170:] == 7).all()


def _poke_keys(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    k[0, 10, 0, 1] = np.nan
    k[0, 70, 0, 2] = np.inf
    k[1, 50, 0, 2] = -np.inf


def _poke_queries(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    q[0, 3, 0, 1] = np.nan
    q[1, 60, 1, 1] = -np.inf


def _poke_values(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    v[0, 10, 0, 1] = np.nan
    v[0, 66, 0, 2] = np.inf
    v[0, 67, 0, 2] = -np.inf
    v[1, 69, 0, 31] = np.inf


POKES = pytest.mark.parametrize("poke", [_poke_keys, _poke_queries, _poke_values], ids=lambda f: f.__name__)


@POKES
@DTYPES
def test_nan_and_inf(poke: Callable[..., None], dtype: np.dtype) -> None:
    """Seen, they spread as in the reference; unseen, they do not: behind every kind of limit."""
    q, k, v = qkv(2, 70, 72, 2, 1, 32, dtype)
    poke(q, k, v)
    for options in (
        {"causal": True},
        {"window": (9, -1), "lengths": np.array([72, 68])},
        {"mask": _holes(70, 72)},
        {"mask": _added(70, 72), "causal": True},
    ):
        check((q, k, v), **options)


@DTYPES
def test_infinite_value_with_a_weight_below_float32(dtype: np.dtype) -> None:
    """The key's weight is e^-200, 0 in float32; e^-200 times inf is still inf, also after a rescaling."""
    q, k, v = qkv(1, 1, 200, 1, 1, 32, dtype)
    k[:] = 0
    query = q[0, 0, 0].astype(np.float32)
    k[0, 150, 0] = (query * (200 / float(query @ query))).astype(dtype)
    v[0, 3, 0, 5] = np.inf
    v[0, 170, 0, 6] = -np.inf
    y = check((q, k, v), scale=1.0)
    assert (y[0, 0, 0, 5], y[0, 0, 0, 6]) == (np.inf, -np.inf)


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 40, 33])
def test_strides(dtype: np.dtype, head_dim: int) -> None:
    """Parts of a fused projection, heads before positions, a reversed sequence; out within a frame."""
    width = 2 * head_dim
    fused = np.concatenate([x.reshape(2, 66, width) for x in qkv(2, 66, 66, 2, 2, head_dim, dtype)], axis=2)
    q, k, v = (part.reshape(2, 66, 2, head_dim) for part in np.split(fused, 3, axis=2))
    want = check((q, k, v), causal=True)
    heads_first = tuple(np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
    assert check(heads_first, causal=True).tobytes() == want.tobytes()
    check((q, k[:, ::-1], v[:, ::-1]))
    frame = np.full((2, 68, 4, head_dim + 8), 7, dtype)
    inside = frame[:, 1:67, 1:3, 3 : 3 + head_dim]
    attend((q, k, v), causal=True, out=inside)
    np.testing.assert_array_equal(inside, want)
    inside[...] = 7
    assert (frame == 7).all()


@DTYPES
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": _added(70, 66)}], ids=str)
def test_log_of_the_sum(dtype: np.dtype, options: dict[str, Any]) -> None:
    """lse[b,h,i] = log sum_j exp(score): -inf where nothing is seen."""
    arrays = q, k, _ = qkv(2, 70, 66, 2, 1, 40, dtype)
    lengths = np.array([66, 0])
    _, lse = attend(arrays, lse=True, lengths=lengths, **options)
    scores = np.einsum("bihd,bjd->bhij", q.astype(np.float64), k[:, :, 0].astype(np.float64)) * 40**-0.5
    scores = scores + options.get("mask", 0.0)
    i, j = np.ogrid[:70, :66]
    seen = (j < lengths[:, None, None, None]) & ((j <= i - 4) | (not options.get("causal", False)))
    with np.errstate(divide="ignore"):
        want = np.log(np.where(seen, np.exp(scores), 0.0).sum(axis=-1))
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(lse[finite], want[finite], rtol=2e-6, atol=2e-6)


def test_batches_beyond_a_grid_axis() -> None:
    """The third axis of the grid goes on where the second ends; blocks beyond the batch do nothing."""
    arrays = qkv(5, 3, 4, 2, 1, 32, np.float32)
    (launch,) = launcher.launches(
        *arrays, False, 0.2, None, None, (-1, -1), out := np.full_like(arrays[0], np.nan)
    )
    assert launch.grid == (2, 5, 1)
    library("attention").launch(replace(launch, grid=(2, 2, 3)))
    assert error(out, arrays, scale=0.2) <= 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_shared_memory_is_all_used(dtype: Any) -> None:
    """32 bytes less (the last 16 of float are padding), and something has no place."""
    arrays = qkv(1, 130, 130, 1, 1, 64, dtype)
    out = np.empty_like(arrays[0])
    (launch,) = launcher.launches(*arrays, False, 0.2, None, None, (-1, -1), out)
    short = replace(launch, shared=launch.shared - 32)
    with pytest.raises(KernelError, match="shared memory"):
        library("attention").launch(short)


def test_no_queries_and_no_keys() -> None:
    """No launch at all, and zeros."""
    q, k, v = qkv(1, 3, 4, 1, 1, 32)
    lse = np.zeros((1, 1, 3), np.float32)
    with _execute.executor(lambda launches: pytest.fail(f"launched {launches}")):
        launcher.attention(q[:, :0], k, v, False, 1.0, None, None, (-1, -1), q[:, :0].copy(), None)
        out = np.full_like(q, 7)
        launcher.attention(q, k[:, :0], v[:, :0], False, 1.0, None, None, (-1, -1), out, None, None, lse)
    assert not out.any()
    assert np.isneginf(lse).all()


# --- copies of the source, changed --------------------------------------------------------------------

#: One kernel of each of the ways: queries in shared memory, queries in registers, float.
KERNELS = {
    "queries stay": ("HALVES(f16, f16, 32, 3, 2, 64, true, 32, 16)", 32, np.float16),
    "two stages": ("HALVES(f16, f16, 64, 2, 2, 64, false, 32, 32)", 64, np.float16),
    "float": ("FLOATS(32, 2, 64, 64)", 32, np.float32),
}


def worst(lib: Library, head_dim: int, dtype: Any) -> float:
    """The largest error of three calls in both orders, infinite where a call fails; of one, scores that spread so far
    that sums are rescaled."""
    largest = 0.0
    for options in ({}, {"causal": True}, {"scale": 1.0}):
        arrays = qkv(1, 140, 200, 1, 1, head_dim, dtype)
        for reverse in (False, True):
            try:
                y = attend(arrays, lib, reverse, **options)
            except KernelError:
                return np.inf
            largest = max(largest, error(y, arrays, **options))
    return largest


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_sound_copies_are_right(kernel: tuple[str, int, Any]) -> None:
    assert worst(changed(kernel[0]), *kernel[1:]) <= 1


TILE = "__syncthreads();  // the tile is there, and the one before it no longer needed"
VALUES = "__syncthreads();  // the values are there, and the keys no longer needed"
FLOAT_KEYS = "__syncthreads();  // the keys are there, and the values before them no longer needed"
BROKEN = {
    "two stages, no wait": ("two stages", f"cp_async_wait<0>();\n    {TILE}", TILE),
    "two stages, no barrier": ("two stages", TILE, ""),
    "two stages, queries not waited for": ("two stages", "cp_async_wait<1>();", ""),
    "two stages, one stage": ("two stages", "stage ^= 1;", ""),
    "queries stay, no wait": ("queries stay", f"cp_async_wait<0>();\n      {VALUES}", VALUES),
    "queries stay, no barrier": ("queries stay", VALUES, ""),
    "queries stay, no barrier for keys": ("queries stay", TILE, ""),
    "two stages, no last barrier": (
        "two stages",
        "__syncthreads();  // all of the shared memory is free: the outputs first",
        "// the outputs first",
    ),
    "queries stay, no rescaling": ("queries stay", "o[r][n][0] *= factor;", ""),
    "queries stay, not transposed": ("queries stay", "ldmatrix_transposed(b, v_tile", "ldmatrix(b, v_tile"),
    "float, no wait": ("float", f"cp_async_wait<0>();\n    {FLOAT_KEYS}", FLOAT_KEYS),
    "float, no barrier": ("float", FLOAT_KEYS, ""),
    "float, no barrier for values": ("float", VALUES, ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_copies_are_wrong(name: str) -> None:
    """In one of the two orders, or by an error."""
    kernel, old, new = BROKEN[name]
    text, head_dim, dtype = KERNELS[kernel]
    assert not worst(changed(text, old, new), head_dim, dtype) <= 10


def test_values_that_are_not_finite_need_the_repair() -> None:
    """Without it a value that a query does not see makes its output NaN."""
    text, head_dim, dtype = KERNELS["queries stay"]
    q, k, v = qkv(1, 20, 20, 1, 1, head_dim, dtype)
    v[0, 15, 0, 3] = np.inf
    check((q, k, v), causal=True)
    assert error(attend((q, k, v), changed(text), causal=True), (q, k, v), causal=True) == np.inf


@ORDERS
@pytest.mark.parametrize("head_dim", [32, 96, 256])
def test_halves_without_tensor_cores(head_dim: int, reverse: bool) -> None:
    """Compute capability 7.5 has none for bfloat16: the same launch through the float products."""
    kernel = {
        32: "HALVES(bf16, bf16, 32, 3, 2, 64, true, 32, 16)",
        96: "HALVES(bf16, bf16, 96, 2, 2, 64, true, 32, 32)",
        256: "HALVES(bf16, bf16, 256, 2, 1, 32, true, 16, 16)",
    }[head_dim]
    lib = changed(kernel, "constexpr bool TENSOR_CORES = true;", "constexpr bool TENSOR_CORES = false;")
    for width in (head_dim, head_dim - 3):
        check(qkv(2, 130, 70, 2, 1, width, BFLOAT16), lib, reverse, causal=True, lengths=np.array([70, 33]))
    _, lse = attend(qkv(2, 130, 70, 2, 1, head_dim, BFLOAT16), lib, reverse, lse=True)
    _, want = attend(qkv(2, 130, 70, 2, 1, head_dim, BFLOAT16), lse=True)
    np.testing.assert_allclose(lse, want, rtol=1e-5)


def test_kernels_of_the_table_are_those_of_the_source() -> None:
    """The instances that the changed copies name stand in the source as they are."""
    source = _source.source("attention")
    for text, _, _ in KERNELS.values():
        inside = text.replace("f16, f16,", "type, T,")
        assert inside in source


def test_executor_takes_the_launcher() -> None:
    """`attention` itself, with a workspace that it does not need."""
    arrays = qkv(1, 5, 6, 1, 1, 32)
    out = np.full_like(arrays[0], np.nan)
    with _execute.executor(HostExecutor()):
        launcher.attention(*arrays, True, 0.2, None, None, (-1, -1), out, None)
    assert error(out, arrays, causal=True, scale=0.2) <= 1
