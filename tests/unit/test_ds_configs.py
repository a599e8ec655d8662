"""Every shipped config is read and fits its model, for the ranks that ds_configs/README.md states."""

import re
from pathlib import Path

import pytest

from megalite.config import Config, check_model, load_config
from megalite.model.families import read_spec

FOLDER = Path("ds_configs")
ROWS = dict(re.findall(r"\| `(\w+\.json)` \| (\d+) \|", (FOLDER / "README.md").read_text()))
PARAMETERS = {
    "gpt_125m_zero1_3d.json": 125e6,
    "gpt_1b3_3d.json": 1.3e9,
    "bert.json": 110e6,
    "modernbert.json": 149e6,
    "t5.json": 248e6,
    "llama_7b_3d.json": 6.7e9,
    "llama_8b_128k.json": 8.03e9,
    "mixtral_8x7b.json": 46.7e9,
    "qwen3_30b_a3b.json": 30.5e9,
    "llama_13b_zero3_tensor.json": 13e9,
    "llama_70b_3d.json": 70.6e9,
}

TINY = '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 99}'
FOLDERS = {"finetune.json": [f"megalite.model={TINY}"]}
"""Of configs that train a user's own Hugging Face folder: what takes the place of its config.json."""


def shipped(name: str) -> Config:
    """A shipped config, resolved for its ranks."""
    return load_config(FOLDER / name, FOLDERS.get(name, [])).resolve(int(ROWS[name]))


def test_the_readme_has_a_line_for_each() -> None:
    assert set(ROWS) == {path.name for path in FOLDER.glob("*.json")}


@pytest.mark.parametrize("name", ROWS)
def test_config_is_whole(name: str) -> None:
    config = shipped(name)
    spec = read_spec(config.model)
    check_model(config, spec)
    assert config.world_size == int(ROWS[name])
    if name in PARAMETERS:
        assert spec.num_parameters == pytest.approx(PARAMETERS[name], rel=0.03)
