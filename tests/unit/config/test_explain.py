"""Explanations of keys (megalite/config/explain.py)."""

import pytest

from megalite.config.explain import all_keys, explain
from megalite.errors import ConfigError


def test_a_key_is_explained_by_path_or_by_its_end() -> None:
    lines = explain("megalite.data.train.0.weight")
    assert lines == [
        "megalite.data.train.weight",
        "  Share of the samples, relative to the other entries.",
        "  type     number",
        "  default  1.0",
        "  rule     greater than 0",
    ]
    assert explain("stage")[0] == "zero_optimization.stage"
    assert '  "auto"   5e-05' in explain("optimizer.params.lr")
    assert "  default  none: the key is required" in explain("optimizer.params.lr")
    shared = explain("warmup_steps")
    assert shared[0].endswith("(scheduler.type constant, linear, cosine, wsd, inverse_sqrt)")
    assert explain("wandb")[1].startswith("  refused  ")


def test_every_key_has_a_meaning_and_a_type() -> None:
    for key in all_keys():
        lines = explain(key.path)
        assert lines[1].strip() and any(line.startswith("  type     ") for line in lines), key.path


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("tensro", "megalite.parallel.tensor"),
        ("megalite.train.step", "megalite.train.steps"),
        ("zero_optimisation.stage", "zero_optimization.stage"),
    ],
)
def test_an_unknown_key_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError) as error:
        explain(name)
    assert str(error.value) == f"{name}: unknown key; did you mean {near}?"
