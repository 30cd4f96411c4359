"""The arithmetic of CUDA launches, without a GPU: which kernel, which grid, which arguments; and the loader."""

from __future__ import annotations

import inspect
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rbe_gpu import dispatch, registry
from rbe_gpu.gpu import _execute, _launch, _load, _source
from rbe_gpu.gpu._elements import divider
from rbe_gpu.gpu._launch import MAX_GRID, Launch
from rbe_gpu.gpu._rows import share_rows
from rbe_gpu.kernel_struct import Struct

from .host.executor import KernelError, library
from .host.virtual import virtual

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path.stem for path in (ROOT / "cuda_src").glob("*.cu"))
OPS = [name for name in SOURCES if name in registry.OPS]
BIG = 2**31
DTYPES = pytest.mark.parametrize("dtype", registry.DTYPES.values(), ids=registry.DTYPES)


def launch_for(op: str) -> Callable[..., Launch]:
    """The one launch of an op's arguments."""

    def only(*args: Any) -> Launch:
        (launch,) = import_module(f"rbe_gpu.gpu.{op}").launches(*args)
        return launch

    return only


def softmax(shape: tuple[int, int], dtype: Any = np.float32, offset: int = 0, mask: Any = None) -> Launch:
    return launch_for("softmax")(virtual(shape, dtype, offset), 0.5, mask, virtual(shape, dtype))


def norm(op: str, shape: tuple[int, int], dtype: Any = np.float32, offset: int = 0, **given: Any) -> Launch:
    arrays = {
        "weight": virtual(shape[1:], dtype),
        "bias": None,
        "residual": None,
        "residual_out": None,
    } | given
    bias = () if op == "rms_norm" else (arrays["bias"],)
    x, out = virtual(shape, dtype, offset), virtual(shape, dtype)
    return launch_for(op)(x, arrays["weight"], *bias, 1e-5, arrays["residual"], out, arrays["residual_out"])


