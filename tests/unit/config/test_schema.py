"""The JSON schema accepts and refuses the same configs as the reader."""

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from megalite.config.schema import json_schema
from tests.ranks import REPOSITORY
from tests.unit.config.test_foreign_configs import ALONE, OFF, TRAINERS, ZERO2, ZERO3


@functools.cache
def validator() -> Any:
    return jsonschema.Draft202012Validator(json_schema())


def errors_of(value: Any) -> list[str]:
    return [error.json_path for error in validator().iter_errors(value)]


def test_the_schema_accepts_what_is_accepted() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    examples = {
        path.name: json.loads(path.read_text())
        for path in (REPOSITORY / "ds_configs").glob("*.json")
    }
    examples |= {
        f"trainer {zero['stage']}": {**TRAINERS, "zero_optimization": zero, "megalite": ALONE}
        for zero in (ZERO2, ZERO3)
    }
    examples["off"] = {**examples["tiny_cpu.json"], **OFF, "$schema": "./megalite.schema.json"}
    for name, value in examples.items():
        assert errors_of(value) == [], name


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"megalite": {**ALONE, "parallel": {"tensro": 2}}}, "$.megalite.parallel"),
        ({"scheduler": {"type": "cosine", "params": {"warmup_stepz": 3}}}, "$.scheduler"),
        ({"scheduler": {"type": "cosin"}}, "$.scheduler"),
        ({"zero_optimization": {"stage": 7}}, "$.zero_optimization"),
        ({"wandb": {"enabled": True}}, "$.wandb"),
        ({"train_batch_sise": 3}, "$"),
    ],
)
def test_the_schema_refuses_what_is_refused(change: dict[str, Any], where: str) -> None:
    value = json.loads((REPOSITORY / "ds_configs/tiny_cpu.json").read_text()) | change
    assert errors_of(value) == [where]


def test_a_config_may_name_its_schema(tmp_path: Path) -> None:
    value = json.loads((REPOSITORY / "ds_configs/tiny_cpu.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({"$schema": "./megalite.schema.json", **value}))
    loaded = megalite_config(tmp_path / "c.json")
    assert loaded == megalite_config(REPOSITORY / "ds_configs/tiny_cpu.json")


def megalite_config(path: Path) -> Any:
    from megalite.config import load_config

    return load_config(path)
