"""The config as a JSON schema, for editors that complete and check keys: `megalite config schema`.

pydantic generates it from the sections. This file adds what sections cannot express: the short form of a corpus,
`auto`, keys of other DeepSpeed trainers that have no effect here, and the parameters of each type of `scheduler`.
"""

from typing import Any

from megalite.config.document import Document
from megalite.config.foreign import AUTO, IDLE
from megalite.config.rate_schedules import SCHEDULES
from megalite.config.section import Section, sections_of

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_OFF = {"enum": [False, None]}
_OFF_OBJECT = {"type": "object", "properties": {"enabled": {"const": False}}}


def json_schema() -> dict[str, Any]:
    """A schema of what `load_config` checks without a world size: keys, types and ranges.

    It does not include the rules between keys, which `--check` applies.
    """
    schema = Document.model_json_schema()
    definitions = schema["$defs"]
    for name in ("train", "valid"):  # a corpus may be its prefix alone
        sources = definitions["Data"]["properties"][name]
        sources["items"] = {"anyOf": [{"type": "string", "minLength": 1}, sources["items"]]}
    _add_schedules(definitions)
    _add_foreign(schema, definitions, Document, "")
    schema["properties"]["$schema"] = {"type": "string"}
    return {"$schema": DIALECT, **schema, "title": "megalite config"}


def _add_schedules(definitions: dict[str, Any]) -> None:
    """Adds `scheduler.params` for each `scheduler.type`."""
    scheduler = definitions["Scheduler"]
    scheduler["properties"]["type"]["enum"] = list(SCHEDULES)
    scheduler["allOf"] = []
    for name, section in SCHEDULES.items():
        params = section.model_json_schema()
        _take_auto(params, "scheduler.params")
        is_type = {"properties": {"type": {"const": name}}}
        scheduler["allOf"].append({"if": is_type, "then": {"properties": {"params": params}}})


def _add_foreign(
    schema: dict[str, Any], definitions: dict[str, Any], section: type[Section], path: str
) -> None:
    """Adds what foreign.py accepts: `auto`, and keys that are rejected only if they are on."""
    _take_auto(schema, path)
    properties = schema["properties"]
    for key, why in section.refused.items():
        off = [_OFF, _OFF_OBJECT, *({"const": value} for value in section.neutral.get(key, ()))]
        if f"{path}.{key}".lstrip(".") in IDLE:
            off.append({"const": True})
        properties[key] = {"anyOf": off, "description": f"Refused if it is on: {why}"}
    for name, field in section.model_fields.items():
        for inner in sections_of(field.annotation):
            inner_path = f"{path}.{name}".lstrip(".")
            _add_foreign(definitions[inner.__name__], definitions, inner, inner_path)


def _take_auto(schema: dict[str, Any], path: str) -> None:
    """Lets those keys of a section that support `auto` accept it."""
    for name, value in schema.get("properties", {}).items():
        if f"{path}.{name}".lstrip(".") in AUTO:
            described = {key: value.pop(key) for key in ("description", "default") if key in value}
            value["anyOf"] = [{**value}, {"const": "auto"}]
            for key in value.keys() - {"anyOf"}:
                del value[key]
            value.update(described)
