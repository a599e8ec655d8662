"""How Sphinx builds the site: `sphinx-build -W --keep-going -c docs . build/site`, without network.

The sources are the Markdown files as they are in the repository, README.md as the home page, so that a link works on
the site as it does in a checkout. What the sidebar shows is NAVIGATION; a page that is missing from it fails the build.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from myst_parser.parsers.sphinx_ import MystParser

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import megalite  # noqa: E402  (found through the line above)

NAVIGATION = {
    "Tutorials": ["tutorials/own_text", "tutorials/chat", "tutorials/from_neox", "tutorials/api"],
    "Data and training": [
        "data",
        "recipes",
        "finetuning",
        "classification",
        "translation",
        "encoders",
        "experts",
        "watching",
    ],
    "Layouts and clusters": [
        "layouts",
        "planning",
        "scale",
        "clusters",
        "faults",
        "checkpoints",
        "nvme",
        "gpus",
    ],
    "With other programs": ["hugging_face", "serving", "coming_from"],
    "Reference": ["config", "/ds_configs/README", "api"],
    "Inside": ["inside", "files", "proofs", "speed", "/CONTRIBUTING", "/CHANGELOG"],
}
_SOURCES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ds_configs", "docs")

project = "megalite"
version = release = megalite.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in _SOURCES]
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other packages, whose pages are on the network

myst_heading_anchors = 4  # as GitHub makes them, so that PAGE.md#heading works in both places
highlight_language = "text"  # of indented blocks: commands with comments, and JSON with …
default_role = "code"  # of docstrings: a word between single backticks is code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"megalite {version}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_extra_path = ["index.html"]
html_copy_source = False
html_show_copyright = False


def sidebar() -> str:
    """The navigation as directives of the home page."""
    parts = []
    for caption, pages in NAVIGATION.items():
        names = [page if page.startswith("/") else f"/docs/{page}" for page in pages]
        options = [f":caption: {caption}", ":hidden:", ""]
        parts.append("\n".join(["```{toctree}", *options, *names, "```"]))
    return "\n\n" + "\n\n".join(parts) + "\n"


def add_sidebar(_app: Any, page: str, source: list[str]) -> None:
    """Sphinx wants the navigation in the home page; in README.md it would be noise."""
    if page == root_doc:
        source[0] += sidebar()


def name_by_title(_app: Any, _page: str, source: list[str]) -> None:
    """A link to `data.md` shows that page's title: without a text MyST takes it."""
    source[0] = re.sub(r"\[[\w/]+\.(?:md|ipynb)\]\(", "[](", source[0])


def markdown_of(notebook: str) -> str:
    """A notebook's cells, and what they printed, as Markdown."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            shown = output["text"] if "text" in output else output["data"]["text/plain"]
            parts.append(f"```text\n{''.join(shown).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


class NotebookParser(MystParser):
    """Reads a notebook as it is stored; nothing is executed."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: Any) -> None:
        super().parse(markdown_of(inputstring), document)


def setup(app: Any) -> None:
    app.connect("source-read", add_sidebar)
    app.connect("source-read", name_by_title)
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
