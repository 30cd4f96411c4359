"""The documentation site: `make docs` builds it from the Markdown of this folder and of the repository's root.

The source folder is the repository, so that a link between two pages, or from a page to a source file, is the same on
the site and where the repository is browsed.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_site")]

project = "rbe-gpu"
copyright = "the authors of rbe-gpu, Apache-2.0"
root_doc = "docs/index"
language = "en"
smartquotes_action = "D"  # dashes; "gelu" is a value to copy
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "languages",
    "docstrings",
]

include_patterns = ["*.md", "docs/**.md", "cuda_src/README.md"]
exclude_patterns = [".*", "*.egg-info", "build", "reports", "rbe-report", "rbe_gpu", "tests", "site"]

myst_heading_anchors = 4  # the anchors that forges give to headings

default_role = "code"  # `name` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes and dtypes
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_mock_imports = [
    "torch",
    "sentence_transformers",
]  # for the page on integrations: importing them takes seconds

html_theme = "furo"
html_title = "rbe-gpu"
templates_path = ["_site/templates"]
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
html_extra_path = ["_site/start"]
html_search_language = "en-ko"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
