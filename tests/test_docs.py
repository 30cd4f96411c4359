"""The pages: commands and snippets work, messages and names are complete, and figures were measured.

Python blocks of a page run in order in one namespace, in a folder with a real model; so do the commands of a console
block, whose printed lines are compared but for their numbers. What takes minutes, the network or another library is
listed in `NOT_RUN` with the reason: its names, options, modules and targets are checked against the package all the
same. A Korean page has the code of its English one, which is the one that runs.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement

import rbe_gpu as rbe
from rbe_gpu.cli import _app

from . import error_messages
from .cli.command import run as run_command
from .host import capture
from .real import MODEL_DIR, smollm2

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "cuda_src" / "README.md")
)
TRAINED = ROOT / "reports" / "models" / "minilm-r16.rbe.safetensors"

MINUTES = "takes minutes"
NETWORK = "installs from the network"
OTHERS = "needs transformers or sentence-transformers; tests/test_torch_integration.py makes the same calls"
PLACEHOLDERS = "names files of the reader's own"

#: Blocks and commands that do not run, by page and a piece of their text; "" is the whole page.
NOT_RUN = {
    ("README.md", "--calibrate docstrings"): MINUTES,
    ("README.ko.md", "--calibrate docstrings"): MINUTES,
    ("README.md", "rbe-gpu generate"): MINUTES,
    ("README.md", "texts.txt -o vectors.npy"): PLACEHOLDERS,
    ("README.ko.md", "texts.txt -o vectors.npy"): PLACEHOLDERS,
    ("docs/first-steps.md", "pip install"): NETWORK,
    ("docs/first-steps.ko.md", "pip install"): NETWORK,
    (
        "docs/first-steps.md",
        "rbe-gpu eval",
    ): "embeds 512 texts with two models; tests/cli/test_eval.py runs it",
    (
        "docs/first-steps.ko.md",
        "rbe-gpu eval",
    ): "embeds 512 texts with two models; tests/cli/test_eval.py runs it",
    ("docs/calibrate.md", ""): MINUTES,
    ("docs/calibrate.ko.md", ""): MINUTES,
    ("docs/models.md", "--prompt-name query"): PLACEHOLDERS,
    ("docs/models.ko.md", "--prompt-name query"): PLACEHOLDERS,
    ("docs/decoders.md", "rbe-gpu"): MINUTES,
    ("docs/distill.md", ""): MINUTES,
    ("docs/pytorch.md", ""): OTHERS,
    ("docs/pytorch.md", "SentenceTransformer"): OTHERS,
}
COMMAND = re.compile(r"^(?:\$ )?((?:rbe-gpu|make|pip|python|pytest)\b .*)$")


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a page: its language ("" if indented), text and line."""

    page: str
    language: str
    text: str
    line: int

    def reason(self, text: str | None = None) -> str | None:
        """Why it, or one command of it, does not run."""
        for (page, piece), reason in NOT_RUN.items():
            if page == self.page and piece in (self.text if text is None else text):
                return reason
        return None


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in re.finditer(r"(?ms)^```([\w{}-]*)\n(.*?)^```$", text):
        yield Block(page, found[1], found[2], text[: found.start()].count("\n") + 1)
    plain = re.sub(r"(?ms)^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text)
    for found in re.finditer(r"(?m)(?:(?<=\n\n)|\A)(?:    \S.*\n|    .*\n)+", plain):
        block = re.sub(r"(?m)^    ", "", found[0])
        yield Block(page, "", block, plain[: found.start()].count("\n") + 1)


ALL = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in ALL if block.language == "python"]


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a block, continued lines joined, each with the lines that it prints."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    for i, line in enumerate(lines):
        found = re.match(r"^\$ (.*)$", line) if block.language == "console" else COMMAND.match(line)
        if found:
            printed = []
            for after in lines[i + 1 :]:
                if block.language != "console" or after.startswith("$ "):
                    break
                printed.append(after)
            yield re.sub(r"\s+# .*$", "", found[1]), "\n".join(printed)


SHELL = [
    (block, command, printed)
    for block in ALL
    if block.language in ("", "console")
    for command, printed in commands(block)
]


def _id(value: Any) -> str:
    return f"{value.page}:{value.line}" if isinstance(value, Block) else ""


def test_blocks_are_found() -> None:
    assert len(PYTHON) > 8
    assert len(SHELL) > 30
    assert {"docs/first-steps.md", "docs/calibrate.md", "README.md"} <= {block.page for block, _, _ in SHELL}


