"""The names of `rbe_gpu`: where each comes from, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rbe_gpu as rbe

from .compressed import compressed

SOURCE = Path(rbe.__file__)
#: What a program that only imports the package does not load.
HEAVY = (
    "cupy huggingface_hub llvmlite ml_dtypes numba numpy rich safetensors tokenizers torch typer zstandard"
)


def run(code: str) -> str:
    """What a new process prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=SOURCE.parents[1]).stdout


def names_for_type_checkers() -> dict[str, str]:
    """name -> module, of the imports under `if TYPE_CHECKING`."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_the_table_of_modules_agrees_with_what_type_checkers_read() -> None:
    names = names_for_type_checkers()
    assert names.pop("evaluate") == "None"  # a module of the package
    assert names == rbe._MODULE_OF
    assert {*names, "evaluate"} == set(rbe.__all__)


@pytest.mark.parametrize("name", rbe.__all__)
def test_a_public_name_resolves(name: str) -> None:
    assert getattr(rbe, name) is not None
    assert name in dir(rbe)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'rbe_gpu' has no attribute 'conv2d'"):
        rbe.conv2d  # noqa: B018
    with pytest.raises(ImportError, match="conv2d"):
        from rbe_gpu import conv2d  # noqa: F401


def test_modules_of_public_names_are_attributes() -> None:
    assert run("import rbe_gpu; print(rbe_gpu.ops.linear is rbe_gpu.linear)") == "True\n"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, rbe_gpu; print(sorted({set(HEAVY.split())!r} & set(sys.modules)))"
    assert run(code) == "[]\n"


def test_importing_the_package_takes_milliseconds() -> None:
    """Its own processor time, the least of three processes: 3 to 10 ms where it was measured."""
    code = "from time import process_time as t; a = t(); import rbe_gpu; print(t() - a)"
    assert min(float(run(code)) for _ in range(3)) < 0.05


@pytest.mark.parametrize(("form", "loaded"), [("dct int4 b128", False), ("grid int2 b32", True)])
def test_only_grid_codes_load_zstandard(tmp_path: Path, form: str, loaded: bool) -> None:
    rbe.save_file(tmp_path / "file", {"w": compressed(form)})
    code = (
        "import sys, rbe_gpu as rbe\n"
        f"rbe.load_file({str(tmp_path / 'file')!r})[0]['w'].decode()\n"
        "print('zstandard' in sys.modules)"
    )
    assert run(code) == f"{loaded}\n"
