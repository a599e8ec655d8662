"""Reads a JSON file and `KEY=VALUE` overrides into one plain dict. Knows nothing about the meaning of keys."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalite.config.section import broken, join, shown, shown_text
from megalite.errors import ConfigError
from megalite.inputs import parse_json, read_text


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a file that contains one JSON object.

    Raises ConfigError if the file cannot be read, is not JSON (with the line), contains a key twice or
    a number that JSON does not allow (NaN, Infinity).
    """
    if Path(path).suffix in (".yml", ".yaml"):
        rule = "is YAML: must be JSON; docs/coming_from.md has the keys of GPT-NeoX and nanotron side by side"
        raise ConfigError(f"{path}: {rule}")
    value = parse_json(read_text(path), path, pairs=_no_key_twice, constant=_no_constant)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must be a JSON object {{…}}")
    value.pop("$schema", None)  # for editors: the path of the file from `megalite config schema`
    return value


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `document` with each `KEY=VALUE` set, in order. KEY is a dotted path (numbers index lists),
    VALUE is JSON or a bare string.

    Raises ConfigError for an override of another form, or a path through a value that has no keys.
    """
    document = json.loads(json.dumps(document))
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            rule = "must be KEY=VALUE, KEY a dotted path such as megalite.parallel.tensor"
            raise ConfigError(f"{shown_text(override)}: {rule}")
        node: Any = document
        for depth, key in enumerate(keys[:-1]):
            node = _step_into(node, key, join("", *keys[: depth + 1]))
        _put(node, keys[-1], _value(override, text), path)
    return document


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {json.dumps(twice)} appears twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _value(override: str, text: str) -> Any:
    """The value as JSON if it is JSON, else the string itself; a value that begins like JSON must be valid JSON."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        if text[:1] not in ("{", "[", '"'):
            if not _is_text(text):
                raise ConfigError(f"{shown_text(override)}: the value is not UTF-8") from None
            return text
    except (ValueError, RecursionError):
        pass  # parse_json reports it below
    return parse_json(text, shown_text(override), pairs=_no_key_twice, constant=_no_constant)


def _is_text(value: str) -> bool:
    """Whether UTF-8 can encode it: an argument with other bytes from the shell cannot be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_values(value: Any, path: str = "") -> None:
    """Raises ConfigError for a number anywhere in `value` that is not finite or does not fit in 64 bits: no key needs
    one, and computations with it could overflow. Also for a string with a null character, which no path may contain."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(inner, join(path, key))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {value}: must be a finite number")
    elif isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{path}: {shown(value)}: must not contain a null character")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path}: {shown_text(str(value))}: must be a 64-bit integer")


def _index(node: list[Any], key: str, path: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(node)):
        raise ConfigError(f"{path}: must be an index into a list of {len(node)} entries")
    return int(key)


def _step_into(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, key, path)]
    else:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
    if not isinstance(child, dict | list):
        raise broken(path, child, "is not an object or list, so it has no keys")
    return child


def _put(node: Any, key: str, value: Any, path: str) -> None:
    node[_index(node, key, path) if isinstance(node, list) else key] = value
