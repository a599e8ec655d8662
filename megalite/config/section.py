"""The base class of every section of the JSON, and the validation of sections.

A section is typed data: strict (the string "4" is not an integer), frozen, closed (an unknown key is an
error that names the nearest known one), with a description of each field. This file knows no keys;
megalite's are in `sections.py`, DeepSpeed's in `deepspeed_keys.py`.
"""

import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from megalite.errors import ConfigError

_SHOWN_CHARACTERS = 80  # of a value that an error repeats
_MOST_LINES = 40  # of an error
_LEAST_LIKENESS = 0.5  # so that one wrong letter of two ("lx" for "lr") is still recognised


class Section(BaseModel):
    """A closed, frozen part of the JSON. `refused` maps each key that DeepSpeed accepts and megalite rejects to the
    reason, which names the key to use instead if there is one. `neutral` maps some of these to the values that change
    nothing, if those are not false or null (foreign.py)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
    refused: ClassVar[dict[str, str]] = {}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}


Positive = Annotated[int, Field(ge=1)]
Counter = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
AnySection = TypeVar("AnySection", bound=Section)
KeyPath = tuple[str | int, ...]
Wrong = dict[KeyPath, str]
"""Error lines by the path of the wrong value in the JSON: keys and indices from the top."""


def _whole(value: Any) -> Any:
    """5e8 is how DeepSpeed's own examples write an integer: a float in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole)]


def key(description: str) -> Any:
    """A field that may be left out: DeepSpeed's default then holds."""
    return Field(None, description=description)


def parse(section: type[AnySection], value: Any, path: str = "") -> AnySection:
    """Reads `value`, which is at the dotted `path` of the JSON, as `section`.

    Raises ConfigError with a line for each mistake.
    """
    found, wrong = read(section, value, path)
    refuse(wrong, value)
    assert found is not None
    return found


def read(section: type[AnySection], value: Any, path: str = "") -> tuple[AnySection | None, Wrong]:
    """The section, or None and what is wrong."""
    try:
        return section.model_validate(value), {}
    except ValidationError as error:
        wrong: Wrong = {}
        for detail in error.errors(include_url=False):
            key_path = _key_path(value, detail)
            line = _line(section, detail, key_path, path)
            # pydantic reports one error for each member of a union, such as a list, a word or a number.
            if key_path in wrong:
                line = f"{wrong[key_path]}, or {line.rpartition(': ')[2]}"
            wrong[key_path] = line
        return None, wrong


def refuse(wrong: Wrong, value: Any) -> None:
    """Raises ConfigError with the lines in the order of `value`, the JSON that they are about; nothing if none."""
    if wrong:
        lines = [
            wrong[key_path]
            for key_path in sorted(wrong, key=lambda key_path: _position(value, key_path))
        ]
        rest = [f"and {len(lines) - _MOST_LINES} more lines"] if len(lines) > _MOST_LINES else []
        raise ConfigError(*lines[:_MOST_LINES], *rest)


def all_of(*checks: Callable[[], Any]) -> None:
    """Runs every check. Raises ConfigError with the lines of all checks that fail."""
    lines: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            lines += error.lines
    if lines:
        raise ConfigError(*dict.fromkeys(lines))


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections in a field's type, also inside lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [found for part in typing.get_args(annotation) for found in sections_of(part)]
    return []


def _key_path(value: Any, detail: ErrorDetails) -> KeyPath:
    """The path of an error in the JSON, without pydantic's names for the members of a union."""
    key_path: KeyPath = ()
    for step in detail["loc"]:
        if detail["type"] == "missing" and isinstance(value, dict) and step not in value:
            return (*key_path, step)
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            break
        key_path = (*key_path, step)
    return key_path


def _position(value: Any, key_path: KeyPath) -> list[int]:
    """Sort key of a key path, for the order of the JSON; a missing key comes last."""
    position = []
    for step in key_path:
        if isinstance(value, dict):
            position.append([*value, step].index(step))
            value = value.get(step)
        else:
            position.append(int(step))
            value = value[int(step)]
    return position


def nearest(key: str, known: Iterable[str]) -> list[str]:
    """The known keys most like `key`, best first: one, or up to three that are equally like it."""
    likeness = {
        name: difflib.SequenceMatcher(None, key.lower(), name.lower(), autojunk=False).ratio()
        for name in known
    }
    best = max(likeness.values(), default=0.0)
    if best < _LEAST_LIKENESS:
        return []
    return [name for name, value in likeness.items() if value > best - 1e-9][:3]


def broken(path: str, value: Any, rule: str) -> ConfigError:
    """The error for a value that breaks a rule: `path: value: rule`."""
    return ConfigError(f"{path}: {shown(value)}: {rule}")


def unknown(path: str, near: list[str]) -> ConfigError:
    """The error for an unknown key, with the full paths of the nearest known ones."""
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ConfigError(f"{path}: unknown key{hint}")


def join(path: str, *keys: str | int) -> str:
    """A dotted path: `join("megalite", "data", "train", 0)` is `megalite.data.train.0`."""
    parts = [str(key) for key in keys]
    return ".".join([path, *parts] if path else parts)


def shown(value: Any) -> str:
    """A value as JSON on one line, truncated if it is long."""
    return shown_text(json.dumps(value, ensure_ascii=False, default=str))


def shown_text(text: str) -> str:
    """A text that an error repeats, truncated if it is long."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


_RULES = {  # pydantic's error types, in JSON's terms
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "string_too_short": "must not be empty",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}


def _line(section: type[Section], detail: ErrorDetails, key_path: KeyPath, path: str) -> str:
    here, context = join(path, *key_path), detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            key, owner = str(key_path[-1]), _owner(section, key_path[:-1])
            if key in owner.refused:
                return f"{here}: {owner.refused[key]}"
            near = nearest(key, owner.model_fields)
            return str(unknown(here, [join(path, *key_path[:-1], name) for name in near]))
        case "missing":
            return f"{here}: missing: this key has no default"
        case kind:
            rule = _RULES.get(kind, detail["msg"]).format_map(context)
            return str(broken(here, detail["input"], rule))


def _owner(section: type[Section], key_path: KeyPath) -> type[Section]:
    """The section at a key path."""
    for step in key_path:
        if isinstance(step, str):
            section = sections_of(section.model_fields[step].annotation)[0]
    return section
