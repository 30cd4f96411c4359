"""Every case of `tests/cases` on every backend, against `reference` within the tolerances of `registry`."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from rbe_gpu import DenseCodes, SparseCodes, Workspace, blocks, ops, reference, registry, transforms
from rbe_gpu.codecs.sparse import INDEX_KINDS

from . import real
from .cases import CASES, Args, Case, ErrorCase
from .cases._weights import WEIGHTS
from .conftest import TestBackend

VALID = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{dtype}".replace(" ", "_"))
    for op in registry.OPS.values()
    for case in CASES[op.name].cases
    for dtype in case.dtypes
]
INVALID = [
    pytest.param(op, case, id=f"{op.name}-{case.name}".replace(" ", "_"))
    for op in registry.OPS.values()
    for case in CASES[op.name].errors
]
OPS = [pytest.param(op, id=op.name) for op in registry.OPS.values()]


def fresh(backend: TestBackend, args: Args) -> Args:
    """A copy of the arguments that keeps each array's strides, on the backend."""
    return backend.put_all({k: _copied(v) if isinstance(v, np.ndarray) else v for k, v in args.items()})


def _copied(a: np.ndarray) -> np.ndarray:
    """A writable copy with the strides of `a`."""
    if a.flags.c_contiguous or a.size == 0:
        return a.copy()
    low, high = np.lib.array_utils.byte_bounds(a)
    memory = np.zeros(high - low, np.uint8)
    copy = np.ndarray(a.shape, a.dtype, memory, a.__array_interface__["data"][0] - low, a.strides)
    copy[...] = a
    return copy


def state(args: Args) -> dict[str, bytes]:
    """The bytes of every input array, including those of compressed weights."""
    data = {}
    for name, value in args.items():
        if isinstance(value, blocks.RBEBlocks):
            arrays = [] if value.basis is None else [value.basis]
            value.codes.map_arrays(lambda a, seen=arrays: seen.append(a) or a)
            data.update({f"{name}.{i}": a.tobytes() for i, a in enumerate(arrays)})
        elif isinstance(value, np.ndarray):
            data[name] = value.tobytes()
    return data


def inputs(op: registry.Op, args: Args) -> Args:
    return {k: v for k, v in args.items() if k not in op.outputs}


