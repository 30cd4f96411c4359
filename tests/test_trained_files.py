"""The trained files of the repository, by what they say of text that no training or calibration has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu.evaluate import agreement
from rbe_gpu.models import corpus

from . import real

FOLDER = Path(__file__).parents[1] / "reports" / "models"
#: file -> ratio, mean cosine and top-10 overlap on 128 held-out docstrings of Python 3.11's library, each with its
#: standard deviation over texts
FILES = {
    "minilm-r16": (17.0, (0.980, 0.014), (0.855, 0.096)),
    "minilm-r24": (24.0, (0.965, 0.020), (0.811, 0.113)),
    "minilm-r32": (36.0, (0.941, 0.031), (0.758, 0.125)),
    "minilm-r50": (50.0, (0.862, 0.072), (0.625, 0.149)),
}
#: Another Python has other docstrings. The difference of two means of 128 has a standard error of an eighth of the
#: standard deviation: three of them.
ERRORS = 3 / 8


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return corpus.held_out(128)


@pytest.fixture(scope="module")
def dense(texts: list[str]) -> np.ndarray:
    return rbe.load(real.MODEL_DIR).embed(texts)


def test_every_file_is_evaluated() -> None:
    assert {path.name.partition(".")[0] for path in FOLDER.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_trained_file_is_as_good_as_documented(name: str, texts: list[str], dense: np.ndarray) -> None:
    path = FOLDER / f"{name}.rbe.safetensors"
    ratio, (cosine, cosine_spread), (overlap, overlap_spread) = FILES[name]
    stored = sum(real.weight(n).size * 4 for n in real.weight_names() if real.weight(n).dtype == np.float32)
    assert path.stat().st_size <= stored / ratio
    assert path.stat().st_size < 6e6
    quality = agreement(dense, rbe.load(path).embed(texts))
    assert quality.cosine_mean > cosine - ERRORS * cosine_spread
    assert quality.overlap_at_10 > overlap - ERRORS * overlap_spread
