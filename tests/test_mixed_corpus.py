"""The mixed corpus: what is read from each source, and that no document is on two sides."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from rbe_gpu.reports import corpus as mixed

TAIL = "with enough further words behind it to be long enough for one text of the corpus"
MANUAL = rf""".TH LS 1
.SH NAME
ls \- list \fBfiles\fR {TAIL}
.PP
Sort by
.I time ,
newest first, {TAIL}
.nf
verbatim {TAIL}
.fi
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    share = tmp_path / "usr" / "share"
    files = {
        "man/man1/ls.1.gz": gzip.compress(MANUAL.encode()),
        "man/man1/gcloud_x.1.gz": gzip.compress(MANUAL.replace("list", "generated").encode()),
        "man/de/man1/ls.1.gz": gzip.compress(MANUAL.replace("list", "auflisten").encode()),
        "dictd/wn.dict.dz": gzip.compress(
            f"\nword\n    n 1: a {{unit}} of language {TAIL} [syn: {{x}}]\nnext\n  short".encode()
        ),
        "games/fortunes/wisdom": f"A saying {TAIL}\n%\nAnother saying {TAIL}\n".encode(),
        "games/fortunes/wisdom.dat": b"\0" * 80,
    }
    for name, data in files.items():
        (share / name).parent.mkdir(parents=True, exist_ok=True)
        (share / name).write_bytes(data)
    return tmp_path


def test_sources(root: Path) -> None:
    assert [text for page in mixed.manuals([root]) for text in page if TAIL in text] == [
        f"ls - list files {TAIL}",
        f"Sort by time , newest first, {TAIL}",
    ]
    assert next(iter(mixed.dictionaries([root]))) == (f"word n 1: a unit of language {TAIL}",)
    assert list(mixed.fortunes([root])) == [(f"A saying {TAIL}",), (f"Another saying {TAIL}",)]


def test_descriptions(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(f"Package: a\nDescription: short\n First {TAIL}.\n .\n Second\n part.\n\nPackage: b\n")
    assert list(mixed.descriptions(status)) == [(f"First {TAIL}.", "Second part.")]
    assert list(mixed.descriptions(tmp_path / "none")) == []


def test_no_text_is_on_two_sides(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    for package in ("numpy", "one", "rbe_gpu"):
        (site / package).mkdir(parents=True)
        lines = [f"def f{i}():\n    '''Number {i} of {package} {TAIL}.'''\n" for i in range(60)]
        (site / package / "a.py").write_text("".join(lines))
    library = [(f"Docstring {i} of the library {TAIL}.",) for i in range(20)]
    monkeypatch.setattr(mixed.corpus, "held_out", lambda: [text for (text,) in library[:5]])
    monkeypatch.setattr(mixed.corpus, "calibration", lambda: [text for (text,) in library[5:]])
    monkeypatch.setattr(mixed, "descriptions", lambda: iter([(f"A description {TAIL}.",)]))
    files, kinds = mixed.collect([root], [site], most=40)
    assert {name: bool(texts) for name, texts in files.items()} == dict.fromkeys(files, True)
    sides = [set(texts) for texts in files.values()]
    assert sum(map(len, sides)) == len(set().union(*sides))
    assert max(map(len, kinds.values())) == 40
    assert all("numpy" in text for text in files["other-package"])
    assert not any("rbe_gpu" in text or "numpy" in text for text in files["training"])
    assert mixed.collect([root], [site], most=40)[0] == files
