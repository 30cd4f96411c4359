"""Nothing asks the network unless `hf://` says so, though huggingface_hub is installed (tokenizers brings it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .bounded import REPOSITORY

_GUARDED = """
import contextlib, io, json, sys
from pathlib import Path

asked = []

def guard(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        asked.append(event)
        raise OSError("the network was asked")

sys.addaudithook(guard)
import rbe_gpu
from rbe_gpu import cli

said = {}
for name in json.loads(sys.argv[1]):
    try:
        rbe_gpu.load(name)
    except Exception as error:
        said["load " + name] = f"{type(error).__name__}: {error}", asked[:]
    asked.clear()
    for line in (["embed", name, "texts", "-o", "out"], ["warmup", name, "--arch", "90"],
                 ["eval", "file", "--against", name]):
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr), contextlib.suppress(SystemExit):
            cli.app(line)
        said[line[0] + " " + name] = stderr.getvalue(), asked[:]
        asked.clear()
print(json.dumps(said))
"""
TYPOS = (
    "all-MiniLM-L6-v2",
    "sentence-transformers/all-MiniLM-L6-v2",
    "./models/minilm",
    "a/b/c",
    "minilm.bin",
)
ON_THE_HUB = "hf://sentence-transformers/all-MiniLM-L6-v2"


def test_a_mistyped_name_asks_nobody(tmp_path: Path) -> None:
    import huggingface_hub  # noqa: F401  the test would show nothing without it

    from rbe_gpu.models.compress import compress_model

    from .test_compress_model import make_model

    (tmp_path / "texts").write_text("a text\n", "utf-8")
    compress_model(make_model(tmp_path / "m"), tmp_path / "file", codes="dense-int4")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path / "cache")}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", _GUARDED, json.dumps([*TYPOS, ON_THE_HUB])]
    ran = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=True
    )
    said: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert len(said) == 4 * (len(TYPOS) + 1)
    for what, (message, asked) in said.items():
        if what.endswith(ON_THE_HUB):
            assert asked, what
            assert f"{ON_THE_HUB} cannot be downloaded: " in message
        else:
            assert asked == [], what
            assert "does not exist; pass a model folder or a .rbe.safetensors file" in message, (
                what,
                message,
            )
            assert ("; hf://sentence-transformers" in message) == (TYPOS[1] in what)
