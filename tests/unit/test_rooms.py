"""The rooms of megalite/ and their imports: a room imports only rooms above it in `ROOMS`.

This holds for all imports, also those inside functions. A room's budget is its number of lines of code, without blanks,
comments and docstrings; it is raised with a reason, in the commit that needs it.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megalite"
ROOMS = {  # from the top: room -> most lines of code
    "errors": 20,
    "inputs": 100,
    "other_formats": 90,
    "programs": 430,
    "config": 2490,
    "topology": 120,
    "ranks": 855,  # nodes with and without GPUs, a GPU that torch does not see, each rank's cores
    "parallel": 1305,
    "model": 3580,  # families as values of one class; block, head and chunks in separate files; grouped heads
    "data": 3680,
    "checkpoint": 1430,  # page-locked memory is given back
    "hub": 845,
    "pipeline": 865,  # sends are waited for once they are known to have arrived
    "plan": 4110,  # the planner with its timeline of memory, the dry run and calibration
    "engine": 1700,  # initial weights drawn once over data and tensor; offload waits once per step; equal copies
    "guard": 670,
    "report": 925,
    "training": 2725,  # devices of data sheets; a rate that a resume changes
    "inference": 1600,
    "prove": 2840,  # mutants: a file for each part of a run; rounding that Adam magnifies
    "supervisor": 855,
    "doctor": 445,
    "races": 1075,
    "api": 195,
    "commands": 1150,  # options' help in whole phrases
    "__main__": 10,
}
LONGEST_FILE = 400


def modules() -> list[tuple[str, Path]]:
    """(room, file) of every module of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        found.append((first.removesuffix(".py"), path))
    return [(room, path) for room, path in found if room != "__init__"]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "megalite":
                names = [f"megalite.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("megalite.")}
    return rooms


def code_lines(path: Path) -> int:
    """Number of lines of code, without blanks, comments and docstrings."""
    text = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_every_room_is_listed() -> None:
    assert {room for room, _ in modules()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_rooms_above_it_only(room: str) -> None:
    order = list(ROOMS)
    above = set(order[: order.index(room) + 1])
    for its, path in modules():
        if its == room:
            assert imported_rooms(path) <= above, path


def test_data_knows_neither_model_nor_ranks() -> None:
    for its, path in modules():
        if its == "data":
            assert imported_rooms(path) <= {
                "errors",
                "inputs",
                "other_formats",
                "config",
                "data",
            }, path


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_its_budget(room: str) -> None:
    files = {path: code_lines(path) for its, path in modules() if its == room}
    assert sum(files.values()) <= ROOMS[room]
    assert max(files.values()) <= LONGEST_FILE


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[Path]] = {}
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name.lstrip("_"), []).append(path)
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_no_two_files_have_one_name() -> None:
    found: dict[str, list[Path]] = {}
    for _, path in modules():
        if path.stem != "__init__":
            found.setdefault(path.stem, []).append(path)
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}
