"""What the documents say is what the code says."""

import ast
import subprocess
import sys
from pathlib import Path


def test_the_config_reference_is_made_from_the_code() -> None:
    made = subprocess.run(
        [sys.executable, "tools/config_reference.py"], capture_output=True, text=True, check=True
    )
    assert Path("docs/config.md").read_text() == made.stdout, (
        "python tools/config_reference.py > docs/config.md"
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
