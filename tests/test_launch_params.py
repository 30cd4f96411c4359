"""Kernel parameters by name, and their C text."""

from __future__ import annotations

import subprocess
from typing import Any

import numpy as np
import pytest

from rbe_gpu.gpu._params import HEADERS
from rbe_gpu.kernel_struct import Struct

from .host import build

INNER = Struct("Inner", flag="int", count="i64")
OUTER = Struct("Outer", x="const float*", gain="float", inner=INNER, seed="u64", kind="u32")
X = np.zeros(3, np.float32)
VALUES: dict[str, Any] = {"x": X, "gain": 2, "seed": 2**64 - 1, "kind": 2**32 - 1}


def test_values_by_name_in_the_order_of_the_kernel() -> None:
    params = OUTER.fill(inner=INNER.fill(count=-(2**40), flag=True), **VALUES)
    assert params["x"] is X
    assert params["inner.count"] == -(2**40)
    assert params.values[1:] == (2.0, 1, -(2**40), 2**64 - 1, 2**32 - 1)
    types = (np.float32, np.int32, np.int64, np.uint64, np.uint32)
    assert tuple(map(type, params.values[1:])) == types


def test_no_array_is_a_null_pointer() -> None:
    params = OUTER.fill(inner=INNER.fill(flag=0, count=0), **{**VALUES, "x": None})
    assert params["x"] is None
    assert params.arguments[0] == 0
    assert type(params.arguments[0]) is np.uint64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flag": 1}, r"Inner: missing fields \['count'\], unknown fields \[\]"),
        ({"flag": 1, "count": 1, "size": 1}, r"Inner: missing fields \[\], unknown fields \['size'\]"),
        ({"flag": 1.5, "count": 1}, "Inner: the field flag is int, got float"),
        ({"flag": None, "count": 1}, "Inner: the field flag is int, got NoneType"),
    ],
)
def test_values_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        INNER.fill(**fields)


def test_numbers_are_no_pointers_and_structs_have_their_place() -> None:
    inner = INNER.fill(flag=0, count=0)
    with pytest.raises(TypeError, match=r"the field x is const float\*, got int"):
        OUTER.fill(inner=inner, **{**VALUES, "x": 4096})
    with pytest.raises(TypeError, match="the field inner is Inner, got Outer"):
        OUTER.fill(inner=OUTER.fill(inner=inner, **VALUES), **VALUES)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, np.int64(2**31)])
def test_integers_that_do_not_fit(value: Any) -> None:
    with pytest.raises(OverflowError):
        INNER.fill(flag=value, count=0)


def compile_text(text: str) -> str:
    types = "using u32 = unsigned; using i64 = long long; using u64 = unsigned long long;\n"
    types += "struct f16 { unsigned short bits; };\nstruct uint2 { unsigned x, y; };\n"
    command = [build.COMPILER, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=types + text, capture_output=True, text=True, check=False).stderr


def test_structs_are_made_of_the_parameters_of_their_kernels() -> None:
    """Braces without narrowing: another type, or two fields exchanged, is an error."""
    structs = {s.name: s for group in HEADERS.values() for s in group}
    assert len(structs) == sum(map(len, HEADERS.values()))
    everything = [INNER, OUTER, *structs.values()]
    text = "".join(s.text() for s in everything) + "".join(
        f"void take_{s.name}({s.name}_PARAMETERS) {{ const {s.name} p = {s.name}_VALUES; (void)p; }}\n"
        for s in everything
    )
    assert compile_text(text) == ""
    assert "narrowing" in compile_text(text.replace("{p_flag, p_count}", "{p_count, p_flag}"))
