"""The arguments of programs."""

import argparse
from pathlib import Path

import pytest

from megalite.errors import ConfigError
from megalite.ranks.arguments import ArgumentParser, any_text, at_least


def test_positional_arguments_may_come_between_options() -> None:
    parser = ArgumentParser()
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=at_least(1))
    given = parser.parse_args(["a=1", "--steps", "3", "b=2"])
    assert (given.overrides, given.steps) == (["a=1", "b=2"], 3)
    with pytest.raises(ConfigError, match="unrecognized arguments: --other"):
        parser.parse_args(["a=1", "--other", "b=2"])


@pytest.mark.parametrize(
    "words", [["--output", ""], ["--folder="], ["run", ""], ["--input", "a", ""]]
)
def test_an_empty_value_is_refused(words: list[str]) -> None:
    """It comes from an unset shell variable, and would mean the current folder."""
    parser = ArgumentParser()
    parser.add_argument("--output")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--input", nargs="+")
    parser.add_argument("runs", nargs="*")
    with pytest.raises(ConfigError, match="(--[a-z]+|runs): must not be empty") as error:
        parser.parse_args(words)
    assert error.value.agreed


def test_a_text_may_be_empty_and_so_may_what_is_passed_on() -> None:
    parser = ArgumentParser()
    parser.add_argument("--system", type=any_text)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    given = parser.parse_args(["--system", "", "pretrain", ""])
    assert (given.system, given.program) == ("", ["pretrain", ""])


def test_help_shows_defaults_once() -> None:
    parser = ArgumentParser()
    parser.add_argument("--rate", type=float, default=0.0, help="a rate")
    parser.add_argument("--steps", help="steps (default: those of the run)", default="")
    parser.add_argument("--quiet", action="store_true", help="prints nothing")
    parser.add_argument("--name", help="a name")
    shown = " ".join(parser.format_help().split())
    assert "--rate RATE a rate (default: 0.0)" in shown
    assert "steps (default: those of the run) --quiet prints nothing --name NAME a name" in shown
