"""Command-line arguments of programs: a mistake is one line and exit code 2, like every other mistake."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megalite.errors import ConfigError

MOST_PORT = 65535
SHOWN_CHARACTERS = 80  # of a value that an error repeats


class HelpFormatter(argparse.HelpFormatter):
    """argparse.HelpFormatter that adds the default of an option that has one, unless its help names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        none = default is None or default is False or default in ([], argparse.SUPPRESS)
        if none or not action.option_strings or "default" in (text or ""):
            return text
        return f"{text} (default: %(default)s)"


class RawHelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The same, with the lines of the description as they are."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse.ArgumentParser that raises ConfigError for a mistake, takes no abbreviated options, and shows
    defaults."""

    def __init__(self, *args: Any, formatter_class: Any = HelpFormatter, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=formatter_class, **kwargs)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As in argparse, but KEY=VALUE may come before, between and after options."""
        to_the_end = (argparse.REMAINDER, argparse.PARSER)
        if any(action.nargs in to_the_end for action in self._get_positional_actions()):
            return super().parse_args(args, namespace or argparse.Namespace())
        return self.parse_intermixed_args(args, namespace or argparse.Namespace())

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """As argparse's, but refuses an empty value, such as that of an unset shell variable: as a path it would be the
        current folder, or a file without a name."""
        passed_on = action.nargs in (argparse.REMAINDER, argparse.PARSER)
        if not arg_string and action.type in (None, Path) and not passed_on:
            raise argparse.ArgumentError(action, "must not be empty")
        return super()._get_value(action, arg_string)  # type: ignore[misc]

    def error(self, message: str) -> NoReturn:
        error = ConfigError(f"{message.removeprefix('argument ')} (--help lists the arguments)")
        error.agreed = True  # every rank has the same arguments
        raise error


def any_text(text: str) -> str:
    """An argument type: text, which may be empty."""
    return text


def at_least(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: integers from `least` to `most`."""

    def read(text: str) -> int:
        if not is_number(text) or not least <= int(text) <= most:
            limit = "" if most == 2**63 - 1 else f" and at most {most}"
            rule = f"must be an integer of at least {least}{limit}"
            raise argparse.ArgumentTypeError(f"{text[:SHOWN_CHARACTERS]}: {rule}")
        return int(text)

    return read


def positive(text: str) -> float:
    """An argparse type: finite numbers above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:SHOWN_CHARACTERS]}: must be a number above 0")
    return value


def share(text: str) -> float:
    """An argparse type: fractions above 0 and below 1."""
    value = _number(text)
    if not 0 < value < 1:
        rule = "must be a number above 0 and below 1"
        raise argparse.ArgumentTypeError(f"{text[:SHOWN_CHARACTERS]}: {rule}")
    return value


def _number(text: str) -> float:
    """The number, or NaN if the text is not one."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def is_number(text: str) -> bool:
    """Whether the text is ASCII digits only, and few enough for int()."""
    return text.isascii() and text.isdecimal() and len(text) < 20
