"""What the package does with CuPy arrays, shown on a stand-in: dispatch, scratch memory, moving, foreign arrays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace, dispatch, registry

from . import real
from .compressed import FORMS, compressed, for_gpu, relative
from .conftest import place
from .host import stand_in


@pytest.fixture
def cupy():
    with stand_in.installed() as module:
        yield module


@pytest.fixture(scope="module")
def x():
    return np.ascontiguousarray(real.layer(0, "attention.self.query.weight")[:6, :96])


def test_an_op_runs_where_its_arrays_are(cupy, x):
    here, there = rbe.softmax(x), rbe.softmax(rbe.to(x, "cuda"))
    assert type(here) is np.ndarray
    assert isinstance(there, cupy.ndarray)
    assert relative(there.get(), here) < 1e-6


def test_results_stay_on_their_gpu(cupy, x):
    second = rbe.to(x, "cuda:1")
    assert second.device.id == 1
    with cupy.cuda.Device(1):
        assert rbe.gelu(second).device.id == 1


def test_arrays_on_two_devices_are_refused(cupy, x):
    gain = np.ones(96, np.float32)
    with pytest.raises(
        TypeError, match=r"x is on cuda:0 but weight is on cpu; move one of them \(rbe_gpu.to"
    ):
        rbe.rms_norm(rbe.to(x, "cuda"), gain)
    with pytest.raises(TypeError, match="x is on cuda:0 but weight is on cuda:1"):
        rbe.rms_norm(rbe.to(x, "cuda:0"), rbe.to(gain, "cuda:1"))


def test_foreign_arrays_are_taken_without_a_copy(cupy, x):
    held = x.copy()
    result = rbe.silu(stand_in.Foreign(held), out=stand_in.Foreign(held))
    assert isinstance(result, cupy.ndarray)
    assert np.may_share_memory(result, held)
    assert relative(held, rbe.silu(x)) < 1e-6


def test_foreign_bfloat16_is_known_by_its_typestr(cupy, x):
    """PyTorch says "<V2", which is any two bytes."""
    held = x.astype(registry.DTYPES["bfloat16"])
    result = rbe.silu(stand_in.Foreign(held))
    assert result.dtype == held.dtype
    np.testing.assert_array_equal(result.get(), rbe.silu(held))
    rbe.silu(stand_in.Foreign(held), out=stand_in.Foreign(held))
    np.testing.assert_array_equal(held, result.get())


def test_an_unknown_array_is_refused(x):
    with pytest.raises(TypeError, match=r"x is a builtins\.list"):
        rbe.softmax(x.tolist())


def test_scratch_memory_has_a_part_for_each_device(cupy):
    workspace = Workspace()
    assert workspace.on("cpu") is workspace
    part = workspace.on("cuda:0")
    assert workspace.on("cuda:0") is part
    a = part.get("a", (4, 8), np.float16)
    assert isinstance(a, cupy.ndarray)
    assert part.get("a", (4, 8), np.float16) is a
    workspace.get("a", (3,), np.float32)
    assert workspace.nbytes == 64 + 12
    workspace.clear()
    assert workspace.nbytes == 0


@pytest.mark.parametrize("form", FORMS)
def test_weights_move_as_they_are_stored(cupy, form):
    m = compressed(form)
    there = rbe.to(m, "cuda")
    assert there.device == "cuda:0"
    assert rbe.to(there, "cuda:0") is there
    assert there.nbytes == m.nbytes
    assert there.resident_nbytes == for_gpu(m).resident_nbytes
    back = rbe.to(there, "cpu")
    assert back.device == "cpu"
    np.testing.assert_array_equal(back.decode(), m.decode())


def test_layers_move_with_what_they_hold(cupy, x):
    norm = rbe.RBELayerNorm(np.linspace(0.5, 1.5, 96, dtype=np.float32), np.zeros(96, np.float32))
    there = rbe.to(norm, "cuda")
    assert isinstance(there.weight, cupy.ndarray)
    assert type(norm.weight) is np.ndarray
    assert relative(there(rbe.to(x, "cuda")).get(), norm(x)) < 1e-6


def test_a_cache_that_layers_share_is_one_cache_after_the_move(cupy, x):
    cache = rbe.PanelCache(1 << 20)
    layers = [rbe.RBELinear(x, cache=cache) for _ in range(4)]
    there = rbe.to(
        rbe.RBEAttention(*layers[:3], rbe.RBELinear(np.ones((96, 6), np.float32), cache=cache), 2), "cuda"
    )
    assert there.query.cache is there.output.cache is not cache
    assert there.query.cache.budget == 1 << 20


def test_devices_that_are_not_there(cupy, x):
    for device in ("gpu", "cuda:x", "cuda:-1", "CPU", ""):
        with pytest.raises(ValueError, match="unknown device"):
            rbe.to(x, device)
    with pytest.raises(ValueError, match="cuda:2 is not there; this machine has 2 GPUs"):
        rbe.to(x, "cuda:2")
    with pytest.raises(TypeError, match="pass a numpy or cupy array"):
        rbe.to("text", "cpu")


def test_without_cupy_the_message_says_what_to_install(x, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install 'rbe-gpu\[cuda13\]'"):
        rbe.to(x, "cuda")


def full(cupy, monkeypatch, name):
    """A GPU on which CuPy's `name` finds no room."""

    def refuse(*args, **kwargs):
        raise cupy.cuda.memory.OutOfMemoryError(4_000_000_000)

    monkeypatch.setattr(cupy, name, refuse, raising=False)


