"""The documentation agrees with the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import anchors, links, pages, text_of
from tests.ranks import REPOSITORY


@pytest.mark.parametrize(
    ("program", "page"),
    [("tools/config_reference.py", "docs/config.md"), ("tools/file_reference.py", "docs/files.md")],
)
def test_a_reference_is_generated_from_the_code(program: str, page: str) -> None:
    made = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert Path(page).read_text() == made.stdout, f"python {program} > {page}"


def test_every_file_says_what_it_is_about() -> None:
    for line in Path("docs/files.md").read_text().splitlines():
        if line.startswith("| `"):
            assert len(line.split("|")[2].split()) > 2, line


def test_every_program_first_imports_the_handler_of_ctrl_c() -> None:
    for path in [
        *Path("launcher").glob("*.py"),
        *Path("tools").glob("*.py"),
        Path("megalite/doctor/axis_rates.py"),
    ]:
        imports = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [
            node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in imports
        ]
        slow = [
            name
            for name in names
            if name is not None and name.partition(".")[0] not in sys.stdlib_module_names
        ]
        assert slow[0] == "megalite.ranks.startup", path


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_relative_links_have_a_target(page: Path) -> None:
    text = text_of(page)
    for path, anchor in links(text):
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(REPOSITORY) and target.exists(), path
        if anchor:
            assert anchor in anchors(text_of(target)), f"{path}#{anchor}"


def test_pages_that_are_named_exist() -> None:
    """In messages, comments, descriptions of keys, and pages."""
    named = re.compile(r"\bdocs/[\w/]+\.(?:md|ipynb)\b")
    listed = subprocess.run(
        ["git", "grep", "-lE", r"docs/[A-Za-z_/]+\.(md|ipynb)"], capture_output=True, text=True, check=True
    ).stdout.splitlines()  # fmt: skip
    found = {(name, page) for name in listed for page in named.findall(Path(name).read_text())}
    assert len(found) > 20
    assert [pair for pair in sorted(found) if not Path(pair[1]).exists()] == []


def test_tests_that_are_named_exist() -> None:
    """They are named with their folder in tests/, such as unit/test_docs.py."""
    named = re.compile(r"\b(?:unit|distributed|launch|gpu)/[\w/]*test_[\w*]+\.py\b")
    form = r"(unit|distributed|launch|gpu)/[a-z_/]*test_"
    listed = subprocess.run(
        ["git", "grep", "-lE", form], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = {(page, name) for page in listed for name in named.findall(Path(page).read_text())}
    assert len(found) > 40
    tests = REPOSITORY / "tests"
    assert [pair for pair in sorted(found) if not [*tests.glob(pair[1])]] == []


def test_links_and_anchors_are_found() -> None:
    text = "# A *b*: `c_d`, e\n\n[x](y.md#a-b) `[no](code.md)`\n\n    [no](block.md)\n\n[z](https://z)\n"
    assert list(links(text)) == [("y.md", "a-b")]
    assert anchors(text) == {"a-b-c_d-e"}
