#!/usr/bin/env python3
"""Make a corpus that every machine has: the sources of this Python's standard library, one document per file.

Writes FOLDER/train.jsonl and FOLDER/valid.jsonl; every twentieth file is for validation.
"""

import json
import sysconfig
from pathlib import Path

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.data.collected import write_collected
from megalite.errors import DataError
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.run_program import run_program

LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
MANY_FILES = 100


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="FOLDER")
    folder = Path(parser.parse_args(argv).output)
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in library.rglob("*.py")
        if not LEFT_OUT & set(path.relative_to(library).parts)
    )
    if len(files) < MANY_FILES:
        raise DataError(
            f"{library}: {len(files)} Python files: must hold the standard library's sources"
        )
    for name, part in (
        ("train", [f for i, f in enumerate(files) if i % 20]),
        ("valid", files[::20]),
    ):
        documents = (
            json.dumps({"text": path.read_text(encoding="utf-8", errors="replace")})
            for path in part
        )
        write_collected(folder / f"{name}.jsonl", (line + "\n" for line in documents))
        print(f"{folder}/{name}.jsonl: {len(part)} files of the standard library")
    return 0


if __name__ == "__main__":
    run_program(main)
