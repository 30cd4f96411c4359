"""Mixed English text for training and calibration, from what the system and the environment hold.

    python -m rbe_gpu.reports.corpus FOLDER [--also ROOT] [--site-packages DIR]

writes text files, one text a line, of 60 to 600 characters:

| file | texts |
|---|---|
| `training.txt` | docstrings of Python's library and of installed packages, manual pages, dictionaries, fortunes |
| `held-out.txt` | the same kinds, other documents: one of 16 |
| `other-kind.txt` | Debian's package descriptions, a kind that is in neither of the others |
| `other-package.txt` | docstrings of NumPy and typer, whose packages are in neither of the others |

A document (a docstring, a page, an entry) is training or held out with all its texts, by a hash of it; a text that
occurs on both sides, or in a set of another kind, is dropped from training. A kind gives at most `--most` training
texts, those of least hash, so that no kind outweighs the others. The docstrings of Python's library are split as in
`models/corpus.py`.

`--also` names a folder with an unpacked Debian package: `apt-get download dict-wn dict-gcide fortunes`, and
`dpkg -x FILE ROOT` for each, give WordNet, the dictionary GCIDE and fortunes, which cover the vocabulary's rarer
words.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rbe_gpu import output
from rbe_gpu.models import corpus
from rbe_gpu.models.corpus import MAX_CHARS, MIN_CHARS

OTHER_PACKAGES = ("numpy", "typer")
#: not English, or this project's own
_SKIPPED = {"rbe_gpu", "__pycache__", "nvidia"}
#: manual pages made from tables of options: 15,000 pages of one program say the same few sentences
_GENERATED = ("gcloud_",)
_HELD_OUT_PARTS = 16
MOST = 16000

_LETTERS = re.compile(r"[A-Za-z ,.;']")
_ROFF_ESCAPES = (
    (re.compile(r"\\f(\[[^]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s[-+]?\d+"), ""),
    (re.compile(r"\\\((aq|cq|oq|lq|rq|dq)"), "'"),
    (re.compile(r"\\\((em|en|hy|mi)"), "-"),
    (re.compile(r"\\[*]?(\(..|\[[^]]*\])"), ""),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\[&|^/,:%c]"), ""),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\(.)"), r"\1"),
)
#: requests of man(7) whose arguments are words of the sentence
_FONTS = {".B", ".I", ".BR", ".IR", ".BI", ".IB", ".RB", ".RI", ".SM", ".SB"}

Document = tuple[str, ...]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix in (".gz", ".dz") else data).decode("utf-8", "replace")


def _documents(pages: Iterable[Iterable[str]]) -> Iterator[Document]:
    """Pages as their paragraphs, white space collapsed; those of mostly letters."""
    for page in pages:
        texts = (" ".join(paragraph.split()) for paragraph in page)
        usable = tuple(text for text in texts if text and len(_LETTERS.findall(text)) >= 0.85 * len(text))
        if usable:
            yield usable


def _package_folders(site: Path, names: Sequence[str] | None) -> Iterator[Path]:
    for folder in sorted(site.iterdir()):
        wanted = folder.name not in (*OTHER_PACKAGES, *_SKIPPED) if names is None else folder.name in names
        if wanted and folder.is_dir() and "-info" not in folder.name:
            yield folder


def package_docstrings(sites: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[Document]:
    """The docstrings of installed packages: of `names`, or of all but OTHER_PACKAGES."""
    for site in sites:
        for folder in _package_folders(site, names):
            yield from _documents(corpus.docstrings(folder))


def _roff(text: str) -> Iterator[str]:
    """The paragraphs of a manual page of man(7)."""
    words: list[str] = []
    verbatim = False
    for line in text.splitlines():
        request, _, rest = line.partition(" ")
        if request in (".nf", ".EX"):
            verbatim = True
        elif request in (".fi", ".EE"):
            verbatim = False
        if (line.startswith((".", "'")) and request not in _FONTS) or not line.strip() or verbatim:
            yield " ".join(words)
            words.clear()
            continue
        if request in _FONTS:
            line = (
                rest.replace('"', "")
                if request in (".B", ".I", ".SM")
                else "".join(rest.replace('"', "").split(" "))
            )
        for pattern, replacement in _ROFF_ESCAPES:
            line = pattern.sub(replacement, line)
        words.append(line)
    yield " ".join(words)


def manuals(roots: Sequence[Path]) -> Iterator[Document]:
    """English manual pages."""
    for root in roots:
        for path in sorted(root.glob("usr/share/man/man[1-8]/*")):
            if path.is_file() and not path.name.startswith(_GENERATED):
                yield from _documents([_roff(_read(path))])


def dictionaries(roots: Sequence[Path]) -> Iterator[Document]:
    """The entries of dictionaries in the format of dictd: WordNet, GCIDE."""
    for root in roots:
        for path in sorted(root.glob("usr/share/dictd/*.dict.dz")):
            entries = re.split(r"\n(?=\S)", re.sub(r"\[[^]]*\]|[{}\\]", "", _read(path)))
            yield from _documents([entry[:MAX_CHARS]] for entry in entries)


def fortunes(roots: Sequence[Path]) -> Iterator[Document]:
    """Quotations."""
    for root in roots:
        for path in sorted(root.glob("usr/share/games/fortunes/*")):
            if path.is_file() and not path.suffix:
                yield from _documents([part] for part in _read(path).split("\n%\n"))


def descriptions(status: Path = Path("/var/lib/dpkg/status")) -> Iterator[Document]:
    """The descriptions of the Debian packages of this system."""
    if status.is_file():
        for match in re.finditer(r"^Description: (.*)\n((?: .*\n)+)", _read(status), re.MULTILINE):
            yield from _documents([re.split(r"\n \.\n", match[2])])


def _texts(documents: Iterable[Document]) -> set[str]:
    return {text for document in documents for text in document if MIN_CHARS <= len(text) <= MAX_CHARS}


def _by_hash(texts: Iterable[str], most: int | None = None) -> list[str]:
    return sorted(texts, key=_digest)[:most]


def is_held_out(document: Document) -> bool:
    return _digest(" ".join(document))[0] % _HELD_OUT_PARTS == 0


def collect(
    roots: Sequence[Path], sites: Sequence[Path], most: int = MOST
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts by file, and training texts by kind.

    Parameters
    ----------
    roots : folders that hold usr/share: / and unpacked packages
    sites : folders of installed packages
    most : training texts of one kind at most
    """
    other = {
        "other-kind": _texts(descriptions()),
        "other-package": _texts(package_docstrings(sites, OTHER_PACKAGES)),
    }
    held_out = set(corpus.held_out())
    training = {"docstrings of Python's library": set(corpus.calibration())}
    for kind, documents in (
        ("docstrings of packages", package_docstrings(sites)),
        ("manual pages", manuals(roots)),
        ("dictionaries", dictionaries(roots)),
        ("fortunes", fortunes(roots)),
    ):
        read = list(documents)
        held_out |= _texts(d for d in read if is_held_out(d))
        training[kind] = _texts(d for d in read if not is_held_out(d))
    excluded = held_out.union(*other.values())
    kinds = {kind: _by_hash(texts - excluded, most) for kind, texts in training.items()}
    files = {
        "training": _by_hash(set().union(*kinds.values())),
        "held-out": _by_hash(held_out),
        **{name: _by_hash(texts) for name, texts in other.items()},
    }
    return files, kinds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Collect English text for training.")
    parser.add_argument("folder", type=Path, help="where the text files go")
    parser.add_argument("--also", type=Path, action="append", default=[], help="an unpacked Debian package")
    parser.add_argument("--site-packages", type=Path, action="append", help="default: that of this Python")
    parser.add_argument("--most", type=int, default=MOST, help=f"training texts of one kind (default {MOST})")
    options = parser.parse_args(arguments)
    sites = options.site_packages or [Path(sysconfig.get_path("purelib"))]
    options.folder.mkdir(parents=True, exist_ok=True)
    files, kinds = collect([Path("/"), *options.also], sites, options.most)
    for kind, texts in kinds.items():
        print(f"{len(texts):6} training texts: {kind}")
    for name, texts in files.items():
        path = options.folder / f"{name}.txt"
        output.write_text(path, "".join(f"{text}\n" for text in texts))
        print(f"{path}: {len(texts)} texts")


if __name__ == "__main__":
    main()