def test_every_reason_not_to_run_has_its_block() -> None:
    """Else a page has changed, and its new commands may be ones that could run."""
    for (page, piece), reason in NOT_RUN.items():
        texts = [b.text for b in PYTHON if b.page == page] + [c for b, c, _ in SHELL if b.page == page]
        assert any(piece in text for text in texts), f"{page}: nothing has {piece!r} ({reason})"


# --- what a command names ---------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TARGETS = set(re.findall(r"(?m)^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8")))


def _check_rbe_gpu(arguments: list[str]) -> None:
    """The command line parses: its command, options and values are ones that there are."""
    group = typer.main.get_command(_app.app)
    name, *rest = arguments
    if name.startswith("-"):
        group.make_context("rbe-gpu", arguments, resilient_parsing=False)
        return
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(f"rbe-gpu {name}", [a for a in rest if a != "..."])


@pytest.mark.parametrize(("block", "command"), [(b, c) for b, c, _ in SHELL], ids=_id)
def test_a_command_names_what_there_is(block: Block, command: str) -> None:
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if words[0] == "rbe-gpu":
        _check_rbe_gpu(words[1:])
    elif words[0] == "make":
        assert {w for w in words[1:] if "=" not in w} <= TARGETS
    elif words[:2] == ["pip", "install"]:
        for word in words[2:]:
            if word.startswith("rbe-gpu"):
                assert Requirement(word).extras <= PROJECT["optional-dependencies"].keys(), word
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None, words[2]


