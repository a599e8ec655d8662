"""List the example configs that come with the package, or copy one to start from.

megalite configs                        their names, with the number of ranks and a description
megalite configs tiny_cpu               print one
megalite configs tiny_cpu my.json       copy one
"""

import re
import shutil
from pathlib import Path

from megalite.config.section import nearest
from megalite.errors import ConfigError
from megalite.ranks.arguments import ArgumentParser, RawHelpFormatter

FOLDER = Path(__file__).parents[1] / "ds_configs"


def main(arguments: list[str]) -> int:
    """Lists, prints or copies; returns the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help="an example, with or without .json")
    parser.add_argument("output", nargs="?", metavar="FILE", help="a new file to copy it to")
    options = parser.parse_args(arguments)
    if options.name is None:
        for name, row in rows().items():
            print(f"{name:24} {row}")
        return 0
    path = example(options.name)
    if options.output is None:
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    if Path(options.output).exists():
        raise ConfigError(f"{options.output}: already exists; choose a new file")
    shutil.copyfile(path, options.output)
    print(f"{options.output}: copied from {path.name}")
    return 0


def example(name: str) -> Path:
    """The file of an example. Raises ConfigError with the nearest name if it does not exist."""
    stem = Path(name).name.removesuffix(".json")
    path = FOLDER / f"{stem}.json"
    if path.is_file():
        return path
    near = nearest(stem, [path.stem for path in FOLDER.glob("*.json")])
    hint = f"did you mean {' or '.join(near)}?" if near else "megalite configs lists them"
    raise ConfigError(f"{name}: no such example config; {hint}")


def rows() -> dict[str, str]:
    """Number of ranks and description of each example, by name (from the table in the folder's README)."""
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+)\.json` \| (\d+) \| (.*) \|$", table, re.MULTILINE)
    return {name: f"{ranks:>3} ranks: {shows}" for name, ranks, shows in found}
