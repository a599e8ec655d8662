"""A JSON file and `KEY=VALUE` overrides to one plain dict. What its keys mean is not known here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalite.config.section import broken, join
from megalite.errors import ConfigError


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises ConfigError for a file that cannot be read, is no JSON (with its line), holds a key twice or
    a number that JSON does not have (NaN, Infinity).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: is not JSON: {error.msg} (column {error.colno})") from None
    except _Refused as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold one JSON object {{…}}")
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
            raise ConfigError(
                f"{override}: must be KEY=VALUE, KEY a dotted path such as megalite.parallel.tensor"
            )
        node: Any = document
        for depth, key in enumerate(keys[:-1]):
            node = _step_into(node, key, join("", *keys[: depth + 1]))
        _put(node, keys[-1], _value(override, text), path)
    return document


class _Refused(ValueError):
    """JSON that Python reads and megalite does not take."""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"the key {json.dumps(twice)} stands twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is not a JSON number")


def _value(override: str, text: str) -> Any:
    """JSON where it is JSON, else the string itself; what opens as JSON must be whole."""
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if text[:1] in ("{", "[", '"'):
            raise ConfigError(
                f"{override}: the value is not JSON: {error.msg} (column {error.colno})"
            ) from None
        return text
    except _Refused as error:
        raise ConfigError(f"{override}: {error}") from None


def _index(node: list[Any], key: str, path: str) -> int:
    if not (key.isascii() and key.isdigit() and int(key) < len(node)):
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
