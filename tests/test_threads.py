"""How many threads kernels use; two Python threads at once; forked processes; BLAS beside them.

Each test runs one of the functions below in a process of its own (`python -m tests.test_threads NAME`), because
threads are started once per process, and may be ended by the layer that gets them wrong.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from threadpoolctl import ThreadpoolController

import rbe_gpu as rbe

ROOT = Path(__file__).parent.parent
LAYERS = ("omp", "workqueue")  # the layers of Numba's wheels; both fail some of this without the gate


def passes(function: Callable[[], None], **variables: str) -> str:
    """Run `function` in a process of its own, with 4 threads where `variables` say nothing else; what it printed."""
    unset = ("RBE_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= {"NUMBA_NUM_THREADS": "4", **variables}
    command = [sys.executable, "-m", "tests.test_threads", function.__name__]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def in_thread(function: Callable[[], Any]) -> Any:
    """The result of `function`, called by another Python thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def several_ops() -> list[bytes]:
    """The bits that kernels of every sort give: flat, by rows, per thread scratch, decoding, and BLAS."""
    from . import real

    weight = real.layer(0, "attention.self.query.weight").copy()
    x = np.concatenate([weight, weight]).astype(np.float32)
    q = np.ascontiguousarray(x[:256].reshape(1, 256, 12, 32))
    grid, sparse = rbe.compress(weight, grade="B"), rbe.compress(weight, density=0.1, codes="sparse-int8")
    results = [
        rbe.gelu(x),
        rbe.silu(x),
        rbe.softmax(x),
        rbe.layer_norm(x, x[0].copy(), x[1].copy()),
        rbe.rms_norm(x, x[0].copy()),
        rbe.add(x, x),
        rbe.l2_normalize(x),
        rbe.mean_pool(x, cu_seqlens=np.array([0, 3, 700, 768])),
        rbe.rope(q, *np.cos([x[:256, :16], x[:256, 16:32]])),
        rbe.attention(q, q, q),
        rbe.decode(sparse),
        rbe.linear(x, grid, activation="gelu"),
    ]
    return [a.tobytes() for a in results]


def who(parts: int = 64) -> list[int]:
    """The threads that computed the parts of a kernel, each of which takes five milliseconds or more."""
    from rbe_gpu.cpu_fallback._parts import in_parts

    found = np.full(parts, -1, np.int64)
    if "who" not in _KERNELS:
        _KERNELS["who"] = in_parts(_who_share)
    _KERNELS["who"](parts, rbe.get_num_threads(), found)
    return sorted(set(found.tolist()))


_KERNELS: dict[str, Any] = {}


_this_thread = types.ExternalFunction("pthread_self", types.int64())
_wait = types.ExternalFunction("usleep", types.int32(types.int32))


def _who_share(found: Any, start: int, stop: int) -> None:
    for i in range(start, stop):
        found[i] = _this_thread()
        _wait(5000)


def _who(found: Any) -> None:
    for i in numba.prange(found.size):
        found[i] = _this_thread()
        _wait(5000)


# --- how many -----------------------------------------------------------------------------------------


def all_of_numba() -> None:
    assert rbe.get_num_threads() == 4
    assert len(who()) == 4
    assert in_thread(rbe.get_num_threads) == 4


@pytest.mark.parametrize("layer", LAYERS)
def test_as_many_as_numba_has(layer: str) -> None:
    passes(all_of_numba, NUMBA_THREADING_LAYER=layer)


def two_of_four() -> None:
    assert numba.get_num_threads() == 4
    for run in (lambda f: f(), in_thread):
        assert run(rbe.get_num_threads) == 2
        assert len(run(who)) == 2
    assert numba.get_num_threads() == 4, "Numba's own number was changed"


