"""A small model and its compressed file, for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures.decoder_cases import write_with_tokenizer
from tests.test_compress_model import make_model

from .command import run


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("cli") / "minilm-cut")


@pytest.fixture(scope="package")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with random weights, a tokenizer of bytes and a chat template."""
    return write_with_tokenizer(tmp_path_factory.mktemp("decoder") / "model")


@pytest.fixture(scope="package")
def model_file(model_folder: Path) -> Path:
    out = model_folder.parent / "m.rbe.safetensors"
    result = run("compress", model_folder, "-o", out, "--codes", "dense-int6")
    assert result.exit_code == 0, result.stderr
    return out
