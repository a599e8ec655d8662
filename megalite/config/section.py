"""The base of every section of the JSON, and the one way in which a section is checked.

A section is typed data: strict (the string "4" is no integer), frozen, closed (an unknown key is an
error that names the nearest known one), each field with its meaning beside it. This file knows no key;
`sections.py` has megalite's keys, `deepspeed_keys.py` DeepSpeed's.
"""

import difflib
import json
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from megalite.errors import ConfigError

_SHOWN_CHARACTERS = 80  # of a value that an error repeats
_LEAST_LIKENESS = 0.5  # one wrong letter of two ("lx" for "lr") is still recognised


class Section(BaseModel):
    """A closed, frozen part of the JSON. `refused` maps keys that DeepSpeed knows and megalite does not
    take to the reason, which names the key to use instead where there is one."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
    refused: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                if key in cls.refused:
                    raise PydanticCustomError(
                        "refused_key", "{reason}", {"key": key, "reason": cls.refused[key]}
                    )
                if key not in cls.model_fields:
                    near = nearest(key, cls.model_fields)
                    raise PydanticCustomError("unknown_key", "unknown key", {"key": key, "near": near})
        return value


AnySection = TypeVar("AnySection", bound=Section)


def parse(section: type[AnySection], value: Any, path: str = "") -> AnySection:
    """Read `value`, what stands at the dotted `path` of the JSON, as `section`.

    Raises ConfigError with one line for the first thing that is wrong.
    """
    try:
        return section.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise ConfigError(_one_line(details[0], path)) from None


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
    """The error of a value that breaks a rule: `path: value: rule`."""
    return ConfigError(f"{path}: {shown(value)}: {rule}")


def unknown(path: str, near: list[str]) -> ConfigError:
    """The error of a key that nothing knows, with the full paths of the nearest that are known."""
    return ConfigError(f"{path}: unknown key" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def join(path: str, *keys: str | int) -> str:
    """A dotted path: `join("megalite", "data", "train", 0)` is `megalite.data.train.0`."""
    return ".".join([path] * bool(path) + [str(key) for key in keys])


def shown(value: Any) -> str:
    """A value as JSON on one line, cut where it is long."""
    return shown_text(json.dumps(value, ensure_ascii=False, default=str))


def shown_text(text: str) -> str:
    """What an error repeats, cut where it is long."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


_RULES = {  # pydantic's error types in the words of a JSON file
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


def _one_line(detail: ErrorDetails, path: str) -> str:
    here, context = join(path, *detail["loc"]), detail.get("ctx", {})
    match detail["type"]:
        case "unknown_key":
            return str(unknown(join(here, context["key"]), [join(here, name) for name in context["near"]]))
        case "refused_key":
            return f"{join(here, context['key'])}: {context['reason']}"
        case "missing":
            return f"{here}: missing: this key has no default"
        case kind:
            rule = _RULES.get(kind, detail["msg"]).format_map(context)
            return str(broken(here, detail["input"], rule))