@pytest.mark.parametrize("block", [b for b in PYTHON if b.reason()], ids=_id)
def test_python_that_does_not_run_names_what_there_is(block: Block) -> None:
    """It compiles, and what it imports of this package and takes from `rbe` is there."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rbe_gpu"):
            spec = importlib.util.find_spec(node.module or "")
            assert spec is not None, node.module
            assert spec.origin is not None, node.module
            source = ast.parse(Path(spec.origin).read_text("utf-8"))
            defined = {n.name for n in source.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            assert {name.name for name in node.names} <= defined
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rbe":
            assert hasattr(rbe, node.attr), node.attr


# --- what runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, and the file of MiniLM at ratio 16 under the name that pages use."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "MODEL_DIR").symlink_to(MODEL_DIR)
    (folder / smollm2().name).symlink_to(smollm2())
    shutil.copy(TRAINED, folder / "minilm.rbe.safetensors")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("A cat sits on the mat.\nStocks fell sharply.\n")
    return folder


def _shape(text: str) -> str:
    """Printed text without its numbers, which differ between machines."""
    return re.sub(r"\d+(\.\d+)?", "0", " ".join(text.split()))


def _run(command: str, folder: Path) -> str:
    """Run one command in the current folder, `folder`; what it prints."""
    words = shlex.split(command)
    if words[0] == "rbe-gpu":
        if "-o" in words:
            (folder / words[words.index("-o") + 1]).unlink(missing_ok=True)
        result = run_command(*words[1:])
        assert result.exit_code == 0, result.stderr
        return result.stdout
    ran = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def _runs(page: str) -> bool:
    """Whether a page has anything that this test runs; that for GPU users has a test of its own."""
    here = [b for b in ALL if b.page == page and b.language in ("python", "console")]
    return not page.endswith(".ko.md") and page != "docs/gpu.md" and any(not b.reason() for b in here)


@pytest.mark.parametrize("page", [page for page in PAGES if _runs(page)])
def test_a_page_runs(page: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scratch)
    names: dict[str, Any] = {}
    if page == "docs/models.md":  # it speaks of any model and any texts
        names = {"model": rbe.load(TRAINED), "texts": ["A cat sits on the mat."]}
    expected: list[str] = []
    for block in sorted(blocks(page), key=lambda block: block.line):
        if block.language == "python" and "__main__" in block.text and not block.reason():
            (scratch / "script.py").write_text(block.text, encoding="utf-8")
            _run(f"{shlex.quote(sys.executable)} script.py", scratch)
        elif block.language == "python" and not block.reason():
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
            expected = out.getvalue().splitlines()
        elif block.language == "text" and expected:
            assert block.text.splitlines() == expected, f"{page}:{block.line}"
            expected = []
        elif block.language == "console":
            for command, printed in commands(block):
                if block.reason(command):
                    continue
                if command.startswith("ln "):  # the fixture has made the link
                    continue
                out_text = _run(command, scratch)
                for line in printed.splitlines():
                    assert _shape(line) in _shape(out_text), f"{page}:{block.line}: {line}"


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_the_readme_names_every_extra(page: str) -> None:
    named = set(re.findall(r"`(\w+)`", (ROOT / page).read_text(encoding="utf-8")))
    assert set(PROJECT["optional-dependencies"]) <= named


def test_the_lines_for_gpu_users_run(capsys: pytest.CaptureFixture[str]) -> None:
    """On the stand-in for CuPy."""
    [block] = [block for block in PYTHON if block.page == "docs/gpu.md"]
    with capture.installed():
        exec(compile(block.text, "docs/gpu.md", "exec"), {})
    assert capsys.readouterr().out == "(64, 1536) (2, 384)\n"


# --- completeness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", error_messages.PAGES, ids=lambda path: path.name)
def test_troubleshooting_lists_every_message(path: Path) -> None:
    """`python -m tests.error_messages write` brings the pages up to date."""
    wanted = error_messages.messages()
    listed = error_messages.Page.read(path).listed()
    assert len(wanted) > 600
    assert not wanted.keys() - listed.keys(), "messages that the page lacks"
    assert not listed.keys() - wanted.keys(), "messages that no code has"
    assert not [message for message, count in listed.items() if count > 1]


def test_both_troubleshooting_pages_have_the_same_groups() -> None:
    english, korean = (error_messages.Page.read(path) for path in error_messages.PAGES)
    assert english.groups == korean.groups
    assert len(english.groups) > 20


@pytest.mark.parametrize(
    "cause",
    [
        lambda: rbe.load("no-such-model"),
        lambda: rbe.compress([1.0]),  # type: ignore[list-item]
        lambda: rbe.linear([1.0], 2),  # type: ignore[arg-type]
        lambda: rbe.RBEDropout(p=2),
        lambda: rbe.load_file(ROOT / "README.md"),
        lambda: rbe.set_num_threads(10**6),
        lambda: rbe.to("x", "tpu"),
    ],
)
def test_messages_that_are_raised_are_listed(cause: Any) -> None:
    """The collector reads sources; this compares it with what really is raised."""
    with pytest.raises(Exception) as raised:  # noqa: PT011  of any kind: its message is what is tested
        cause()
    patterns = [re.escape(m).replace(error_messages.GAP, ".*") for m in error_messages.messages()]
    specific = [p for p in patterns if len(p.replace(".*", "")) > 12]
    assert any(re.search(p, str(raised.value)) for p in specific), raised.value


def test_a_message_that_is_not_listed_is_found(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        'WHY = "because"\n\n\ndef f(x):\n    problem = f"{x} is odd"\n    if x:\n'
        '        raise ValueError(problem)\n    fail(f"no {x} here")\n    raise KeyError(WHY)\n'
    )
    assert list(error_messages._messages_of(source)) == ["… is odd", "no … here", "because"]


def test_the_api_has_every_public_name() -> None:
    text = "".join(path.read_text("utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"(?m)^\.\. (?:auto)?\w+:: (?:rbe_gpu\.)?(\w+)$", text))
    assert documented >= set(rbe.__all__)


@pytest.mark.parametrize("page", ["docs/which-ratio.md", "docs/which-ratio.ko.md"])
def test_figures_were_measured(page: str) -> None:
    """Every figure with a decimal point, a unit or a percent sign is in the pages that report measurements."""
    sources = ("README.md", "docs/distill.md", "docs/decoders.md", "docs/models.md")
    measured = " ".join((ROOT / name).read_text("utf-8") for name in sources).replace(",", "")
    known = {float(n) for n in re.findall(r"\d+(?:\.\d+)?", measured)}
    figures = re.findall(r"\d+\.\d+|\d+(?=%| MB)", (ROOT / page).read_text("utf-8"))
    assert len(figures) > 50
    assert not [f for f in figures if float(f) not in known]


KOREAN = [page for page in PAGES if page.endswith(".ko.md") and "troubleshooting" not in page]


@pytest.mark.parametrize("page", KOREAN)
def test_a_korean_page_has_the_code_of_its_english_one(page: str) -> None:
    """Snippets, commands and what they print are the same; commands may be left out."""

    def code(of: str) -> list[tuple[str, str]]:
        shell = [(c, printed) for b, c, printed in SHELL if b.page == of and not c.startswith("make ")]
        return [(b.text, "") for b in ALL if b.page == of and b.language in ("python", "text")] + shell

    english = code(page.replace(".ko.md", ".md"))
    for text, printed in code(page):
        assert text in [known for known, _ in english], f"{page}: {text}"
        assert not printed or (text, printed) in english, f"{page}: {text}"
