"""Every op on every backend does what `spec.OPS` and `reference` say."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from rbe_gpu import Workspace, blocks, ops, reference, spec, transforms

from . import real
from .conftest import TestBackend

CASES = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{dtype}".replace(" ", "_"))
    for op in spec.OPS.values()
    for case in op.cases
    for dtype in case.dtypes
]
BAD = [
    pytest.param(op, bad, id=f"{op.name}-{bad.name}".replace(" ", "_"))
    for op in spec.OPS.values()
    for bad in op.bad
]
OPS = [pytest.param(op, id=op.name) for op in spec.OPS.values()]


def fresh(backend: TestBackend, args: spec.Args) -> spec.Args:
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


def state(args: spec.Args) -> dict[str, bytes]:
    """The bytes of every input array, those of compressed weights included."""
    found = {}
    for name, value in args.items():
        if isinstance(value, blocks.RBEBlocks):
            found.update({f"{name}.{k}": a.tobytes() for k, a in value.arrays.items()})
        elif isinstance(value, np.ndarray):
            found[name] = value.tobytes()
    return found


def inputs(op: spec.Op, args: spec.Args) -> spec.Args:
    return {k: v for k, v in args.items() if k not in op.outputs}


def several(value: Any) -> tuple[Any, ...]:
    """What an op returned, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the reference
@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_value(backend: TestBackend, op: spec.Op, case: spec.Case, dtype: str) -> None:
    """Value, shape, dtype and array library as specified; inputs as they were."""
    args = case.make(real, spec.DTYPES[dtype])
    expected = op.expected({k: v for k, v in args.items() if k != "dtype"})
    call = fresh(backend, args)
    before = state(inputs(op, args))
    returned = [name for name in expected if name not in op.outputs]
    found = dict(zip(returned, several(backend.op(op.name)(**call)), strict=True))
    assert all(isinstance(a, backend.array_type) for a in found.values())
    result = found["out"]
    shape, out_dtype = op.like(args, spec.DTYPES[dtype])
    assert tuple(result.shape) == shape
    assert result.dtype == out_dtype
    for name, want in expected.items():
        if name in found or name in args:
            value = backend.get(found[name] if name in found else call[name])
            assert value.shape == want.shape
            tol = op.tolerances[next(n for n, d in spec.DTYPES.items() if d == value.dtype)]
            error = spec.relative_error(value, want, tol.floor)
            assert error <= tol.rel, f"{name}: relative error {error:.3g} > {tol.rel:g} ({tol.why})"
    after = {k: backend.get(v) if isinstance(v, backend.array_type) else v for k, v in call.items()}
    assert state(inputs(op, after)) == before


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_out(backend: TestBackend, op: spec.Op, case: spec.Case, dtype: str) -> None:
    """`out=` is returned and holds the same bits; with `out=x`, too, where the op allows it."""
    args = case.make(real, spec.DTYPES[dtype])
    function = backend.op(op.name)
    plain = fresh(backend, args)
    want, *more = map(backend.get, several(function(**plain)))
    out = backend.put(np.full(*op.like(args, spec.DTYPES[dtype])[:1], np.nan, want.dtype))
    call = fresh(backend, args)
    result, *others = several(function(**{k: v for k, v in call.items() if k != "dtype"}, out=out))
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


WITH_WORKSPACE = [p for p in CASES if p.values[0].workspace]


@pytest.mark.one_order
@pytest.mark.parametrize(("op", "case", "dtype"), WITH_WORKSPACE)
def test_workspace(backend: TestBackend, op: spec.Op, case: spec.Case, dtype: str) -> None:
    """A used workspace gives the same bits, and the second call adds nothing to it."""
    args = case.make(real, spec.DTYPES[dtype])
    function = backend.op(op.name)
    call = fresh(backend, args)
    want = [backend.get(a) for a in several(function(**call))]
    workspace = Workspace()

    def check() -> None:
        found = [backend.get(a) for a in several(function(**call, workspace=workspace))]
        assert all(same_bits(a, b) for a, b in zip(found, want, strict=True))

    check()
    used = workspace.nbytes
    for part in (workspace, *workspace._parts.values()):
        for buffer in part._buffers.values():
            buffer.fill(0xFF)  # NaN in every float type: nothing may be read before it is written
    check()
    assert workspace.nbytes == used


@pytest.mark.one_order
@pytest.mark.parametrize(("op", "bad"), BAD)
def test_refused(backend: TestBackend, op: spec.Op, bad: spec.Bad) -> None:
    """A bad input raises what is promised, with a message that says what is wrong."""
    args = op.bad_args(bad, real)
    with pytest.raises(bad.error) as caught:
        backend.op(op.name)(**backend.put_all(args))
    assert type(caught.value) is bad.error
    assert bad.word in str(caught.value)


@pytest.mark.one_order
@pytest.mark.parametrize("op", OPS)
def test_base_is_good(backend: TestBackend, op: spec.Op) -> None:
    """What the bad inputs change is a call that works."""
    args = op.base(real, spec.DTYPES["float32"])
    out = backend.put(np.empty(*op.like(args, spec.DTYPES["float32"])))
    assert backend.op(op.name)(**fresh(backend, args), out=out) is out


@pytest.mark.parametrize("op", OPS)
def test_signature(op: spec.Op) -> None:
    """The signature line is the function's."""
    parameters = inspect.signature(getattr(ops, op.name)).parameters.values()
    shown = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={getattr(p.default, '__name__', repr(p.default))}"
        for p in parameters
    )
    assert op.signature == f"{op.name}({shown})"


@pytest.mark.parametrize("op", OPS)
def test_reference_opens_with_an_equation(op: spec.Op) -> None:
    assert "=" in inspect.getdoc(getattr(reference, op.name)).splitlines()[0]


@pytest.mark.parametrize("op", OPS)
def test_names_are_unique(op: spec.Op) -> None:
    for items in (op.cases, op.bad):
        names = [item.name for item in items]
        assert len(set(names)) == len(names)


def test_cases_cover_every_form_of_a_weight() -> None:
    """Both kinds: every transform, block, dense width to 8 bits, sparse value and index; basis on and off."""
    for kind in ("matrix", "vectors"):
        made = [w.blocks(real) for w in spec.WEIGHTS if w.kind == kind]
        sparse = [m.codes for m in made if isinstance(m.codes, blocks.SparseCodes)]
        assert {(m.transform, m.block) for m in made} >= {
            (t, b) for t in transforms.TRANSFORMS for b in transforms.BLOCK_SIZES
        }
        assert {m.codes.bits for m in made if isinstance(m.codes, blocks.DenseCodes)} >= set(range(2, 9))
        values = ("f32", "f16", "int8", "int4")
        assert {(c.value_kind, c.index_kind) for c in sparse} >= {
            (v, i) for v in values for i in blocks.INDEX_KINDS
        }
        assert {m.basis is None for m in made} == {True, False}
