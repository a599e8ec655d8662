"""`megalite`: finds a command in the table and runs its program. Imports nothing slow: `megalite --help` is instant."""

import difflib
import importlib
import sys

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.commands.table import COMMANDS, Command
from megalite.errors import UserError

_EPILOG = "megalite COMMAND --help shows a command's own arguments; README.md and docs/ have more."


def main() -> None:
    """The entry point: runs `sys.argv` and ends the process with the program's exit code."""
    words = sys.argv[1:]
    if words in (["--version"], ["-V"]):
        print(f"megalite {megalite.__version__}")
        sys.exit(0)
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else UserError.exit_code)
    command = next((command for command in COMMANDS if command.name == words[0]), None)
    if command is None:
        print(f"megalite: {unknown_command(words[0])}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    run(command, words[1:])


def run(command: Command, arguments: list[str]) -> None:
    """Imports a command's program and runs it under the command's name, as a script of launcher/ or tools/ would."""
    from megalite.ranks.run_program import run_program

    sys.argv = [f"megalite {command.name}", *arguments]  # the start of usage and error lines

    def program(words: list[str]) -> int:
        return getattr(importlib.import_module(command.module), command.function)(words)

    run_program(program, command.resumes)


def usage() -> str:
    """The list of commands, with a description of each."""
    width = max(len(command.name) for command in COMMANDS)
    rows = [f"  {command.name:{width}}  {command.phrase}" for command in COMMANDS]
    lines = [
        "usage: megalite COMMAND …",
        "       megalite --version",
        "",
        "Train language models on any layout of tensor, pipeline and data parallelism.",
        "",
        *rows,
        "",
        _EPILOG,
    ]
    return "\n".join(lines)


def unknown_command(name: str) -> str:
    """The line about an unknown command, with the nearest known one."""
    near = difflib.get_close_matches(name.lower(), [command.name for command in COMMANDS], 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name[:80]!r}: unknown command{hint} (megalite --help lists them)"
