"""The import graph of `rbe_gpu`: checks the layers (`make lint`), and draws docs/architecture.png.

    python -m tests.import_graph check    run import-linter with the contracts of pyproject.toml
    python -m tests.import_graph draw     write docs/architecture.png and the table in docs/architecture.md

In a checkout `cpu_fallback/`, `cuda_src/` and `reports/` stand beside `rbe_gpu/`, where import-linter does not look
for them, so both work on a copy laid out as in the wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("cpu_fallback", "cuda_src", "reports")
PICTURE = ROOT / "docs" / "architecture.png"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- layers:begin -->", "<!-- layers:end -->"


@contextmanager
def installed_layout() -> Iterator[Path]:
    """A folder that holds `rbe_gpu` with the mapped folders inside, as the wheel does."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "rbe_gpu"
        skip = shutil.ignore_patterns("__pycache__", "results", "templates")
        shutil.copytree(ROOT / "rbe_gpu", package, ignore=skip)
        for name in MAPPED:
            shutil.copytree(ROOT / name, package / name, ignore=skip)
        yield Path(folder)


def contract() -> list[tuple[str, ...]]:
    """The layers of pyproject.toml, highest first; the modules of one layer side by side."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = next(c["layers"] for c in config["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return [tuple(name.strip() for name in row.replace("|", ":").split(":")) for row in layers]


def edges() -> Counter[tuple[str, str]]:
    """(importer, imported) -> number of import statements, between the parts of the package that layers name."""
    with installed_layout() as folder:
        code = (
            "import grimp, json; g = grimp.build_graph('rbe_gpu', cache_dir=None);"
            "print(json.dumps([(i, d) for i in g.modules for d in g.find_modules_directly_imported_by(i)]))"
        )
        env = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=env, stdout=subprocess.PIPE, check=True
        )
    counts: Counter[tuple[str, str]] = Counter()
    for importer, imported in json.loads(done.stdout):
        a, b = (name.split(".")[1] if "." in name else "" for name in (importer, imported))
        if a and b and a != b:
            counts[a, b] += 1
    return counts


def check() -> int:
    """Run import-linter; its exit status."""
    lint = Path(sys.executable).with_name("lint-imports")
    with installed_layout() as folder:
        env = {**os.environ, "PYTHONPATH": str(folder)}
        command = [str(lint), str(ROOT / "pyproject.toml"), "--no-cache"]
        return subprocess.run(command, cwd=folder, env=env, check=False).returncode


def table() -> str:
    """Markdown: every layer with its modules, and the layers' modules that each imports."""
    used: dict[str, list[str]] = {}
    for importer, imported in sorted(edges()):
        used.setdefault(importer, []).append(imported)
    lines = ["| layer | module | imports |", "|---|---|---|"]
    for i, row in enumerate(contract()):
        for name in row:
            lines.append(f"| {i + 1} | `{name}` | {', '.join(f'`{u}`' for u in used.get(name, []))} |")
    return "\n".join(lines)


def updated(page: str) -> str:
    """The page with its table made anew."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def reduced(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The transitive reduction: without the imports of modules that are reached over another import anyway."""
    direct: dict[str, set[str]] = {}
    for importer, imported in pairs:
        direct.setdefault(importer, set()).add(imported)

    def below(name: str) -> set[str]:
        return {name}.union(*(below(n) for n in direct.get(name, ())))

    return sorted(
        (importer, imported)
        for importer, names in direct.items()
        for imported in names
        if not any(imported in below(other) for other in names - {imported})
    )


def draw() -> None:
    """Boxes by layer, highest on top, an arrow for each import of the transitive reduction; and the page's table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from PIL import Image  # matplotlib needs it

    layers = contract()
    width, height = 12.0, 1.05 * len(layers)
    figure, axes = plt.subplots(figsize=(width, height))
    place: dict[str, tuple[float, float]] = {}
    for i, row in enumerate(layers):
        y = height - 0.6 - 1.05 * i
        step = width / len(row)
        for k, name in enumerate(row):
            x = step * (k + 0.5)
            place[name] = x, y
            box = min(step - 0.25, 2.4)
            axes.add_patch(
                FancyBboxPatch(
                    (x - box / 2, y - 0.22), box, 0.44, boxstyle="round,pad=0.02",
                    facecolor="#e8eef7", edgecolor="#33527a", zorder=3,
                )
            )  # fmt: skip
            axes.text(x, y, name, ha="center", va="center", fontsize=10 if len(row) < 7 else 8.5, zorder=4)
    for importer, imported in reduced(edges()):
        (x0, y0), (x1, y1) = place[importer], place[imported]
        bend = 0.0 if y0 - y1 < 1.2 else 0.18  # past the boxes of the layers between
        arrow: Any = FancyArrowPatch(
            (x0, y0 - 0.24), (x1, y1 + 0.24), arrowstyle="-|>", mutation_scale=12, color="#5b6b7c", zorder=1,
            connectionstyle=f"arc3,rad={bend}",
        )  # fmt: skip
        axes.add_patch(arrow)
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    figure.savefig(PICTURE, dpi=110, bbox_inches="tight")
    with Image.open(PICTURE) as image:  # 64 colours: a quarter of the bytes
        image.convert("RGB").quantize(64).save(PICTURE, optimize=True)
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    commands = {"check": check, "draw": draw}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    sys.exit(commands[sys.argv[1]]())
