"""What the documents say is what the code says."""

import ast
import subprocess
import sys
from pathlib import Path

LAYERS = [
    "errors",
    "inputs",
    "config",
    "signals",
    "interrupt",
    "accelerator",
    "devices",
    "launch",
    "parallel",
    "model",
]
LAYERS += [
    "data",
    "checkpoint",
    "convert",
    "pipeline",
    "training",
    "inference",
    "launching",
    "doctor",
    "prove",
]


def test_the_config_reference_is_made_from_the_code() -> None:
    made = subprocess.run(
        [sys.executable, "tools/config_reference.py"], capture_output=True, text=True, check=True
    )
    assert Path("docs/config.md").read_text() == made.stdout, (
        "python tools/config_reference.py > docs/config.md"
    )


def test_imports_go_one_way() -> None:
    """A part imports itself and those before it in LAYERS, anywhere in a file; `data` only the first three."""
    for path in sorted(Path("megalite").rglob("*.py")):
        own = path.relative_to("megalite").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is not None and module.startswith("megalite."):
                part = module.split(".")[1]
                assert LAYERS.index(part) <= LAYERS.index(own), f"{path} imports {module}"
                assert own != "data" or part in ("errors", "inputs", "config", "data"), (
                    f"{path} imports {module}"
                )


def test_every_program_imports_what_hears_ctrl_c_first() -> None:
    for path in [
        *Path("launcher").glob("*.py"),
        *Path("tools").glob("*.py"),
        Path("megalite/doctor/axes.py"),
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
        assert slow[0] == "megalite.ranks.interrupt", path
