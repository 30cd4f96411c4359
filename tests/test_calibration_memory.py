"""Calibrated compression of models that are larger than memory: weights are mapped, and what is needed for each layer
is in files (`rbe_gpu.models.scratch`). The bytes of the result are those of a run that holds everything.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbe_gpu.feedback import Geometry
from rbe_gpu.models import corpus
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.journal import Journal
from rbe_gpu.models.scratch import Scratch

from . import gguf_files
from .architectures.decoder_cases import write_with_tokenizer
from .bounded import REPOSITORY
from .test_compress_model import make_model

MB = 1e6
#: prints the largest growth of the memory that Python and NumPy allocate in a run of a statement, for every folder.
#: The resident memory of the process varies by 60 MB between equal runs, as huge pages and sampling times fall;
#: mappings of files are in neither.
_MEASURED = """
import sys, tracemalloc
from rbe_gpu.models import corpus
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.load import load

def run(folder):
    {statement}

out, *folders = sys.argv[1:]
texts = corpus.calibration(24)
run(folders[0])
for folder in folders:
    tracemalloc.start()
    run(folder)
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def grown(statement: str, folders: list[Path], out: Path) -> list[int]:
    """Largest growth of memory in `statement`, which reads `folder`; it has run with the first folder before."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _MEASURED.format(statement=statement), *map(str, (out, *folders))],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [int(line) for line in run.stdout.split()]


def decoder(path: Path, layers: int) -> Path:
    """A million weights a layer, stored in float16."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 32}
    return write_with_tokenizer(path, np.float16, num_hidden_layers=layers, **sizes)


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Six layers more are 25 MB of float32 weights, whose codes are held to the end: 3 MB as bytes of the file, and
    packed in memory with 5 bits and more, 4 MB and their exceptions.
    """
    folders = [decoder(tmp_path / "few", 1), decoder(tmp_path / "many", 7)]
    few, many = grown("compress_model(folder, out, ratio=8, calibrate=texts)", folders, tmp_path / "out")
    assert many - few < 10 * MB, (few, many)


def test_load_maps_the_weights(tmp_path: Path) -> None:
    few, many = decoder(tmp_path / "few", 2), decoder(tmp_path / "many", 10)
    assert grown("model = load(folder)", [few, many], tmp_path)[1] < 0.1 * (
        (many / "model.safetensors").stat().st_size
    )


class _Held:
    """A `Scratch` that holds everything in memory."""

    def __init__(self, parent: Path | None = None) -> None:
        pass

    def array(self, a: Any) -> Callable[[], Any]:
        return lambda: a

    def mapped(self, a: Any) -> Any:
        return a

    def geometry(self, geo: Geometry) -> Callable[[], Geometry]:
        return lambda: geo


def _gguf(path: Path) -> Path:
    return gguf_files.small(path, "llama")


@pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")
@pytest.mark.parametrize(
    ("make", "ratio"),
    [(make_model, 6), (write_with_tokenizer, 3), (_gguf, 2)],
    ids=["BERT", "folder", "GGUF"],
)
def test_the_bytes_are_those_of_a_run_in_memory(
    make: Callable[[Path], Path], ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, texts = make(tmp_path / "model"), corpus.calibration(24)
    files = []
    for held in (False, True):
        if held:
            for module in ("calibrate", "calibrate_decoder", "compress"):
                monkeypatch.setattr(f"rbe_gpu.models.{module}.Scratch", _Held)
        files.append(tmp_path / f"{held}.rbe.safetensors")
        compress_model(source, files[-1], ratio=ratio, calibrate=texts)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_scratch(tmp_path: Path) -> None:
    """Arrays and geometries are read as they were; the folder goes when nothing can read it any more."""
    scratch = Scratch(tmp_path)
    rng = np.random.RandomState(0)
    panels = tuple(rng.rand(*shape).astype(np.float32) for shape in ((64, 100), (36, 36)))
    geometries = [
        Geometry("none", 32, rng.permutation(100), panels, rng.rand(100), target)
        for target in (None, rng.rand(100, 100).astype(np.float32))
    ]
    read = [scratch.geometry(geo) for geo in geometries]
    array, mapped = scratch.array(panels[0]), scratch.mapped(panels[1])
    [folder] = tmp_path.iterdir()
    del scratch
    gc.collect()
    for geo, again in zip(geometries, (f() for f in read), strict=True):
        assert (again.transform, again.block) == ("none", 32)
        for a, b in zip(
            (geo.order, geo.step, *geo.panels), (again.order, again.step, *again.panels), strict=True
        ):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        assert (geo.target is None) == (again.target is None)
    np.testing.assert_array_equal(read[1]().target, geometries[1].target)
    assert read[1]() is read[1]()
    np.testing.assert_array_equal(array(), panels[0])
    del read, again, array
    gc.collect()
    assert not folder.exists()
    np.testing.assert_array_equal(mapped, panels[1])


def test_scratch_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Journal(tmp_path / "out", {}, False) as journal:
            (journal.folder / "scratch-1").mkdir()
            journal.value("a", lambda: 1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    left = tmp_path / ".out.journal" / "scratch-1"
    assert left.exists()
    with Journal(tmp_path / "out", {}, True) as journal:
        assert journal.scratch == journal.folder
        assert not left.exists()
        assert journal.has_value("a")
