#!/usr/bin/env python3
"""Print the reference of every config key, made from the descriptions beside the fields in megalite/config."""

import json
import re
from collections.abc import Iterator

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.config.document import Document
from megalite.config.foreign import AUTO
from megalite.config.schedules import SCHEDULES
from megalite.config.section import Section, sections_of
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.program import run_program

HEADER = """# Config reference

Made by `python tools/config_reference.py > docs/config.md` from the field descriptions in `megalite/config/`; a test
holds the two together. A default of `-` is DeepSpeed's own or follows from other keys; `required` has none.

| key | default | meaning |
|---|---|---|
"""
FOREIGN = """

A JSON made for Hugging Face's Trainer or for DeepSpeed alone needs a section `megalite` and no other change, unless it
asks for what is refused below: there `false`, `null` and `{"enabled": false}` may stay. `zero_allow_untested_optimizer`
and `stage3_gather_16bit_weights_on_model_save` may be true, without effect. `"auto"` is taken for these keys, and
`--check` and the log say what it became:

"""
REFUSED = """
DeepSpeed's keys that are refused where they are on, and why:

"""


def rows(section: type[Section], prefix: str) -> list[str]:
    """A line a key, nested sections after their own key."""
    result = []
    for name, field in section.model_fields.items():
        inner = sections_of(field.annotation)
        default = (
            "required"
            if field.is_required()
            else "-"
            if field.default is None
            else repr(field.default)
        )
        if inner:
            default = "required" if field.is_required() else "-"
        meaning = (field.description or (inner[0].__doc__ if inner else "") or "").replace(
            "|", "\\|"
        )
        result.append(f"| `{prefix}{name}` | {default} | {linked(' '.join(meaning.split()))} |")
        for part in inner:
            result += rows(part, f"{prefix}{name}.")
    return result


def linked(text: str) -> str:
    """A description with its pages as links."""
    return re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", text)


def reference() -> str:
    """The whole page."""
    lines = rows(Document, "")
    for name, section in SCHEDULES.items():
        lines += [
            f"| `scheduler.type: {name}` | | its `params`: |",
            *rows(section, "scheduler.params."),
        ]
    return (
        HEADER
        + "\n".join(lines)
        + FOREIGN
        + "".join(autos())
        + REFUSED
        + "".join(refusals(Document, ""))
    )


def autos() -> Iterator[str]:
    """A line for each key of which `auto` is taken."""
    for key, becomes in AUTO.items():
        yield f"- `{key}`: {f'left out: {becomes[1]}' if isinstance(becomes, tuple) else json.dumps(becomes)}\n"


def refusals(section: type[Section], prefix: str) -> Iterator[str]:
    """A line for each key that is refused, nested ones after their section's own."""
    for key, why in sorted(section.refused.items()):
        yield f"- `{prefix}{key}`: {why}\n"
    for name, field in section.model_fields.items():
        for inner in sections_of(field.annotation):
            yield from refusals(inner, f"{prefix}{name}.")


def main(argv: list[str]) -> int:
    ArgumentParser(description=__doc__).parse_args(argv)
    print(reference(), end="")
    return 0


if __name__ == "__main__":
    run_program(main)