def as_tuple(value: Any) -> tuple[Any, ...]:
    """The results of an op as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in the reference
@pytest.mark.parametrize(("op", "case", "dtype"), VALID)
def test_value(backend: TestBackend, op: registry.Op, case: Case, dtype: str) -> None:
    """Value within tolerance; shape, dtype and array library as specified; inputs unchanged."""
    args = case.make(real, registry.DTYPES[dtype])
    expected = CASES[op.name].expected({k: v for k, v in args.items() if k != "dtype"})
    call = fresh(backend, args)
    before = state(inputs(op, args))
    returned = [name for name in expected if name not in op.outputs]
    results = dict(zip(returned, as_tuple(backend.op(op.name)(**call)), strict=True))
    assert all(isinstance(a, backend.array_type) for a in results.values())
    result = results["out"]
    shape, out_dtype = CASES[op.name].output_like(args, registry.DTYPES[dtype])
    assert tuple(result.shape) == shape
    assert result.dtype == out_dtype
    for name, want in expected.items():
        if name in results or name in args:
            value = backend.get(results[name] if name in results else call[name])
            assert value.shape == want.shape
            tol = op.tolerances[next(n for n, d in registry.DTYPES.items() if d == value.dtype)]
            error = registry.relative_error(value, want, tol.floor)
            assert error <= tol.rel, f"{name}: relative error {error:.3g} > {tol.rel:g} ({tol.why})"
    after = {k: backend.get(v) if isinstance(v, backend.array_type) else v for k, v in call.items()}
    assert state(inputs(op, after)) == before


@pytest.mark.parametrize(("op", "case", "dtype"), VALID)
def test_out(backend: TestBackend, op: registry.Op, case: Case, dtype: str) -> None:
    """`out=` is returned and holds the same bits, also with `out=x` where the op allows it."""
    args = case.make(real, registry.DTYPES[dtype])
    function = backend.op(op.name)
    plain = fresh(backend, args)
    want, *more = map(backend.get, as_tuple(function(**plain)))
    out = backend.put(
        np.full(*CASES[op.name].output_like(args, registry.DTYPES[dtype])[:1], np.nan, want.dtype)
    )
    call = fresh(backend, args)
    result, *others = as_tuple(function(**{k: v for k, v in call.items() if k != "dtype"}, out=out))
    assert result is out
    assert same_bits(backend.get(out), want)
    assert all(same_bits(backend.get(a), b) for a, b in zip(others, more, strict=True))
    for name in set(op.outputs) & set(args):
        assert same_bits(backend.get(call[name]), backend.get(plain[name]))
    if op.in_place is not None:
        call = fresh(backend, args)
        x = call[op.in_place]
        assert function(**call, out=x) is x
        assert same_bits(backend.get(x), want)


WITH_WORKSPACE = [p for p in VALID if p.values[0].workspace]


@pytest.mark.one_order
@pytest.mark.parametrize(("op", "case", "dtype"), WITH_WORKSPACE)
def test_workspace(backend: TestBackend, op: registry.Op, case: Case, dtype: str) -> None:
    """A workspace changes no bits, also when it is reused, and the second call allocates nothing."""
    args = case.make(real, registry.DTYPES[dtype])
    function = backend.op(op.name)
    call = fresh(backend, args)
    want = [backend.get(a) for a in as_tuple(function(**call))]
    workspace = Workspace()

    def check() -> None:
        results = [backend.get(a) for a in as_tuple(function(**call, workspace=workspace))]
        assert all(same_bits(a, b) for a, b in zip(results, want, strict=True))

    check()
    used = workspace.nbytes
    for part in (workspace, *workspace._parts.values()):
        for buffer in part._buffers.values():
            buffer.fill(0xFF)  # NaN in every float type: catches reads of uninitialised memory
    check()
    assert workspace.nbytes == used


@pytest.mark.one_order
@pytest.mark.parametrize(("op", "invalid"), INVALID)
def test_refused(backend: TestBackend, op: registry.Op, invalid: ErrorCase) -> None:
    """An invalid argument raises the case's exception, whose message names the cause."""
    args = CASES[op.name].invalid_args(invalid, real)
    with pytest.raises(invalid.error) as caught:
        backend.op(op.name)(**backend.put_all(args))
    assert type(caught.value) is invalid.error
    assert invalid.match in str(caught.value)


@pytest.mark.one_order
@pytest.mark.parametrize("op", OPS)
def test_valid_args(backend: TestBackend, op: registry.Op) -> None:
    """The call that the error cases change succeeds."""
    args = CASES[op.name].valid_args(real, registry.DTYPES["float32"])
    out = backend.put(np.empty(*CASES[op.name].output_like(args, registry.DTYPES["float32"])))
    assert backend.op(op.name)(**fresh(backend, args), out=out) is out


@pytest.mark.parametrize("op", OPS)
def test_signature(op: registry.Op) -> None:
    """The signature line is the function's."""
    parameters = inspect.signature(getattr(ops, op.name)).parameters.values()
    shown = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={getattr(p.default, '__name__', repr(p.default))}"
        for p in parameters
    )
    assert op.signature == f"{op.name}({shown})"


@pytest.mark.parametrize("op", OPS)
def test_reference_opens_with_an_equation(op: registry.Op) -> None:
    assert "=" in inspect.getdoc(getattr(reference, op.name)).splitlines()[0]


@pytest.mark.parametrize("op", OPS)
def test_names_are_unique(op: registry.Op) -> None:
    for items in (CASES[op.name].cases, CASES[op.name].errors):
        names = [item.name for item in items]
        assert len(set(names)) == len(names)


def test_cases_cover_every_form_of_a_weight() -> None:
    """Both kinds: every transform, block, dense width to 8 bits, sparse value and index; basis on and off."""
    for kind in ("matrix", "vectors"):
        weights = [w.blocks(real) for w in WEIGHTS if w.kind == kind]
        sparse = [m.codes for m in weights if isinstance(m.codes, SparseCodes)]
        assert {(m.transform, m.block) for m in weights} >= {
            (t, b) for t in transforms.TRANSFORMS for b in transforms.BLOCK_SIZES
        }
        assert {m.codes.bits for m in weights if isinstance(m.codes, DenseCodes)} >= set(range(2, 9))
        values = ("f32", "f16", "int8", "int4")
        assert {(c.value_kind, c.index_kind) for c in sparse} >= {(v, i) for v in values for i in INDEX_KINDS}
        assert {m.basis is None for m in weights} == {True, False}
