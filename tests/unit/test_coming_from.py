"""The keys in docs/coming_from.md exist, and so do the commands and files in docs/serving.md and the Dockerfiles."""

import re
from pathlib import Path

import pytest

from megalite.commands.table import COMMANDS
from megalite.config.explain import all_keys
from megalite.model.families import FAMILIES

PAGE = Path("docs/coming_from.md").read_text()
OURS = ("megalite", "optimizer", "scheduler", "zero_optimization", "bf16", "fp16")


def our_column() -> str:
    """The right column of every table, and the text outside tables."""
    lines = PAGE.splitlines()
    return "\n".join(line.split(" | ", 1)[-1] if line.startswith("|") else line for line in lines)


def test_every_key_of_ours_exists() -> None:
    known = {key.path for key in all_keys()}
    known |= {path.rpartition(".")[0] for path in known}  # sections
    named = {
        found.partition("=")[0].strip('"')
        for found in re.findall(r"`([^`\s]+)`", our_column())
        if found.split(".")[0].split("=")[0] in OURS
    }
    assert len(named) > 40
    assert named - known == {"megalite"} & named


@pytest.mark.parametrize("path", ["docs/coming_from.md", "docs/serving.md", "README.md"])
def test_every_command_exists(path: str) -> None:
    text = Path(path).read_text()
    used = set(re.findall(r"(?:^ {4}|`|\()megalite ([a-z][a-z-]*)\b", text, re.MULTILINE))
    used -= {"config", "pretrain"} - {command.name for command in COMMANDS}
    assert used and used <= {command.name for command in COMMANDS}


def test_families_that_are_named_exist() -> None:
    line = next(
        li for li in Path("docs/serving.md").read_text().splitlines() if "**Family.**" in li
    )
    assert set(re.findall(r"`(\w+)`", line)) <= set(FAMILIES)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_dockerfiles_copy_what_exists(name: str) -> None:
    text = Path(name).read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    assert copied and all(Path(word).exists() for word in copied)
    assert 'ENTRYPOINT ["megalite"]' in text and "has not been built yet" in text
