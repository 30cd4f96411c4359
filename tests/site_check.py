"""Checks a built documentation site: `python -m tests.site_check site`.

It loads nothing from the network, every link leads to a page and a heading that are there, Korean pages say so, and
the search finds words of both languages.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Elements whose address a browser loads by itself; `a` waits for a click.
_LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page loads, where it leads, its anchors and its language."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.language = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "html":
            self.language = values.get("lang", "")
        if _LOADS.get(tag) in values:
            self.loads.append(values[_LOADS[tag]])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.ids |= {values[name] for name in ("id", "name") if name in values}


def problems(site: Path) -> Iterator[str]:
    pages = {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}
    if len(pages) < 30:
        yield f"{site} has {len(pages)} pages; build it with make docs"
    for path, page in pages.items():
        name = path.relative_to(site)
        for address in page.loads:
            if urlsplit(address).netloc:
                yield f"{name} loads {address}"
        for link in [*page.loads, *page.links]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not to.exists():
                yield f"{name} leads to {link}, which is not there"
            elif parts.fragment and to.suffix == ".html":
                target = pages.get(site / to.relative_to(site.resolve()))
                if target is not None and unquote(parts.fragment) not in target.ids:
                    yield f"{name} leads to {link}, which has no such heading"
        if name.stem.endswith(".ko") != (page.language == "ko"):
            yield f"{name} has the language {page.language!r}"
    for path in site.rglob("*.css"):
        for address in re.findall(r"url\(\s*['\"]?((?:https?:)?//[^)'\"]+)", path.read_text("utf-8")):
            yield f"{path.relative_to(site)} loads {address}"
    if "window.Stemmer = EnglishStemmer;" not in (site / "_static" / "language_data.js").read_text("utf-8"):
        yield "the search has no stemmer, without which it does not run"
    index = (site / "searchindex.js").read_text("utf-8")
    terms = json.loads(index[index.index("{") : index.rindex("}") + 1])["terms"]
    for word in ("calibr", "압축", "보정"):
        if word not in terms:
            yield f"the search does not find {word}"


def main(arguments: list[str]) -> int:
    [site] = arguments
    lines = list(problems(Path(site)))
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
