"""A JSON file and `KEY=VALUE` overrides to one plain dict. What its keys mean is not known here."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalite.config.section import broken, join, shown, shown_text
from megalite.errors import ConfigError
from megalite.inputs import parse_json, read_text


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises ConfigError for a file that cannot be read, is no JSON (with its line), holds a key twice or
    a number that JSON does not have (NaN, Infinity).
    """
    if Path(path).suffix in (".yml", ".yaml"):
        rule = "is YAML: must be JSON; docs/coming_from.md has the keys of GPT-NeoX and nanotron side by side"
        raise ConfigError(f"{path}: {rule}")
    value = parse_json(read_text(path), path, pairs=_no_key_twice, constant=_no_constant)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold an object {{…}}")
    value.pop("$schema", None)  # an editor's: where the file of `megalite config schema` is
    return value


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`document` with each `KEY=VALUE` set, in order. KEY is a dotted path (numbers index lists), VALUE is
    JSON or a bare string. The argument is left as it is.

    Raises ConfigError for an argument of another form or a path through something that holds no keys.
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
    """JSON where it is JSON, else the string itself; what opens as JSON must be whole."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        if text[:1] not in ("{", "[", '"'):
            if not _is_text(text):
                raise ConfigError(f"{shown_text(override)}: the value is not UTF-8") from None
            return text
    except (ValueError, RecursionError):
        pass  # told below
    return parse_json(text, shown_text(override), pairs=_no_key_twice, constant=_no_constant)


def _is_text(value: str) -> bool:
    """Whether UTF-8 can write it: what a shell hands over as other bytes it cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_values(value: Any, path: str = "") -> None:
    """ConfigError for a number anywhere in `value` that is not finite or takes more than 64 bits: no key means one,
    and much that is computed of keys would not take it. The same for a text with a zero character, which no path may
    hold."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(inner, join(path, key))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {value}: must be a finite number")
    elif isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{path}: {shown(value)}: must not hold the character 0")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path}: {shown_text(str(value))}: must be an integer of 64 bits")


def _index(node: list[Any], key: str, path: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(node)):
        raise ConfigError(f"{path}: is no entry of a list of {len(node)}")
    return int(key)


def _step_into(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, key, path)]
    else:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
    if not isinstance(child, dict | list):
        raise broken(path, child, "holds no keys")
    return child


def _put(node: Any, key: str, value: Any, path: str) -> None:
    node[_index(node, key, path) if isinstance(node, list) else key] = value
