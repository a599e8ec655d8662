"""The arguments of programs."""

import pytest

from megalite.errors import ConfigError
from megalite.ranks.arguments import ArgumentParser, at_least


def test_positional_arguments_may_come_between_options() -> None:
    parser = ArgumentParser()
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=at_least(1))
    given = parser.parse_args(["a=1", "--steps", "3", "b=2"])
    assert (given.overrides, given.steps) == (["a=1", "b=2"], 3)
    with pytest.raises(ConfigError, match="unrecognized arguments: --other"):
        parser.parse_args(["a=1", "--other", "b=2"])