def rope(
    shape: tuple[int, int, int, int],
    dtype: Any = np.float32,
    offset: int = 0,
    half: int | None = None,
    interleaved: bool = False,
    **arrays: Any,
) -> Launch:
    """All features turn unless `half` says how many pairs do."""
    table = virtual((shape[1], shape[3] // 2 if half is None else half))
    x = virtual(shape, dtype, offset)
    given = {"cos": table, "sin": table, "positions": None, "out": virtual(shape, dtype)} | arrays
    return launch_for("rope")(x, given["cos"], given["sin"], given["positions"], interleaved, given["out"])


#: A launch of every op: of an array of a shape and a dtype that starts `offset` elements behind an aligned address.
LAUNCHES: dict[str, Callable[..., Launch]] = {
    "softmax": softmax,
    "layer_norm": lambda shape, dtype, offset=0: norm(
        "layer_norm", shape, dtype, offset, bias=virtual(shape[1:])
    ),
    "rms_norm": lambda shape, dtype, offset=0: norm("rms_norm", shape, dtype, offset),
    "gelu": lambda shape, dtype, offset=0: launch_for("gelu")(
        virtual(shape, dtype, offset), virtual(shape[1:], dtype), "none", virtual(shape, dtype)
    ),
    "silu": lambda shape, dtype, offset=0: launch_for("silu")(
        virtual(shape, dtype, offset), None, virtual(shape, dtype)
    ),
    "swiglu": lambda shape, dtype, offset=0: launch_for("swiglu")(
        virtual((shape[0], 2 * shape[1]), dtype, offset), None, virtual(shape, dtype)
    ),
    "rope": lambda shape, dtype, offset=0: rope((1, shape[0], 1, 2 * shape[1]), dtype, offset),
    "dropout": lambda shape, dtype, offset=0: launch_for("dropout")(
        virtual((prod(shape),), dtype, offset), 0.5, 3, 2**64 - 1, None, virtual((prod(shape),), dtype)
    ),
    "add": lambda shape, dtype, offset=0: launch_for("add")(
        virtual((prod(shape),), dtype, offset), virtual((prod(shape),), dtype), virtual((prod(shape),), dtype)
    ),
    "l2_normalize": lambda shape, dtype, offset=0: launch_for("l2_normalize")(
        virtual(shape, dtype, offset), 1e-12, virtual(shape, dtype)
    ),
    "mean_pool": lambda shape, dtype, offset=0: launch_for("mean_pool")(
        virtual((shape[0], 3, shape[1]), dtype, offset), None, None, virtual(shape, np.float32)
    ),
}
SHAPES = [
    (1, 1),
    (3, 31),
    (65, 64),
    (65, 384),
    (1, 5000),
    (2, 16384),
    (2, 16392),
    (2, 40_000),
    (1, 70_001),
    (2, BIG + 8),
    (BIG + 8, 8),
    (BIG, BIG // 8),
]


# --- launches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "word"),
    [
        ({"grid": (BIG, 1, 1)}, "grid"),
        ({"grid": (1, 65536, 1)}, "grid"),
        ({"grid": (1, 1, 65536)}, "grid"),
        ({"grid": (0, 1, 1)}, "grid"),
        ({"block": (1025, 1, 1)}, "block"),
        ({"block": (1, 1, 65)}, "block"),
        ({"block": (32, 33, 1)}, "1024 threads"),
        ({"block": (0, 1, 1)}, "block"),
    ],
)
def test_limits_of_a_launch(size: dict[str, tuple[int, int, int]], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        replace(Launch("op", "entry", (1, 1, 1), (1, 1, 1), ()), **size)


def test_largest_launch() -> None:
    launch = Launch("op", "entry", MAX_GRID, (1024, 1, 1), ())
    assert replace(launch, block=(4, 4, 64)).block == (4, 4, 64)


@pytest.mark.parametrize("op", OPS)
def test_launcher_has_the_signature_of_the_cpu(op: str) -> None:
    """The same names in the same order; `plan` takes them too."""
    module = import_module(f"rbe_gpu.gpu.{op}")
    names = list(inspect.signature(getattr(dispatch.CPU, op)).parameters)
    assert list(inspect.signature(getattr(module, op)).parameters) == names


@pytest.mark.parametrize("op", LAUNCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_launch_fits_its_kernel(op: str, shape: tuple[int, int], dtype: np.dtype) -> None:
    """The kernel exists, takes these arguments and that many threads; sizes of 2^31 and more arrive whole."""
    launch = LAUNCHES[op](shape, dtype)
    library(op).check(launch)
    assert prod(launch.block) % 32 == 0
    if op in ("softmax", "layer_norm", "rms_norm", "l2_normalize"):
        assert (launch.params["rows"], launch.params["cols"]) == shape
    elif op == "mean_pool":
        assert (launch.params["seq"], launch.params["batch"], launch.params["cols"]) == (3, *shape)
    elif op == "rope":
        assert (launch.params["seq"], launch.params["half"], launch.params["head_dim"] // 2) == (
            *shape,
            shape[1],
        )
        assert launch.params["count"] * (1 if "_single" in launch.entry else 16 // dtype.itemsize) == prod(
            shape
        )
    else:
        assert launch.params["count"] == prod(shape)


@pytest.mark.parametrize("op", LAUNCHES)
def test_every_kernel_is_used(op: str) -> None:
    """By some shape, type and alignment; and no other kernel is asked for."""
    launches = [
        LAUNCHES[op](shape, dtype, offset)
        for shape in SHAPES
        for dtype in registry.DTYPES.values()
        for offset in (0, 1)
    ]
    if op == "gelu":
        x = [virtual((4, 64), dtype, offset) for dtype in registry.DTYPES.values() for offset in (0, 1)]
        launches += [launch_for("gelu")(a, None, "tanh", a) for a in x]
    if op == "rope":
        for dtype in registry.DTYPES.values():
            launches += [rope((1, 3, 2, 64), dtype, offset, interleaved=True) for offset in (0, 1)]
    assert {launch.entry for launch in launches} == set(library(op).index)


# --- rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("threads", [512, 1024])
@pytest.mark.parametrize("in_chunks", [True, False])
def test_teams_hold_their_rows(itemsize: int, threads: int, in_chunks: bool) -> None:
    """Every column has a thread, and all but the last warp of a large team has work."""
    for cols in [*range(1, 1100), 2048, 4096, 5000, 8192, 8193, 16384, 16385, 32768, 32769, 10**6, 2**40]:
        rows = share_rows(1000, cols, itemsize, in_chunks, threads)
        team, teams, _ = rows.block
        assert team * teams % 32 == 0
        assert ("_single" in rows.entry) == (not in_chunks or cols * itemsize % 16 != 0)
        if rows.entry.endswith("_long"):
            assert teams == 1
            assert cols > threads * (8 if "_single" in rows.entry else 32)
            continue
        items = int(rows.entry.rpartition("_")[2])
        assert team * items >= cols
        if team <= 32:
            assert team & (team - 1) == 0
            assert team * teams == 128
            assert team == 1 or team * items < 2 * cols
        else:
            assert teams == 1
            assert team <= threads
            assert (team - 32) * items < cols


@pytest.mark.parametrize("rows", [1, 4, 5, 1000, BIG - 1, BIG, BIG + 1, 2**40])
@pytest.mark.parametrize("cols", [8, 1024, 1032, 10**6])
def test_grid_of_rows(rows: int, cols: int) -> None:
    """As many blocks as the rows need, or as a grid can have."""
    share = share_rows(rows, cols, 4, True, 1024)
    assert share.grid[0] == min(-(-rows // share.block[1]), BIG - 1)
    assert share.grid[1:] == (1, 1)


def test_alignment_of_every_array_counts() -> None:
    """Of x, of out, of a gain, of a residual."""
    shape = (4, 64)
    assert softmax(shape).entry == "softmax_f32_8"
    assert softmax(shape, offset=1).entry == "softmax_f32_single_8"
    assert norm("rms_norm", shape).entry == "rms_norm_f32_8"
    assert norm("rms_norm", shape, weight=virtual((64,), offset=1)).entry == "rms_norm_f32_single_8"
    assert norm("rms_norm", shape, residual=virtual(shape, offset=1)).entry == "rms_norm_f32_single_8"
    bias = virtual((64,), np.float16, offset=4)
    assert norm("layer_norm", shape, bias=bias).entry == "layer_norm_f32_single_8"


def test_gains_of_any_type() -> None:
    """The type travels as a number; a type that is neither float32 nor that of x is read one by one."""
    entries = ("layer_norm_f16_8", "layer_norm_f16_8", "layer_norm_f16_single_8")
    for code, (dtype, entry) in enumerate(zip(registry.DTYPES.values(), entries, strict=True)):
        launch = norm("layer_norm", (4, 64), np.float16, weight=virtual((64,), dtype), bias=virtual((64,)))
        assert (launch.params["weight_type"], launch.params["bias_type"]) == (code, 0)
        assert launch.entry == entry


@pytest.mark.parametrize(
    ("mask", "kind", "strides"),
    [
        (None, 0, (0, 0)),
        (virtual((4, 64)), 3, (64, 1)),
        (virtual((4, 64), offset=1), 1, (64, 1)),
        (np.broadcast_to(virtual((64,)), (4, 64)), 3, (0, 1)),
        (np.broadcast_to(virtual((4, 1)), (4, 64)), 1, (1, 0)),
        (virtual((64, 4)).T, 1, (1, 4)),
        (virtual((4, 64))[:, ::-1], 1, (64, -1)),
        (virtual((4, 65))[:, :64], 1, (65, 1)),
        (virtual((4, 64), bool), 4, (64, 1)),
        (virtual((4, 64), bool, offset=1), 2, (64, 1)),
        (virtual((4, 65), bool)[:, :64], 2, (65, 1)),
        (np.broadcast_to(virtual((1, 1), bool), (4, 64)), 2, (0, 0)),
    ],
)
def test_mask_of_softmax(mask: Any, kind: int, strides: tuple[int, int]) -> None:
    launch = softmax((4, 64), mask=mask)
    assert launch.params["mask_kind"] == kind
    assert (launch.params["mask_row_stride"], launch.params["mask_col_stride"]) == strides
    library("softmax").check(launch)


def test_mask_over_two_gigabytes() -> None:
    shape = (BIG, 64)
    mask = virtual((64, BIG)).T
    launch = softmax(shape, mask=mask)
    assert (launch.params["mask_row_stride"], launch.params["mask_col_stride"]) == (1, BIG)


# --- elements -----------------------------------------------------------------------------------------


def test_divider_is_exact() -> None:
    rng = random.Random(7)
    divisors = {1, 2, 3, 5, 2**31 - 1, 2**31, 2**31 + 1, 2**62, 2**62 + 1}
    divisors |= {2**k + d for k in range(2, 62) for d in (-1, 0, 1)} | {
        rng.randrange(1, 2**40) for _ in range(500)
    }
    for d in divisors:
        factor, shift = (int(divider(d)[field]) for field in ("factor", "shift"))
        tops = (2**63 - 1, (2**63 - 1) // d * d, (2**63 - 1) // d * d - 1)
        for n in {0, 1, d - 1, d, d + 1, *tops, *(rng.randrange(2**63) for _ in range(20))}:
            assert (n if not factor else n * factor >> 64 >> shift) == n // d


@pytest.mark.parametrize("op", ["gelu", "silu", "swiglu", "dropout", "add"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid_of_elements(op: str, shape: tuple[int, int]) -> None:
    """A thread for every chunk, as far as a grid goes."""
    launch = LAUNCHES[op](shape, np.dtype(np.float16))
    chunk = 1 if "_single" in launch.entry else 8
    assert launch.grid == (min(-(-prod(shape) // (256 * chunk)), BIG - 1), 1, 1)


def test_rows_of_elements() -> None:
    """Chunks are whole parts of rows only where rows matter: with a bias, and in swiglu."""
    x, bias = virtual((4, 33)), virtual((33,))
    silu = launch_for("silu")
    assert silu(x, None, x).entry == "silu_f32"
    assert silu(x, bias, x).entry == "silu_f32_single"
    assert silu(virtual((4, 32)), virtual((32,)), virtual((4, 32))).entry == "silu_f32"
    params = silu(x, bias, x).params
    assert (params["by_cols.factor"], params["by_cols.shift"]) == divider(33).values
    params = silu(virtual((4, 32)), virtual((32,)), virtual((4, 32))).params
    assert (params["by_cols.factor"], params["by_cols.shift"]) == (1 << 63, 2)
    assert launch_for("swiglu")(virtual((4, 66)), None, x).entry == "swiglu_f32_single"
    assert launch_for("swiglu")(virtual((4, 64)), None, virtual((4, 32))).entry == "swiglu_f32"
    assert launch_for("gelu")(x, None, "tanh", x).entry == "gelu_f32_tanh"


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "half", "chunk"),
    [
        (64, 32, 8),
        (128, 64, 8),
        (80, 16, 8),
        (34, 17, 1),
        (64, 31, 1),
        (68, 32, 1),
        (24, 4, None),
        (24, 12, None),
    ],
)
def test_units_of_rope(head_dim: int, half: int, chunk: int | None, interleaved: bool) -> None:
    """Of 16 bytes, twice 16 where pairs are halves; None: half is a multiple of 4, so only neighbours fill them."""
    launch = rope((2, 5, 3, head_dim), np.float16, half=half, interleaved=interleaved)
    chunk = (8 if interleaved else 1) if chunk is None else chunk
    assert launch.entry == f"rope_f16{'_interleaved' * interleaved}{'_single' * (chunk == 1)}"
    pairs = chunk // 2 if interleaved and chunk > 1 else chunk
    params = launch.params
    assert params["units"] == half // pairs + (head_dim - 2 * half) // chunk
    assert params["count"] == 30 * params["units"]
    assert launch.grid == (-(-30 * int(params["units"]) // 256), 1, 1)
    for name, divisor in (("by_units", params["units"]), ("by_heads", 3), ("by_seq", 5)):
        assert (params[f"{name}.factor"], params[f"{name}.shift"]) == divider(int(divisor)).values


def test_rope_in_place_copies_nothing() -> None:
    x = virtual((2, 5, 3, 80), np.float16)
    tables = [virtual((5, 16))] * 2
    assert launch_for("rope")(x, *tables, None, False, x).params["units"] == 2
    assert launch_for("rope")(x, *tables, None, False, virtual(x.shape, x.dtype)).params["units"] == 2 + 6


@pytest.mark.parametrize("name", ["cos", "sin", "out"])
def test_alignment_of_every_array_of_rope_counts(name: str) -> None:
    shape = (2, 5, 3, 64)
    array = virtual(shape if name == "out" else (5, 32), np.float32, 1)
    assert rope(shape).entry == "rope_f32"
    assert rope(shape, **{name: array}).entry == "rope_f32_single"


@pytest.mark.parametrize(("dtype", "wide"), [(np.int64, 1), (np.int32, 0)])
def test_positions_of_rope(dtype: Any, wide: int) -> None:
    positions = virtual((10,), dtype)
    params = rope((2, 5, 3, 64), positions=positions).params
    assert params["positions"] is positions
    assert (params["wide"], params["max_positions"]) == (wide, 5)


@pytest.mark.parametrize(("p", "threshold", "factor"), [(0.0, 0, 1.0), (0.5, 2**31, 2.0), (1.0, 2**32, 0.0)])
def test_threshold_of_dropout(p: float, threshold: int, factor: float) -> None:
    x = virtual((8,))
    params = launch_for("dropout")(x, p, 2**64 - 1, 2**64 - 2, None, x).params
    assert (params["threshold"], params["factor"]) == (threshold, factor)
    assert (params["seed"], params["offset"]) == (2**64 - 1, 2**64 - 2)


# --- the loader ---------------------------------------------------------------------------------------


def headers(text: str) -> list[str]:
    return re.findall(r'#include "(\w+\.(?:cuh|h))"', text)


@pytest.mark.parametrize("op", SOURCES)
def test_source_holds_every_header_once(op: str) -> None:
    """The headers that an op includes, and theirs, line by line as they are in the files."""
    wanted, seen = [f"{op}.cu"], []
    while wanted:
        name = wanted.pop(0)
        seen.append(name)
        wanted += [h for h in headers(_source.read(name)) if h not in (*seen, *wanted)]
    lines: dict[str, dict[int, str]] = {name: {} for name in seen}
    name, number = "", 0
    for line in _source.source(op).splitlines():
        if place := re.fullmatch(r'#line (\d+) "(\S+)"', line):
            number, name = int(place[1]), place[2]
            continue
        assert number not in lines[name], f"{name}:{number} stands twice"
        lines[name][number] = line
        number += 1
    for name, text in lines.items():
        for number, line in enumerate(_source.read(name).splitlines(), 1):
            assert text.get(number, "") == ("" if headers(line) else line)


def test_a_small_kernel_does_not_compile_codecs() -> None:
    text = _source.source("silu")
    assert "struct Codes" not in text
    assert "synthesise" not in text
    assert "mma_16x8x16" not in text


@pytest.mark.parametrize("op", SOURCES)
def test_sources_include_headers_of_this_folder_only(op: str) -> None:
    text = _source.source(op).replace('#include "device.hpp"', "")
    assert "#include" not in text


@pytest.mark.parametrize("op", SOURCES)
def test_source_opens_with_its_equation_and_says_the_rest(op: str) -> None:
    text = (ROOT / "cuda_src" / f"{op}.cu").read_text()
    head = text.partition("#include")[0]
    assert "=" in head.splitlines()[0]
    words = ("Arrays", "Ownership", "Launch", "Shared", "Bytes", "Accuracy")
    places = [head.find(f"\n// {word} ") for word in words]
    assert -1 not in places, f"{op}.cu lacks one of {words}"
    assert places == sorted(places)


def test_numpy_users_do_not_import_cupy() -> None:
    program = (
        "import sys, numpy, rbe_gpu, rbe_gpu.gpu._load\n"
        "rbe_gpu.softmax(numpy.ones((2, 3), numpy.float32))\n"
        "assert 'cupy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@dataclass
class Pointer:
    ptr: int
    device_id: int


class Array:
    """What the loader knows of a cupy.ndarray."""

    dtype = np.dtype(np.float32)

    def __init__(self, device: int = 0) -> None:
        self.data = Pointer(4096, device)


class Kernel:
    shared_size_bytes = 256

    def __init__(self, cupy: FakeCupy, name: str) -> None:
        self.cupy, self.name = cupy, name
        self.max_dynamic_shared_size_bytes = (48 << 10) - self.shared_size_bytes
        self.preferred_shared_memory_carveout = -1

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "CUDA_ERROR_INVALID_VALUE"
        self.cupy.calls.append((self.cupy.current, self.name, grid, block, args, shared_mem))


class FakeCupy(ModuleType):
    """Records what the loader asks CuPy for."""

    def __init__(self, capability: str = "90") -> None:
        super().__init__("cupy")
        fake = self
        self.ndarray = Array
        self.current = 0
        self.modules: list[tuple[str, tuple[str, ...]]] = []
        self.kernels: dict[str, Kernel] = {}
        self.calls: list[Any] = []

        class Device:
            compute_capability = capability
            attributes = {"MaxSharedMemoryPerBlockOptin": 232_448}  # noqa: RUF012

            def __init__(self, index: int) -> None:
                self.index = index

            def __enter__(self) -> None:
                self.before, fake.current = fake.current, self.index

            def __exit__(self, *error: object) -> None:
                fake.current = self.before

        self.cuda = SimpleNamespace(Device=Device, runtime=SimpleNamespace(getDevice=lambda: fake.current))

    def RawModule(self, code: str = "", options: tuple[str, ...] = (), path: str = "") -> Any:
        self.modules.append((code, options) if code else (path, ("path",)))
        make = lambda name: self.kernels.setdefault(name, Kernel(self, name))  # noqa: E731
        return SimpleNamespace(get_function=make, compile=lambda: self.load(path))

    def load(self, path: str) -> None:
        """Stands for CUDA reading a file of a binary."""


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    fake = FakeCupy()
    yield from _installed(fake, monkeypatch)


def _installed(fake: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    monkeypatch.setitem(sys.modules, "cupy", fake)
    _load._module.cache_clear()
    monkeypatch.setattr(_load, "_kernels", {})
    yield fake
    _load._module.cache_clear()


THREE_FIELDS = Struct("ThreeFields", x="const void*", bias="const void*", count="i64")


def launch_of(entry: str = "softmax_f32_8", device: int = 0, shared: int = 0, op: str = "softmax") -> Launch:
    params = THREE_FIELDS.fill(x=Array(device), bias=None, count=3)
    return Launch(op, entry, (2, 1, 1), (32, 1, 1), params, shared)


def test_kernels_are_compiled_once_and_launched_in_order(cupy: FakeCupy) -> None:
    _execute.run(launch_of(), launch_of("softmax_f32_16"))
    _execute.run(launch_of())
    kernels = [_launch.Kernel("softmax", name) for name in ("softmax_f32_8", "softmax_f32_16")]
    assert cupy.modules == [(_source.kernel_source(kernel), ("-std=c++17",)) for kernel in kernels]
    assert [name for _, name, *_ in cupy.calls] == ["softmax_f32_8", "softmax_f32_16", "softmax_f32_8"]
    _, _, grid, block, args, shared = cupy.calls[0]
    assert (grid, block, shared) == ((2, 1, 1), (32, 1, 1), 0)
    assert isinstance(args[0], Array)
    assert args[1:] == (np.uint64(0), np.int64(3))  # CuPy would take None for no parameter at all
    assert isinstance(args[1], np.uint64)


@pytest.mark.usefixtures("cupy")
def test_numpy_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match=r"softmax_f32_8 got no cupy\.ndarray"):
        _execute.run(softmax((4, 64)))


def test_launch_on_the_device_of_the_arrays(cupy: FakeCupy) -> None:
    _execute.run(launch_of(device=1), launch_of(device=0))
    assert [device for device, *_ in cupy.calls] == [1, 0]
    assert cupy.current == 0
    assert len(cupy.modules) == 2


def test_shared_memory_over_48_kilobytes(cupy: FakeCupy) -> None:
    """Asked for when it is needed, and not again; more than the device has is an error. The kernel's static 256 bytes
    count."""
    _execute.run(launch_of(shared=(48 << 10) - 256))
    kernel = cupy.kernels["softmax_f32_8"]
    assert kernel.max_dynamic_shared_size_bytes == (48 << 10) - 256
    _execute.run(launch_of(shared=48 << 10))
    assert kernel.max_dynamic_shared_size_bytes == 48 << 10
    _execute.run(launch_of(shared=100_000))
    assert kernel.max_dynamic_shared_size_bytes == 100_000
    _execute.run(launch_of(shared=60_000))
    assert kernel.max_dynamic_shared_size_bytes == 100_000
    with pytest.raises(RuntimeError, match="needs 232449 bytes of shared memory, GPU 0 has 232448"):
        _execute.run(launch_of(shared=232_448 - 255))
    assert len(cupy.calls) == 4


@pytest.mark.parametrize(("static", "dynamic", "percent"), [
    (256, 0, -1), (0, (16 << 10) - 1, -1), (256, (16 << 10) - 256, 100), (16 << 10, 0, 100), (0, 65536, 100),
])  # fmt: skip
def test_share_of_shared_memory(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, static: int, dynamic: int, percent: int
) -> None:
    """Kernels that work in shared memory ask for all of it, whatever the driver would choose; -1 is its choice."""
    monkeypatch.setattr(Kernel, "shared_size_bytes", static)
    _execute.run(launch_of(shared=dynamic))
    assert cupy.kernels["softmax_f32_8"].preferred_shared_memory_carveout == percent


@pytest.mark.parametrize("shared", [20_000, 60_000])
def test_share_of_shared_memory_of_a_later_launch(cupy: FakeCupy, shared: int) -> None:
    _execute.run(launch_of(), launch_of(shared=shared))
    assert cupy.kernels["softmax_f32_8"].preferred_shared_memory_carveout == 100


HOPPER = _launch.Kernel("attention_wgmma", "attention_wgmma_f16_64", (("AttentionParams.capped", 0),))


def test_kernels_of_one_architecture_are_compiled_once_and_loaded_from_a_file(
    cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuPy compiles for sm_90, without what only sm_90a has; its getCUBIN leaves out the last byte."""
    asked: list[tuple[str, tuple[str, ...]]] = []
    nvrtc = SimpleNamespace(
        NVRTCError=RuntimeError,
        getVersion=lambda: (13, 0),
        createProgram=lambda source, name, headers, includes: source,
        compileProgram=lambda program, options: asked.append((program, options)),
        getProgramLog=lambda program: "",
        getCUBIN=lambda program: b"binary",
        destroyProgram=lambda program: None,
    )
    cuda = ModuleType("cupy.cuda")
    cuda.nvrtc = nvrtc  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    for _ in range(2):
        _load._module(HOPPER, 0)
        _load._module.cache_clear()
    ((source, options),) = asked
    assert source == _source.kernel_source(HOPPER)
    assert options == ("-std=c++17", "-ftz=true", "--device-as-default-execution-space", "-arch=sm_90a")
    ((path, kind), again) = cupy.modules
    assert (path, kind) == again
    assert kind == ("path",)
    assert Path(path).read_bytes() == b"binary\0"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [Path(path).name]


@pytest.mark.parametrize("why", ["in memory", "not a folder"])
def test_a_binary_that_is_not_kept_is_loaded_from_a_temporary_file(
    why: str,
    cupy: FakeCupy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    loaded: list[tuple[Path, bytes]] = []
    cupy.load = lambda path: loaded.append((Path(path), Path(path).read_bytes()))
    monkeypatch.setattr(_load, "_compile", lambda kernel, architecture: b"binary")
    monkeypatch.setattr(_load, "_binary_path", lambda kernel, architecture: folder / "a.cubin")
    folder = tmp_path / "cache"
    if why == "in memory":
        monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    else:
        monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
        folder.write_text("a file")
    _load._module(HOPPER, 0)
    ((path, binary),) = loaded
    assert binary == b"binary\0"
    assert path.parent != folder
    assert not path.exists()
    if why == "in memory":
        assert not recwarn.list
        assert not folder.exists()
    else:
        (warning,) = recwarn.list
        assert str(warning.message).startswith(
            "attention_wgmma_f16_64 is compiled again by the next process: "
        )
        assert str(folder) in str(warning.message)


def test_a_damaged_binary_is_named(cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.cubin"
    path.write_bytes(b"bin")

    def load(path: str) -> None:
        raise RuntimeError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")

    cupy.load = load
    monkeypatch.setattr(_load, "_binary_path", lambda kernel, architecture: path)
    with pytest.raises(
        RuntimeError, match=rf"{path} does not load: CUDA_ERROR_INVALID_IMAGE.*; delete the file"
    ):
        _load._module(HOPPER, 0)


@pytest.mark.parametrize("capability", ["70", "61", "52"])
def test_old_gpus_are_refused(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for fake in _installed(FakeCupy(capability), monkeypatch):
        with pytest.raises(RuntimeError, match=rf"compute capability {capability[0]}\.{capability[1]}.*7\.5"):
            _execute.run(launch_of())
        assert not fake.modules


@pytest.mark.parametrize("capability", ["75", "90", "100", "120"])
def test_new_gpus_are_taken(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for fake in _installed(FakeCupy(capability), monkeypatch):
        _execute.run(launch_of())
        assert len(fake.calls) == 1


def test_a_launch_that_does_not_fit_is_refused_on_the_host() -> None:
    launch = softmax((4, 64))
    with pytest.raises(KernelError, match="takes 9 arguments, got 3"):
        library("softmax").check(replace(launch, params=launch_of().params))
