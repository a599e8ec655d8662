"""Every command on a page is valid: its program exists and has the given options and keys.

tests/launch/test_readme.py and test_tutorials.py run the commands of README.md and of the tutorials.
"""

import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megalite.commands.table import COMMANDS
from megalite.config.explain import all_keys
from tests.pages import pages, text_of
from tests.programs import run_program
from tests.ranks import REPOSITORY

NAMES = {command.name for command in COMMANDS}
CODE = re.compile(
    r"^(?:    |\$ )([^\n]*(?:\\\n[^\n]*)*)$|^```\w*\n(.*?)^```$|`([^`\n]+)`",
    re.MULTILINE | re.DOTALL,
)
OPTION = re.compile(r"--?[a-zA-Z][\w-]*")
_END = re.compile(r"[|;>&]|…|\.\.\.")  # characters of a command that are parsed


class Command(NamedTuple):
    """program: the path of a script, or the name of a command of `megalite`; words: its arguments."""

    program: str
    words: tuple[str, ...]


def commands(text: str) -> Iterator[Command]:
    """The commands in code blocks and in inline code."""
    for found in CODE.finditer(text):
        code = next(part for part in found.groups() if part is not None)
        for line in re.sub(r"\\\n\s*", " ", code).splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # not a command, or a string of several lines
                continue
            yield from _in_words(words)


def _in_words(words: list[str]) -> Iterator[Command]:
    """The commands in a line: a launcher is followed by the program that ranks run."""
    starts = [i for i in range(len(words)) if _program(words, i) is not None]
    for start, end in itertools.pairwise([*starts, len(words)]):
        program = _program(words, start)
        assert program is not None
        taken = []
        for word in words[start + 1 : end]:
            if _END.match(word) or word in ("|", "&&", "2>&1"):
                break
            taken.append(word)
        yield Command(program, tuple(taken))


def _program(words: list[str], place: int) -> str | None:
    word, before = words[place], words[place - 1] if place else ""
    if re.fullmatch(r"(\S*/)?(launcher|tools)/\w+\.py", word):
        return word[re.search(r"(launcher|tools)/", word).start() :]  # type: ignore[union-attr]
    earlier = words[:place]
    is_run = "run" in earlier and "megalite" in earlier or any("run.py" in one for one in earlier)
    if word in NAMES and (
        before == "megalite" or is_run and word in ("pretrain", "generate", "evaluate")
    ):
        return word
    return None


@functools.cache
def options(program: str) -> frozenset[str]:
    """The options in a program's help."""
    words = (program, "--help") if program.endswith(".py") else ("megalite", program, "--help")
    ended = run_program(*words)
    assert ended.returncode == 0, ended.stderr
    return frozenset(OPTION.findall(ended.stdout)) | {"--help"}


@functools.cache
def known_keys() -> frozenset[str]:
    return frozenset(key.path for key in all_keys())


def is_key(path: str) -> bool:
    """Whether the JSON has a key; for a model's keys and entries of lists, whether it has the section."""
    parts = re.sub(r"\.\d+(?=\.|$)", "", path).split(".")
    return path.startswith("megalite.model") or ".".join(parts) in known_keys()


PAGES = [page for page in pages() if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_of_a_page_can_be_typed(page: Path) -> None:
    wrong = []
    for program, words in commands(text_of(page)):
        if program.endswith(".py") and not (REPOSITORY / program).is_file():
            wrong.append(f"{program}: no such program")
            continue
        for word in words:
            option = word.partition("=")[0]
            if OPTION.fullmatch(option) and option not in options(program):
                wrong.append(f"{program}: no option {option}")
            elif re.fullmatch(r"\w+(\.\w+)+=.*", word) and not is_key(option):
                wrong.append(f"{program}: no key {option}")
    assert wrong == []


def test_commands_are_found_in_every_form() -> None:
    found = [command for page in PAGES for command in commands(text_of(page))]
    assert len(found) > 100
    text = """
    megalite run --num_gpus 2 pretrain --deepspeed_config x.json a.b=1  # on two ranks

```bash
deepspeed --num_gpus 4 launcher/generate.py --checkpoint x \\
    --prompt "def " | grep --color x
```
or `python tools/plan.py --none`"""
    assert [*commands(text)] == [
        ("run", ("--num_gpus", "2")),
        ("pretrain", ("--deepspeed_config", "x.json", "a.b=1")),
        ("launcher/generate.py", ("--checkpoint", "x", "--prompt", "def ")),
        ("tools/plan.py", ("--none",)),
    ]
    assert "--none" not in options("tools/plan.py") and not is_key("a.b")
    assert is_key("megalite.data.train.0.weight") and "--world-size" in options("plan")