@pytest.mark.parametrize("layer", LAYERS)
def test_environment(layer: str) -> None:
    """`RBE_NUM_THREADS` holds in every Python thread, and leaves Numba's own number alone."""
    passes(two_of_four, NUMBA_THREADING_LAYER=layer, RBE_NUM_THREADS="2")


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_environment_makes_sense(value: str) -> None:
    env = {**os.environ, "RBE_NUM_THREADS": value}
    command = [sys.executable, "-c", "import rbe_gpu; rbe_gpu.get_num_threads()"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ValueError: RBE_NUM_THREADS={value!r} is not a number of threads" in done.stderr


def test_environment_asks_for_more_than_there_are() -> None:
    said = passes(all_of_numba, RBE_NUM_THREADS="6")
    assert "RuntimeWarning: RBE_NUM_THREADS=6, but Numba has 4 threads; kernels use 4" in said


def set_and_set_back() -> None:
    for count in (1, 3, np.int64(2), 4):
        rbe.set_num_threads(count)
        for run in (lambda f: f(), in_thread):
            assert run(rbe.get_num_threads) == count
            assert len(run(who)) == count
    for count in (0, -1, 5):
        with pytest.raises(ValueError, match=f"count={count} is outside 1 to 4"):
            rbe.set_num_threads(count)
    for count in (1.0, "2", None, True):
        with pytest.raises(TypeError):
            rbe.set_num_threads(count)  # type: ignore[arg-type]
    assert rbe.get_num_threads() == 4


@pytest.mark.parametrize("layer", LAYERS)
def test_set_num_threads(layer: str) -> None:
    passes(set_and_set_back, NUMBA_THREADING_LAYER=layer)


def numbas_own_setting() -> None:
    numba.set_num_threads(2)
    assert rbe.get_num_threads() == 2
    assert len(who()) == 2
    rbe.set_num_threads(3)
    assert rbe.get_num_threads() == 2
    assert in_thread(rbe.get_num_threads) == 3
    rbe.set_num_threads(1)
    assert len(who()) == 1
    rbe.set_num_threads(4)
    numba.set_num_threads(4)
    assert rbe.get_num_threads() == 4
    assert len(who()) == 4


def test_numbas_own_setting() -> None:
    """`numba.set_num_threads` holds for the thread that called it, beside ours."""
    passes(numbas_own_setting)


def numba_code_of_others() -> None:
    rbe.set_num_threads(1)
    assert len(who()) == 1
    found = np.zeros(64, np.int64)
    numba.njit(parallel=True)(_who)(found)
    assert len(set(found.tolist())) == 4
    assert len(who()) == 1


def test_numba_code_of_others_is_left_alone() -> None:
    passes(numba_code_of_others)


def same_bits_for_every_number() -> None:
    want = several_ops()
    for count in (1, 2, 3):
        rbe.set_num_threads(count)
        assert several_ops() == want


def test_the_number_changes_no_bit() -> None:
    passes(same_bits_for_every_number)


class _Guarded(rbe.Workspace):
    """A workspace with zeros behind its buffers."""

    def _allocate(self, nbytes: int) -> Any:
        whole = super()._allocate(nbytes + (1 << 16))
        whole[nbytes:] = 0
        self.__dict__.setdefault("behind", []).append(whole[nbytes:])
        return whole[:nbytes]


def number_raised_meanwhile() -> None:
    from rbe_gpu.cpu_fallback import linear

    w = np.sin(np.arange(1024 * 256, dtype=np.float32)).reshape(1024, 256)
    m, x = rbe.compress(w, codes="dense-int4", basis=False), w[:1] + 1
    want, ws = rbe.linear(x, m, method="transform"), _Guarded()
    matvec = linear.matvec

    def later(*args: Any) -> Any:
        rbe.set_num_threads(4)
        return matvec(*args)

    linear.matvec = later  # type: ignore[assignment]
    for _ in range(20):
        rbe.set_num_threads(1)
        assert np.array_equal(rbe.linear(x, m, method="transform", workspace=ws), want)
        assert not any(zeros.any() for zeros in ws.behind)  # type: ignore[attr-defined]


def test_another_thread_raises_the_number_before_the_call() -> None:
    """Scratch memory is for as many threads as come, not for as many as were asked for."""
    passes(number_raised_meanwhile)


# --- Python threads at once ---------------------------------------------------------------------------


def threads_at_once() -> None:
    want = several_ops()
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(4):
                if several_ops() != want:
                    wrong.append("other bits")
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong


@pytest.mark.parametrize("layer", LAYERS)
def test_python_threads_at_once(layer: str) -> None:
    passes(threads_at_once, NUMBA_THREADING_LAYER=layer)


def helpers_never_come() -> None:
    from rbe_gpu.cpu_fallback import _workers

    want = several_ops()
    rbe.set_num_threads(1)
    # the counters promise three helpers, of which none is awake: what a busy machine looks like to a caller
    _workers._state[_workers._LIMIT] = 4
    _workers._state[_workers._SLEEPING] = -100
    assert several_ops() == want


def test_a_caller_waits_only_for_claimed_parts() -> None:
    passes(helpers_never_come)


def _calls_at_once(model: Any, calls: list[Any], threads: int, count: int) -> list[object]:
    """`count` calls of `model.embed` in each of some threads at once; what went wrong."""
    want = [model.embed(call) for call in calls]
    ready = threading.Barrier(threads)
    wrong: list[object] = []

    def work(start: int) -> None:
        ready.wait()
        try:
            for i in range(start, start + count):
                if not np.array_equal(model.embed(calls[i % len(calls)]), want[i % len(calls)]):
                    wrong.append(i % len(calls))
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


def one_model_in_many_threads() -> None:
    from rbe_gpu.models.bert import BertEncoder

    from . import real

    tensors: dict[str, Any] = {
        n: real.weight(n) for n in real.weight_names() if "layer." not in n or "layer.0." in n
    }
    for name in [n for n, t in tensors.items() if "layer.0." in n and t.ndim == 2]:
        tensors[name] = rbe.compress(tensors[name], codes="dense-int4")
    lines = real.texts()[:6]
    calls = [lines[i : i + n] for n in (1, 2, 4) for i in range(0, len(lines) - n + 1, 2)]
    for cache_bytes in (0, 1 << 20):
        config = {**real.config(), "num_hidden_layers": 1}
        model = BertEncoder(tensors, config, real.tokenizer(), cache_bytes=cache_bytes)
        wrong = _calls_at_once(model, calls, threads=8, count=100)
        assert not wrong, wrong


def test_one_model_in_many_threads() -> None:
    """1,600 calls from eight threads, with and without a panel cache: the bits of one thread."""
    passes(one_model_in_many_threads)


# --- forked processes ---------------------------------------------------------------------------------


def _task(_: int = 0) -> tuple[int, list[bytes]]:
    return rbe.get_num_threads(), several_ops()


def _grandchild(_: int = 0) -> tuple[int, list[bytes]]:
    return child(_task)


def child(task: Callable[[], Any]) -> Any:
    """The result of `task` in a forked process."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=lambda: writer.send(task()))
    process.start()
    writer.close()
    try:
        result = reader.recv()
    except EOFError:
        result = "it sent nothing"
    process.join()
    assert process.exitcode == 0, f"status {process.exitcode}: {result}"
    return result


def forked_after_use() -> None:
    want = several_ops()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_task, range(4)) == [(1, want)] * 4
    assert child(_grandchild) == (1, want)
    assert several_ops() == want
    assert rbe.get_num_threads() == 4


def forked_before_use() -> None:
    count, found = child(_task)
    assert count == 4, "nothing was started before the fork, so the child has all threads"
    assert found == several_ops()


def forked_from_other_numba_code() -> None:
    """The parent has used Numba's threads, the child loads our kernels first."""
    numba.njit(parallel=True)(_who)(np.zeros(64, np.int64))
    assert "rbe_gpu.cpu_fallback._pool" not in sys.modules
    count, found = child(_task)
    assert count == 1
    assert found == several_ops()


def forked_while_a_kernel_runs() -> None:
    want = several_ops()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            rbe.gelu(np.ones((512, 512), np.float32))

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            assert child(_task) == (1, want)
    finally:
        stop.set()
        worker.join()


def forked_while_numbas_locks_are_held() -> None:
    from numba.np.ufunc import parallel

    want = several_ops()
    held, stop = threading.Event(), threading.Event()

    def hold() -> None:
        with parallel._backend_init_process_lock, parallel._backend_init_thread_lock:
            held.set()
            stop.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        assert child(_task) == (1, want)
    finally:
        stop.set()
        holder.join()


def number_of_a_forked_process() -> None:
    want = several_ops()

    def task() -> tuple[int, int, int, list[bytes]]:
        alone = len(who())
        rbe.set_num_threads(3)
        return alone, rbe.get_num_threads(), len(who()), several_ops()

    assert child(task) == (1, 3, 3, want)
    assert rbe.get_num_threads() == 4
    assert several_ops() == want


FORKS = (
    forked_after_use,
    forked_before_use,
    forked_from_other_numba_code,
    forked_while_a_kernel_runs,
    forked_while_numbas_locks_are_held,
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@needs_fork
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("function", FORKS, ids=lambda f: f.__name__)
def test_fork(function: Callable[[], None], layer: str) -> None:
    passes(function, NUMBA_THREADING_LAYER=layer)


@needs_fork
def test_number_of_a_forked_process() -> None:
    """A child has one thread, and starts others when it is told to."""
    passes(number_of_a_forked_process)


class _Rows:
    """A data set as `torch.utils.data.DataLoader` takes it, whose items kernels compute."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> np.ndarray:
        return rbe.gelu(rbe.decode(self.weight)[i * 48 : (i + 1) * 48])


def data_loader() -> None:
    from torch.utils.data import DataLoader

    from . import real

    rows = _Rows(rbe.compress(real.layer(0, "attention.self.query.weight"), grade="B"))
    want = [rows[i] for i in range(len(rows))]
    loader = DataLoader(rows, batch_size=None, num_workers=2, multiprocessing_context="fork")
    found = [np.asarray(item) for item in loader]
    assert len(found) == 8
    assert all(np.array_equal(a, b) for a, b in zip(found, want, strict=True))


@needs_fork
@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
def test_workers_of_a_pytorch_data_loader() -> None:
    passes(data_loader)


# --- BLAS ---------------------------------------------------------------------------------------------


@cache
def blas_libraries() -> list[Any]:
    """NumPy's: those that are loaded at the first call."""
    found: list[Any] = ThreadpoolController().select(user_api="blas").lib_controllers
    assert found, "these tests need a NumPy whose BLAS threadpoolctl knows"
    return found


def blas_threads(count: int | None = None) -> list[int]:
    """The numbers of threads of the BLAS libraries, after setting them to `count`."""
    for library in blas_libraries():
        if count is not None:
            library.set_num_threads(count)
    return [library.num_threads for library in blas_libraries()]


def blas_keeps_to_the_number() -> None:
    from rbe_gpu.threads import blas

    before = blas_threads(4)
    assert max(before) == 4
    rbe.set_num_threads(2)
    with blas:
        assert max(blas_threads()) == 2
        rbe.set_num_threads(1)
        with blas:
            assert max(blas_threads()) == 2, "one number for the process while anybody is inside"
        assert in_thread(blas_threads) == blas_threads()
    assert blas_threads() == before
    assert blas(blas_threads)() == [1] * len(before)
    with pytest.raises(ZeroDivisionError), blas:
        1 // 0  # noqa: B018
    assert blas_threads() == before


def test_blas_keeps_to_the_number() -> None:
    passes(blas_keeps_to_the_number)


def blas_inside_compress() -> None:
    from rbe_gpu import encode

    from . import real

    before, seen = blas_threads(4), []
    transform = encode._transform

    def watched(*args: Any) -> Any:
        seen.extend(blas_threads())
        return transform(*args)

    encode._transform = watched
    rbe.compress(real.layer(0, "attention.self.query.weight"), grade="B")
    assert set(seen) == {2}
    assert blas_threads() == before


def test_compress_keeps_blas_to_the_number() -> None:
    passes(blas_inside_compress, RBE_NUM_THREADS="2")


def blas_of_fewer_threads() -> None:
    from rbe_gpu.threads import blas

    one = blas_threads(1)
    with blas:
        assert blas_threads() == one
    assert blas_threads() == one


def test_blas_with_a_smaller_number_keeps_it() -> None:
    passes(blas_of_fewer_threads)


def blas_in_threads() -> None:
    from rbe_gpu.threads import blas

    before = blas_threads(4)
    rbe.set_num_threads(1)

    def work() -> None:
        for _ in range(2000):
            with blas:
                pass

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert blas_threads() == before


def test_blas_is_put_back_by_the_last_of_many_threads() -> None:
    passes(blas_in_threads)


if __name__ == "__main__":
    function = globals()[sys.argv[1]]
    assert callable(function)
    function()
