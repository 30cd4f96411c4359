"""Pages in two languages on one site: `NAME.md` is English, `NAME.ko.md` Korean.

Adds the language of each page, the link to its other language, a search that finds Korean words whatever particle
follows them, and links to folders of the repository as plain text.
"""

from __future__ import annotations

import gettext
import re
from pathlib import Path
from typing import Any

import sphinx.locale
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

HANGUL = re.compile(r"[가-힣]{3,}")

#: What Furo says and Sphinx's Korean catalogue does not have.
KOREAN = {
    "Back to top": "맨 위로",
    "On this page": "이 페이지의 내용",
    "Home": "홈",
    "Search": "검색",
    "Next": "다음",
    "Previous": "이전",
    "Error": "오류",
}


class Korean(gettext.NullTranslations):
    """The words above, then Sphinx's own catalogue."""

    def __init__(self) -> None:
        super().__init__()
        self.add_fallback(gettext.translation("sphinx", Path(sphinx.locale.__file__).parent, ["ko"]))

    def gettext(self, message: str) -> str:
        return KOREAN.get(message) or super().gettext(message)


WORDS = {"en": gettext.NullTranslations(), "ko": Korean()}


class EnglishAndKorean(SearchEnglish):
    """English stems; Korean words by each of their beginnings, as particles follow a noun without a space."""

    lang = "en-ko"
    language_name = "English"  # of the stemmer in JavaScript

    def split(self, input: str) -> list[str]:
        words = super().split(input)
        for word in HANGUL.findall(input):
            words += [word[:end] for end in range(2, len(word))]
        return words


def is_korean(page: str) -> bool:
    return page.endswith(".ko")


def other_language(page: str, pages: set[str]) -> str | None:
    """The same page in the other language, if there is one."""
    other = page.removesuffix(".ko") if is_korean(page) else f"{page}.ko"
    return other if other in pages else None


def set_language(app: Sphinx, page: str, template: str, context: dict[str, Any], _: Any) -> None:
    """The words of the theme and the `lang` of one page."""
    language = "ko" if is_korean(page) else "en"
    app.builder.templates.environment.install_gettext_translations(WORDS[language])  # type: ignore[attr-defined]
    context["language"] = language
    context["other_language"] = other_language(page, app.env.found_docs)


def unlink_folders(app: Sphinx, document: nodes.document) -> None:
    """Leave the text of links to folders, which a forge shows and a site has not."""
    for link in list(document.findall(addnodes.pending_xref)):
        if link.get("reftype") == "myst" and "refdoc" in link:
            folder = Path(app.srcdir) / Path(link["refdoc"]).parent / link["reftarget"]
            if folder.is_dir():
                link.replace_self(link.children)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_search_language(EnglishAndKorean)
    app.connect("html-page-context", set_language)
    app.connect("doctree-read", unlink_folders)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