TOLD = r"out of memory: 4\.00 GB asked for, 250\.00 MB free of 80\.00 GB, 1\.00 GB held.*Use a smaller batch"


def test_a_full_gpu_says_what_was_asked_for_and_what_helps(cupy, x, monkeypatch):
    there = rbe.to(x, "cuda")
    full(cupy, monkeypatch, "empty")
    with pytest.raises(dispatch.DeviceMemoryError, match=f"^cuda:0 is {TOLD}"):
        rbe.softmax(there)
    with cupy.cuda.Device(1), pytest.raises(MemoryError, match=r"^cuda:1 is out of memory"):
        rbe.softmax(there)
    with pytest.raises(MemoryError, match=TOLD):
        Workspace("cuda:0").get("a", (4,))
    assert relative(rbe.softmax(there, out=there).get(), rbe.softmax(x)) < 1e-6  # needs no memory


def test_a_full_gpu_takes_no_array(cupy, x, monkeypatch):
    full(cupy, monkeypatch, "asarray")
    for value in (x, compressed("dct int4 b128"), rbe.RBELinear(x)):
        with pytest.raises(MemoryError, match=TOLD):
            rbe.to(value, "cuda")


def test_a_full_host_keeps_its_own_error(x, monkeypatch):
    error = MemoryError("Unable to allocate 4.00 GiB")

    def refuse(*_):
        raise error

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(MemoryError) as caught:
        rbe.softmax(x)
    assert caught.value is error


def test_strided_arrays_are_refused_with_the_name_of_their_library(cupy, x):
    with pytest.raises(ValueError, match=r"x is not C-contiguous; pass cupy\.ascontiguousarray\(x\)"):
        rbe.softmax(rbe.to(x, "cuda")[:, ::2])
    with pytest.raises(ValueError, match=r"x is not C-contiguous; pass numpy\.ascontiguousarray\(x\)"):
        rbe.softmax(x[:, ::2])


def test_the_tests_place_arrays_as_they_are(cupy):
    """Strides, shared memory and alignment of a case's arrays arrive on the GPU."""
    memory = np.arange(64, dtype=np.float32)
    args = {
        "a": memory[1:33].reshape(4, 8)[:, ::2],
        "b": memory[30:40],
        "c": memory[40:48][::-1],
        "row": np.broadcast_to(memory[:3], (5, 3)),
        "none": np.empty((0, 4), np.float16),
        "p": 0.5,
    }
    placed = place(cupy, args)
    assert list(placed) == list(args)
    assert placed["p"] == 0.5
    for name in ("a", "b", "c", "row", "none"):
        there = placed[name]
        assert isinstance(there, cupy.ndarray)
        assert (there.dtype, there.strides) == (args[name].dtype, args[name].strides)
        assert there.ctypes.data % 16 == args[name].ctypes.data % 16 or not there.size
        np.testing.assert_array_equal(there.get(), args[name])
    assert np.shares_memory(placed["a"], placed["b"])
    assert not np.shares_memory(placed["b"], placed["c"])
    placed["b"][0] = -1
    assert placed["a"][-1, -1] == args["a"][-1, -1]
    assert memory[30] == 30


def test_the_conformance_table_takes_cupy_arrays():
    """What `--backend cuda` runs on a GPU, on the stand-in: what is refused, and scratch memory."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_conformance.py"]
    command += ["--backend", "stand-in", "--op", "embedding,softmax", "-k", "test_refused or test_workspace"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_tests_that_need_a_gpu_take_cupy_arrays():
    """Those of them that need no device of its own, on the stand-in: grid codes, which the table leaves out."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_on_gpu.py"]
    command += ["--backend", "stand-in", "-k", "grid or not_there or beyond or clamped"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_gpu_that_is_asked_for_and_not_there_ends_the_run():
    script = "import sys; sys.modules['cupy'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "tests/test_conformance.py", "--backend", "cuda"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--backend cuda is not available" in done.stderr
