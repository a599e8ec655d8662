"""Explains a config key in a few lines: `megalite config explain KEY`. The texts are the fields' descriptions."""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from megalite.config.document import Document
from megalite.config.foreign import AUTO
from megalite.config.rate_schedules import SCHEDULES
from megalite.config.section import Section, nearest, sections_of, unknown

_INDEX = re.compile(r"\.\d+(?=\.|$)")  # of a list entry, as in megalite.data.train.0.weight
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "greater than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
    "minItems": "at least {} entries",
    "maxItems": "at most {} entries",
    "minLength": "not empty",
}


class Key(NamedTuple):
    """A key of the JSON. path: dotted; schema: pydantic's schema of its value; keys: those below it; of: the types of
    `scheduler` that have it, or ""; definitions: schemas that `schema` refers to."""

    path: str
    meaning: str
    required: bool
    default: Any
    schema: dict[str, Any]
    keys: list[str]
    of: str
    definitions: dict[str, Any]


@functools.cache
def all_keys() -> list[Key]:
    """Every key that the JSON may have, in the order of docs/config.md; a key that is the same in several types of
    `scheduler` appears once."""
    keys = list(_keys(Document, ""))
    of_schedulers: list[Key] = []
    for name, section in SCHEDULES.items():
        for key in _keys(section, "scheduler.params.", name):
            twins = [i for i, known in enumerate(of_schedulers) if known._replace(of=name) == key]
            for i in twins:
                of_schedulers[i] = key._replace(of=f"{of_schedulers[i].of}, {name}")
            of_schedulers += [] if twins else [key]
    return keys + of_schedulers


def _keys(section: type[Section], prefix: str, of: str = "") -> Iterator[Key]:
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        inner = sections_of(field.annotation)
        meaning = field.description or (inner[0].__doc__ if inner else "") or ""
        below = [key for part in inner for key in part.model_fields]
        yield Key(
            f"{prefix}{name}",
            " ".join(meaning.split()),
            field.is_required(),
            None if field.default_factory is not None else field.default,
            schema["properties"][name],
            below,
            of,
            schema.get("$defs", {}),
        )
        for part in inner:
            yield from _keys(part, f"{prefix}{name}.", of)


def refusals(section: type[Section] = Document, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key that DeepSpeed accepts and megalite rejects, with the reason."""
    for key, why in section.refused.items():
        yield f"{prefix}{key}", why
    for name, field in section.model_fields.items():
        for inner in sections_of(field.annotation):
            yield from refusals(inner, f"{prefix}{name}.")


def explain(name: str) -> list[str]:
    """The lines about a key. name: a dotted path, or the last parts of one (`stage`, `parallel.tensor`).

    Raises ConfigError with the nearest keys if it does not exist.
    """
    name = _INDEX.sub("", name)
    keys, refused = all_keys(), dict(refusals())
    found = [key for key in keys if key.path == name]
    if not found and name not in refused:
        found = [key for key in keys if key.path.endswith(f".{name}")]
    if found:
        return [line for key in found for line in (*_lines(key), "")][:-1]
    if name in refused:
        return [name, f"  refused  {refused[name]}"]
    by_end = {key.path.rpartition(".")[2]: key.path for key in reversed(keys)}
    near = nearest(name, [key.path for key in keys]) if "." in name else nearest(name, by_end)
    raise unknown(name, [by_end.get(key, key) for key in near])


def _lines(key: Key) -> Iterator[str]:
    of = f"  (scheduler.type {key.of})" if key.of else ""
    yield f"{key.path}{of}"
    yield f"  {key.meaning}"
    yield f"  type     {_type(key.schema, key.definitions)}"
    yield f"  default  {_default(key)}"
    if rule := ", ".join(dict.fromkeys(_rules(key.schema))):
        yield f"  rule     {rule}"
    if key.path in AUTO:
        becomes = AUTO[key.path]
        meaning = f"left out: {becomes[1]}" if isinstance(becomes, tuple) else json.dumps(becomes)
        yield f'  "auto"   {meaning}'
    if key.keys:
        yield f"  keys     {', '.join(key.keys)}"


def _default(key: Key) -> str:
    if key.required:
        return "none: the key is required"
    if key.default is None:
        return "left out"
    return json.dumps(key.default)


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A value's type, in JSON's terms."""
    if "anyOf" in schema:
        return ", or ".join(_type(part, definitions) for part in schema["anyOf"])
    if "$ref" in schema:
        return "object"
    if "enum" in schema:
        return "one of " + ", ".join(map(json.dumps, schema["enum"]))
    if "const" in schema:
        return json.dumps(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), definitions)}"
    return schema.get("type", "object")


def _rules(schema: dict[str, Any]) -> Iterator[str]:
    """The bounds of a value."""
    for part in (*schema.get("anyOf", ()), *filter(None, [schema.get("items")])):
        yield from _rules(part)
    yield from (words.format(schema[name]) for name, words in _BOUNDS.items() if name in schema)
