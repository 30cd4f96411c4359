"""A file that is overwritten while it is loaded: values may change, addresses may not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu.codecs import SparseCodes
from rbe_gpu.container import load_file, save_file
from rbe_gpu.mapped import MappedFile

from .bounded import REPOSITORY
from .compressed import FORMS, compressed
from .test_container import encoded

SPARSE = ("sparse-int4-delta", "sparse-f16-delta", "sparse-int3-bitmap", "sparse-f32-bitmap")


def overwrite(path: Path, byte: int) -> None:
    """Other bytes behind the header of a file, in place."""
    start = MappedFile(path).header_bytes
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes([byte]) * (path.stat().st_size - start))


@pytest.mark.parametrize("form", SPARSE)
def test_positions_are_copies(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file(path, {"w": encoded(form)})
    weight: Any = load_file(path)[0]["w"]
    codes = weight.codes
    assert isinstance(codes, SparseCodes)
    before = {name: np.array(a) for name, a in codes.arrays.items()} | {"row_start": codes.row_start.copy()}
    overwrite(path, 0xFF)
    assert not np.array_equal(codes.value, before["value"])  # so the mapping does show what was written
    for name in ("index", "count", "row_start"):
        if name in before:
            np.testing.assert_array_equal(getattr(codes, name), before[name])


RUN = """
import sys, warnings
import numpy as np
import rbe_gpu as rbe
from tests.test_changed_files import overwrite
from pathlib import Path
warnings.simplefilter("ignore")
for path in map(Path, sys.argv[1:]):
    weight = rbe.load_file(path)[0]["w"]
    overwrite(path, 0xFF)
    x = np.ones((9, weight.shape[-1]), np.float32)
    with np.errstate(all="ignore"):
        weight.decode()
        for tokens in (1, 9):
            rbe.linear(x[:tokens], weight)
        rbe.embedding(np.array([0, weight.shape[0] - 1]), weight)
    print(path.name)
"""


def test_kernels_on_overwritten_files(tmp_path: Path) -> None:
    """No form of codes makes a kernel read or write elsewhere. (Sparse ones ended in a segmentation fault.)"""
    for form in FORMS:
        save_file(tmp_path / form, {"w": compressed(form)})
    run = subprocess.run(
        [sys.executable, "-c", RUN, *(str(tmp_path / form) for form in FORMS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines() == list(FORMS)


def test_a_file_replaced_by_the_writer_is_not_the_mapped_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    weight = compressed("none int4 delta")
    save_file(path, {"w": weight})
    loaded: Any = load_file(path)[0]["w"]
    save_file(path, {"w": np.zeros(4, np.float32)})
    np.testing.assert_array_equal(loaded.decode(), weight.decode())
    assert list(rbe.load_file(path)[0]) == ["w"]
