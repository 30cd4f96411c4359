"""The bytes of files on real weights do not change with the code that writes them, on every machine."""

from __future__ import annotations

import json
from pathlib import Path

import rbe_gpu as rbe

from . import golden

FILES = Path(__file__).with_name("golden_files.json")


def test_files_keep_their_bytes(tmp_path: Path) -> None:
    expected = json.loads(FILES.read_text())
    digests = golden.portable_files(rbe, tmp_path)
    assert len(digests) == 28
    assert digests == expected
