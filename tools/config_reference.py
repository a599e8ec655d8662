#!/usr/bin/env python3
"""Print the reference of every config key, made from the descriptions beside the fields in megalite/config."""

import types
import typing
from typing import Any

import megalite.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.config.deepspeed_keys import DeepSpeedKeys
from megalite.config.rules import Document
from megalite.config.schedules import SCHEDULES
from megalite.config.section import Section
from megalite.launch import ArgumentParser, run_program

HEADER = """# Config reference

Made by `python tools/config_reference.py > docs/config.md` from the field descriptions in `megalite/config/`; a test
holds the two together. A default of `-` is DeepSpeed's own or follows from other keys; `required` has none.

| key | default | meaning |
|---|---|---|
"""


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type holds, through lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [found for part in typing.get_args(annotation) for found in sections_of(part)]
    return []


def rows(section: type[Section], prefix: str) -> list[str]:
    """A line a key, nested sections after their own key."""
    result = []
    for name, field in section.model_fields.items():
        inner = sections_of(field.annotation)
        default = "required" if field.is_required() else "-" if field.default is None else repr(field.default)
        if inner:
            default = "required" if field.is_required() else "-"
        meaning = (field.description or (inner[0].__doc__ if inner else "") or "").replace("|", "\\|")
        result.append(f"| `{prefix}{name}` | {default} | {' '.join(meaning.split())} |")
        for part in inner:
            result += rows(part, f"{prefix}{name}.")
    return result


def reference() -> str:
    """The whole page."""
    lines = rows(Document, "")
    for name, section in SCHEDULES.items():
        lines += [f"| `scheduler.type: {name}` | | its `params`: |", *rows(section, "scheduler.params.")]
    refused = "".join(f"- `{key}`: {why}\n" for key, why in sorted(DeepSpeedKeys.refused.items()))
    return HEADER + "\n".join(lines) + f"\n\nDeepSpeed's top-level keys that are refused, and why:\n\n{refused}"


def main(argv: list[str]) -> int:
    ArgumentParser(description=__doc__).parse_args(argv)
    print(reference(), end="")
    return 0


if __name__ == "__main__":
    run_program(main)
