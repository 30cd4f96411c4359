"""The error messages of the package, read from its sources, and the pages that say what to do about each.

    python -m tests.error_messages          what docs/troubleshooting*.md lack, and what they list in vain
    python -m tests.error_messages write    put new messages where most others of their module are, drop old ones

A message is listed with `…` for whatever is filled in. Messages are what exceptions are made with, and what is passed
to the functions that raise one (`fail`, `usage`) or warn.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("rbe_gpu", "cpu_fallback", "reports")
PAGES = tuple(ROOT / "docs" / name for name in ("troubleshooting.md", "troubleshooting.ko.md"))

GAP = "…"
#: Functions that raise, by the number of their arguments; the places of a message are those of the arguments.
_SHAPES = {1: "{0}", 2: "{0} {1}", 3: "{0}={1}; needs {2}", 4: "{0} has {1}={2}; needs {3}"}
_RAISING = {"fail", "_fail", "usage", "warn"}
_EXCEPTION = re.compile(r"Error$|^(Failure|BadParameter|AlreadyReported|WrongResult)$")
#: Of these the first argument alone is the message.
_MESSAGE_FIRST = {"usage", "warn"}


def _text(node: ast.expr) -> str:
    """A string with its gaps; a gap for anything but a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return GAP


def _texts(node: ast.expr, around: list[ast.AST]) -> Iterator[str]:
    """What an argument may be: of a name what it is assigned, of a call what the function returns."""
    if isinstance(node, ast.IfExp):
        yield from _texts(node.body, around)
        yield from _texts(node.orelse, around)
    elif isinstance(node, ast.Name):
        for scope in around[-1:]:
            constants = around[0].body if isinstance(around[0], ast.Module) else []
            for inner in [*ast.walk(scope), *constants]:
                if isinstance(inner, ast.Assign | ast.AugAssign):
                    targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
                    if any(isinstance(t, ast.Name) and t.id == node.id for t in targets):
                        yield from _texts(inner.value, [])
    elif isinstance(node, ast.Call) and around:
        name = _name(node.func)
        for inner in ast.walk(around[0]):
            if isinstance(inner, ast.FunctionDef) and inner.name == name:
                for statement in ast.walk(inner):
                    if isinstance(statement, ast.Return) and statement.value is not None:
                        yield from _texts(statement.value, [])
    else:
        yield _text(node)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _calls(node: ast.AST, around: list[ast.AST]) -> Iterator[tuple[ast.Call, list[ast.AST]]]:
    """Calls that make a message, each with the module and the function that it is in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and child.name in _RAISING:
            continue  # it raises what it is called with
        inside = [*around[:1], child] if isinstance(child, ast.FunctionDef) else around
        if isinstance(child, ast.Call):
            name = _name(child.func)
            if name in _RAISING or _EXCEPTION.search(name):
                yield child, inside
        yield from _calls(child, inside)


def _messages_of(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for call, around in _calls(tree, [tree]):
        name, arguments = _name(call.func), call.args
        if not arguments:
            continue
        if name in _RAISING - _MESSAGE_FIRST and len(arguments) > 1:
            texts: Iterator[str] = iter([_SHAPES[len(arguments)].format(*map(_text, arguments))])
        elif name == "OSError" and len(arguments) > 1:
            texts = _texts(arguments[1], around)
        else:
            texts = _texts(arguments[0], around)
        for text in texts:
            line = re.sub(rf"{GAP}(\s*{GAP})+", GAP, " ".join(text.split()))
            if re.search(r"[a-z]{2}", line):  # all gaps: the message of another error, or of the system
                yield line


@cache
def messages() -> dict[str, list[str]]:
    """Every message of the package, with the source files that have it."""
    found: dict[str, list[str]] = {}
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for message in _messages_of(path):
                found.setdefault(message, []).append(str(path.relative_to(ROOT)))
    return found


@dataclass
class Page:
    """A page of groups: a heading, what to do, and the messages in a block of `text`.

    Attributes
    ----------
    parts : the text of the page, cut around its blocks
    groups : the messages of each block
    """

    parts: list[str]
    groups: list[list[str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Page:
        pieces = re.split(r"(?s)(?<=```text\n)(.*?)(?=```\n)", path.read_text(encoding="utf-8"))
        return cls(pieces[::2], [block.splitlines() for block in pieces[1::2]])

    def write(self, path: Path) -> None:
        blocks = ["".join(f"{message}\n" for message in group) for group in self.groups]
        text = "".join(part + block for part, block in zip(self.parts, [*blocks, ""], strict=True))
        path.write_text(text, encoding="utf-8")

    def listed(self) -> Counter[str]:
        return Counter(message for group in self.groups for message in group)

    def update(self, wanted: dict[str, list[str]]) -> list[str]:
        """Drop what the code does not say, add what it does; the messages that no group is known for."""
        self.groups = [sorted({m for m in group if m in wanted}, key=str.casefold) for group in self.groups]
        place = {m: i for i, group in enumerate(self.groups) for m in group}
        votes: dict[str, Counter[int]] = {}
        for message, i in place.items():
            for source in wanted[message]:
                votes.setdefault(source, Counter())[i] += 1
        unknown = []
        for message in wanted.keys() - place.keys():
            counts = sum((votes.get(source, Counter()) for source in wanted[message]), Counter[int]())
            if counts:
                self.groups[counts.most_common(1)[0][0]].append(message)
            else:
                unknown.append(message)
        for group in self.groups:
            group.sort(key=str.casefold)
        return unknown


def main(arguments: list[str]) -> int:
    wanted = messages()
    wrong = 0
    for path in PAGES:
        page = Page.read(path)
        if arguments == ["write"]:
            for message in page.update(wanted):
                print(f"{path.name}: no group is known for: {message}")
                wrong += 1
            page.write(path)
        else:
            listed = page.listed()
            for sign, names in (("+", wanted.keys() - listed.keys()), ("-", listed.keys() - wanted.keys())):
                for message in sorted(names):
                    print(f"{path.name}: {sign} {message}")
                    wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
