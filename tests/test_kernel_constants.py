"""Kernels compiled for their configuration: constants of a launch, text, and the same bits as with parameters."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from rbe_gpu import Workspace
from rbe_gpu.gpu import _source, decode, embedding, linear
from rbe_gpu.gpu._launch import Launch
from rbe_gpu.gpu._params import HEADERS
from rbe_gpu.kernel_struct import CONSTANT, Struct

from . import real
from .compressed import compressed, for_gpu
from .host.executor import HostExecutor
from .host.virtual import VirtualWorkspace, matrix, virtual

F16 = np.dtype(np.float16)
INNER = Struct("Inner", bits=CONSTANT, count="i64")
OUTER = Struct("Outer", x="const float*", inner=INNER, wide=CONSTANT)


def test_constants_are_no_parameters() -> None:
    x = np.zeros(1, np.float32)
    params = OUTER.fill(x=x, inner=INNER.fill(bits=4, count=9), wide=True)
    assert OUTER.constants == {"Inner.bits": 1, "Outer.wide": 3}
    assert params.constants == (4, 1)
    assert params.arguments == (x, 9)
    constants = {"Inner.bits": 4, "Outer.wide": 1}
    assert INNER.text(constants) == (
        "struct Inner {\n  static constexpr int bits = 4;\n  i64 count;\n};\n"
        "#define Inner_PARAMETERS i64 p_count\n#define Inner_VALUES {p_count}\n"
    )
    assert "#define Outer_PARAMETERS const float* p_x, i64 p_inner_count\n" in OUTER.text(constants)
    assert "#define Outer_VALUES {p_x, {p_inner_count}}\n" in OUTER.text(constants)
    assert "int p_inner_bits, i64 p_inner_count, int p_wide" in OUTER.text()


def test_a_constant_has_one_value_in_a_kernel() -> None:
    with pytest.raises(TypeError, match=r"Two: \['Inner.bits'\] stand in two of its structs"):
        Struct("Two", a=INNER, b=INNER)


def test_text_of_one_kernel() -> None:
    """The kernel, its constants, and all others as templates that nothing instantiates."""
    (launch,) = decode.launches(matrix(64, 128), virtual((64, 128), F16), VirtualWorkspace())
    kernel = launch.kernel
    assert (
        dict(kernel.constants).items() >= {"Codes.bits": 4, "Codes.group": 64, "DecodeParams.type": 1}.items()
    )
    text = _source.kernel_source(kernel)
    assert text.startswith('#define ONE_KERNEL\n#define CHOSEN_decode_64 , extern "C"\n')
    assert "  static constexpr int bits = 4;\n" in text
    assert text.count("CHOSEN_decode_64") == 1


def test_every_kernel_can_be_chosen() -> None:
    """Each is declared by KERNEL, and no source has another one."""
    for op in (
        "add",
        "attention",
        "decode",
        "embedding",
        "linear",
        "linear_few",
        "linear_transform",
        "linear_integers",
        "softmax",
    ):
        text = _source.read(f"{op}.cu")
        assert "__global__" not in text
        assert re.search(r"\bKERNEL\(", text)


def test_what_configures_a_kernel() -> None:
    """Widths, kinds, groups, blocks, transforms and dtypes are constants wherever they stand."""
    names = re.compile(r"(.*_)?(bits|kind|group|block|transform|type|layout|sides|activation|wide)$")
    specialised = (
        "codes",
        "decode",
        "embedding",
        "epilogue",
        "finish",
        "linear",
        "linear_few",
        "linear_transform",
        "linear_integers",
        "split_k",
    )
    for header in (f"{name}_params.h" for name in specialised):
        for struct in HEADERS[header]:
            for field, kind in struct.fields.items():
                assert (kind == CONSTANT) or not names.match(field), f"{struct.name}.{field}"


#: Forms whose kernels are compiled for their configuration: every kind of codes, matrices and vectors.
CONFIGURATIONS = ["dct int4 b128", "none int4 delta", "vectors int6 b32 basis", "grid int3 none"]


def outputs(form: str, run: HostExecutor) -> list[np.ndarray]:
    """decode, embedding and linear of a form, by an executor."""
    m: Any = for_gpu(compressed(form))
    ws, found = Workspace(), []

    def result(launches: tuple[Launch, ...], out: np.ndarray) -> None:
        run(launches)
        found.append(out)

    out = np.full((m.rows, m.cols), np.nan, F16)
    result(decode.launches(m, out, ws), out)
    ids = np.array([m.rows - 1, 0, -1], np.int64)
    out = np.full((3, m.cols), np.nan, np.float32)
    result(embedding.launches(ids, m, out, ws), out)
    for tokens, dtype, method in ((1, F16, None), (9, F16, None), (33, F16, "transform")):
        x = np.resize(real.activations(tokens), (tokens, m.cols)).astype(dtype)
        out = np.full((tokens, m.rows), np.nan, dtype)
        bias = np.resize(real.layer(3, "intermediate.dense.bias"), m.rows)
        result(linear.launches(x, m, bias, "gelu", None, out, ws, None, method), out)
    return found


@pytest.mark.parametrize("form", CONFIGURATIONS)
def test_same_bits_as_with_parameters(form: str) -> None:
    """The text that a GPU gets, and the one that takes the configuration as parameters, which all other tests run."""
    for one, other in zip(
        outputs(form, HostExecutor(specialised=True)), outputs(form, HostExecutor()), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_kernels_of_two_configurations_are_two_modules() -> None:
    kernels = {
        decode.launches(matrix(64, 128), virtual((64, 128), dtype), VirtualWorkspace())[0].kernel
        for dtype in (np.float32, F16)
    }
    assert len(kernels) == 2
