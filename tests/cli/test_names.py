"""Files and folders whose names are not UTF-8: commands work, and print the bytes escaped."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import real

from .command import run

SHOWN = "o\\udcf2ut"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, model_file: Path) -> Path:
    """A folder of such a name with a model, its compressed file, texts and a file to start training from."""
    folder = tmp_path_factory.mktemp("names") / os.fsdecode(b"o\xf2ut")
    folder.mkdir()
    shutil.copytree(model_folder, folder / "model")
    shutil.copy(model_file, folder / "file")
    (folder / "texts").write_text("".join(f"{text}\n" for text in real.texts()[:160]), "utf-8")
    line = (
        "compress",
        folder / "model",
        "-o",
        folder / "start",
        "--ratio",
        6,
        "--calibrate",
        folder / "texts",
    )
    result = run(*line)
    assert result.exit_code == 0, result.stderr
    assert f"{SHOWN}/start: " in result.stdout
    return folder


LINES = {
    "compress": "compress {}/model -o {}/new --codes dense-int4",
    "embed": "embed {}/file {}/texts -o {}/new",
    "distill": "distill {}/model -o {}/new --texts {}/texts --start {}/start --ratio 6 --steps 1 --batch-size 8",
    "inspect": "inspect {}/file",
    "eval": "eval {}/file --against {}/model --texts {}/texts --no-retrieval",
}


@pytest.mark.parametrize("command", LINES)
def test_what_is_printed(folder: Path, command: str) -> None:
    (folder / "new").unlink(missing_ok=True)
    arguments = [word.replace("{}", str(folder)) for word in LINES[command].split()]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert f"{SHOWN}/{'new' if '-o' in arguments else 'file'}" in result.stdout
    assert (folder / "new").exists() == ("-o" in arguments)


@pytest.mark.parametrize("command", LINES)
def test_json(folder: Path, command: str) -> None:
    (folder / "new").unlink(missing_ok=True)
    result = run(*(word.replace("{}", str(folder)) for word in LINES[command].split()), "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    path = next(values[key] for key in ("path", "out", "file") if key in values)
    assert Path(path).parent == folder


def test_embeddings(folder: Path) -> None:
    (folder / "new").unlink(missing_ok=True)
    assert run("embed", folder / "file", folder / "texts", "-o", folder / "new").exit_code == 0
    assert np.load(folder / "new").shape == (160, 96)


@pytest.mark.parametrize("command", ["inspect", "embed", "compress", "eval"])
def test_errors(folder: Path, command: str) -> None:
    """What is refused is named with the bytes escaped."""
    missing = folder / "missing"
    rest = {
        "embed": (folder / "texts", "-o", folder / "new2"),
        "compress": ("-o", folder / "new2", "--grade", "A"),
    }
    result = run(command, missing, *rest.get(command, ()))
    assert result.exit_code == 1
    assert f"{SHOWN}/missing" in result.stderr
    assert result.stderr.count("\n") == 1
