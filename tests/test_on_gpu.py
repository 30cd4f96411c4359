"""CuPy arrays beyond the conformance table: every form of a weight, values that nothing looks at, streams, other
libraries, memory that runs out.

For `--backend cuda`; what needs no device of its own also runs with `--backend stand-in`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import dispatch, reference, registry

from . import real
from .compressed import FORMS, compressed
from .conftest import TestBackend

gpu = pytest.mark.gpu
device = pytest.mark.device
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
ALL_FORMS = pytest.mark.parametrize("form", FORMS)


def assert_close(backend: TestBackend, op: str, found: Any, expected: Any, dtype: str) -> None:
    tol = registry.OPS[op].tolerances[dtype]
    assert isinstance(found, backend.array_type)
    error = registry.relative_error(backend.get(found), np.asarray(expected, np.float64), tol.floor)
    assert error <= tol.rel, f"relative error {error:.3g} > {tol.rel:g} ({tol.why})"


# --- every form of a weight ---------------------------------------------------------------------------


@gpu
@ALL_FORMS
@DTYPES
def test_decode(backend: TestBackend, form: str, dtype: str) -> None:
    m = compressed(form)
    found = backend.op("decode")(backend.put(m), dtype=registry.DTYPES[dtype])
    assert_close(backend, "decode", found, reference.decode(m), dtype)


@gpu
@ALL_FORMS
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, "float32"), (5, "float16"), (16, "bfloat16"), (40, "float16"), (40, "float32")]
)
def test_linear(backend: TestBackend, form: str, tokens: int, dtype: str) -> None:
    m = compressed(form)
    x = np.resize(real.activations(tokens), (tokens, m.cols)).astype(registry.DTYPES[dtype])
    found = backend.op("linear")(backend.put(x), backend.put(m))
    assert_close(backend, "linear", found, reference.linear(x, reference.decode(m)), dtype)


@gpu
@ALL_FORMS
@pytest.mark.parametrize(("tokens", "dtype"), [(17, "float32"), (32, "float16"), (130, "bfloat16")])
@pytest.mark.parametrize("method", ["transform", "decode"])
def test_ways_of_linear(backend: TestBackend, form: str, tokens: int, dtype: str, method: str) -> None:
    m = compressed(form)
    x = np.resize(real.activations(tokens), (tokens, m.cols)).astype(registry.DTYPES[dtype])
    found = backend.op("linear")(backend.put(x), backend.put(m), method=method)
    assert_close(backend, "linear", found, reference.linear(x, reference.decode(m)), dtype)


@gpu
@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_96(backend: TestBackend, causal: bool, dtype: str) -> None:
    """A head_dim that the table leaves out, over several tiles of queries and keys."""
    rows = real.activations(600).reshape(-1)
    q, k, v = (np.resize(np.roll(rows, i), (1, 150, 2, 96)).astype(registry.DTYPES[dtype]) for i in range(3))
    found = backend.op("attention")(*(backend.put(a) for a in (q, k, v)), causal=causal)
    assert_close(backend, "attention", found, reference.attention(q, k, v, causal=causal), dtype)


@gpu
@ALL_FORMS
def test_embedding(backend: TestBackend, form: str) -> None:
    m = compressed(form)
    ids = np.resize(np.array([0, m.rows - 1, m.rows // 2, 0]), 9)
    found = backend.op("embedding")(backend.put(ids), backend.put(m))
    assert_close(backend, "embedding", found, reference.decode(m)[ids], "float32")


# --- values that nothing looks at ---------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("form", ["vectors int4 b64", "dct int4 b128", "dct f16 bitmap", "dense"])
def test_ids_that_are_not_there_give_rows_of_nan(backend: TestBackend, form: str) -> None:
    weight = real.layer(0, "output.dense.weight")[:300] if form == "dense" else compressed(form)
    rows = weight.shape[0]
    ids = np.array([0, rows, -1, rows - 1, 2**40])
    found = backend.get(backend.op("embedding")(backend.put(ids), backend.put(weight)))
    there = np.array([True, False, False, True, False])
    assert np.isnan(found[~there]).all()
    dense = weight if form == "dense" else reference.decode(weight)
    assert registry.relative_error(found[there], dense[ids[there]].astype(np.float64)) <= 2e-6


@gpu
def test_lengths_beyond_the_keys_are_cut(backend: TestBackend) -> None:
    q, k, v, _ = (np.ascontiguousarray(a[:2, :20]) for a in (*real.qkv(2)[:3], np.zeros((2, 20))))
    attention = backend.op("attention")
    found = attention(*(backend.put(a) for a in (q, k, v)), lengths=backend.put(np.array([25, -3])))
    expected = reference.attention(q, k, v, lengths=np.array([20, 0]))
    assert_close(backend, "attention", found, expected, "float32")


@gpu
@pytest.mark.parametrize("integers", [np.int64, np.int32])
def test_positions_that_are_not_there_are_clamped(backend: TestBackend, integers: type) -> None:
    x = real.qkv(1)[0][0, :6]
    angles = np.outer(np.arange(9), 10000.0 ** (-np.arange(16) / 16))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = np.array([0, 8, 9, -1, np.iinfo(integers).max, np.iinfo(integers).min], integers)
    rotated = backend.op("rope")(*(backend.put(a) for a in (x, cos, sin, positions)))
    assert_close(backend, "rope", rotated, reference.rope(x, cos, sin, np.clip(positions, 0, 8)), "float32")


# --- a GPU itself -------------------------------------------------------------------------------------


def delayed(cupy: Any, milliseconds: int) -> None:
    """Keep the current stream busy."""
    from rbe_gpu.reports.harness.timing import SPIN

    cupy.RawKernel(SPIN, "spin")((1, 1, 1), (1, 1, 1), (np.uint64(milliseconds * 10**6),))


@device
@pytest.mark.usefixtures("backend")
def test_work_is_queued_on_the_current_stream() -> None:
    """What an op reads is written late on its stream: an op on another stream would read what was there before."""
    import cupy

    host = real.activations(64)
    for stream in (cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream()):
        with stream:
            late, x = cupy.asarray(host), cupy.zeros(host.shape, np.float32)
            rbe.softmax(x)  # compiled before it counts
            stream.synchronize()
            delayed(cupy, 50)
            x[...] = late
            found = rbe.softmax(x)
            assert not stream.done  # nothing waited
            stream.synchronize()
        np.testing.assert_allclose(found.get(), reference.softmax(host), rtol=1e-5, atol=1e-7)


@device
@pytest.mark.usefixtures("backend")
def test_no_op_waits_for_the_gpu() -> None:
    import cupy

    m = rbe.to(compressed("dct int4 b128"), "cuda")
    x = cupy.asarray(np.resize(real.activations(4), (4, m.cols)))
    ids = cupy.asarray(np.arange(5))
    workspace = rbe.Workspace()
    cupy.cuda.Device().synchronize()  # what was copied there on the null stream
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for turn in range(3):  # by the third, CuPy's pool has every block that is asked for
            if turn == 2:
                delayed(cupy, 100)
            y = rbe.linear(x, m, workspace=workspace)
            rbe.softmax(y, out=y)
            rbe.decode(m, workspace=workspace)
            rbe.embedding(ids, m, workspace=workspace)
            if turn == 2:
                assert not stream.done
            stream.synchronize()


@device
@DTYPES
@pytest.mark.usefixtures("backend")
def test_tensors_of_pytorch_are_taken_as_they_are(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    import cupy

    host = real.activations(8).astype(registry.DTYPES[dtype])
    tensor = torch.from_numpy(host.astype(np.float32)).to(getattr(torch, dtype)).cuda()
    found = rbe.silu(tensor)
    assert isinstance(found, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(found), cupy.asnumpy(rbe.silu(rbe.to(host, "cuda"))))
    out = torch.zeros_like(tensor)
    rbe.silu(tensor, out=out)
    cupy.cuda.Device().synchronize()
    np.testing.assert_array_equal(out.float().cpu().numpy(), cupy.asnumpy(found).astype(np.float32))


@device
@pytest.mark.usefixtures("backend")
def test_dlpack_is_taken_as_it_is() -> None:
    import cupy

    class Capsule:
        """An array of a library that has DLPack alone."""

        def __init__(self, array: Any) -> None:
            self._array = array

        def __dlpack__(self, **given: Any) -> Any:
            return self._array.__dlpack__(**given)

        def __dlpack_device__(self) -> Any:
            return self._array.__dlpack_device__()

    x = cupy.asarray(real.activations(8))
    out = cupy.zeros_like(x)
    rbe.gelu(Capsule(x), out=Capsule(out))
    np.testing.assert_array_equal(cupy.asnumpy(out), cupy.asnumpy(rbe.gelu(x)))


@device
@pytest.mark.usefixtures("backend")
def test_memory_that_runs_out_is_told() -> None:
    import cupy

    with pytest.raises(dispatch.DeviceMemoryError, match=r"is out of memory: 4\.40 TB asked for, .* free of"):
        rbe.Workspace("cuda:0").get("too large", (1 << 42,), np.uint8)
    x = cupy.ones((4, 8), np.float32)
    assert rbe.softmax(x).get()[0, 0] == pytest.approx(0.125)  # the GPU goes on


@device
@pytest.mark.usefixtures("backend")
def test_a_queue_of_ops_is_captured_and_replayed() -> None:
    """With `out` and a workspace, a second call allocates nothing, so that a graph can hold it."""
    import cupy

    m = rbe.to(compressed("dct int4 b128"), "cuda")
    host = np.resize(real.activations(4), (4, m.cols))
    x = cupy.asarray(host)
    y, z = cupy.empty((4, m.rows), np.float32), cupy.empty((4, m.rows), np.float32)
    workspace = rbe.Workspace()

    def run() -> None:
        rbe.linear(x, m, activation="gelu", out=y, workspace=workspace)
        rbe.softmax(y, out=z)

    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        run()
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        x[...] = 2 * cupy.asarray(host)
        z.fill(0)
        graph.launch()
        stream.synchronize()
    product = reference.linear(2 * host, reference.decode(compressed("dct int4 b128")), activation="gelu")
    np.testing.assert_allclose(z.get(), reference.softmax(product), rtol=1e-4, atol=1e-6)


@device
@pytest.mark.usefixtures("backend")
def test_what_info_says_of_this_gpu() -> None:
    from rbe_gpu import machine

    gpus, why = machine.gpus()
    assert gpus, why
    state = machine.cupy_state()
    assert state["works"]
    assert not state["errors"]
    assert state["devices"] >= 1
    assert 0 < gpus[0]["free_bytes"] <= gpus[0]["memory_bytes"]
    assert "cupy" in sys.modules
