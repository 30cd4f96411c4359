"""A page of the reports as the tests see it, and what they ask of every page."""

from __future__ import annotations

from collections.abc import Iterable
from html.parser import HTMLParser


class Page(HTMLParser):
    """Counts of elements, ids and links of a page; `widths` has the cells of every row, by table."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables = self.captions = self.plots = self.bare_headers = self.scripts = 0
        self.widths: list[list[int]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tables += tag == "table"
        self.scripts += tag == "script"
        self.captions += tag == "caption"
        self.bare_headers += tag == "th" and "scope" not in attributes
        if tag == "table":
            self.widths.append([])
        if tag == "tr":
            self.widths[-1].append(0)
        if tag in ("td", "th"):
            self.widths[-1][-1] += int(attributes.get("colspan", 1))
        if attributes.get("role") == "img":
            self.plots += 1
            assert len(attributes["aria-label"]) > 40
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[a] for a in ("href", "xlink:href", "src") if a in attributes]


def checked(source: str, colours: Iterable[str]) -> Page:
    """The page, if it is accessible, needs no other file, and draws with none of the plots' fixed `colours`."""
    page = Page(source)
    assert page.tables == page.captions
    assert page.bare_headers == 0
    assert all(len(set(widths)) == 1 for widths in page.widths), "every row is as wide as its head"
    assert len(page.ids) == len(set(page.ids)), "ids of inline drawings must not collide"
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert page.scripts <= 1, "markup of the rows must stay text"
    assert "@import" not in source
    drawings = source.split("</style>")[1]
    assert not [colour for colour in colours if colour in drawings], "drawings take the page's colours"
    return page
