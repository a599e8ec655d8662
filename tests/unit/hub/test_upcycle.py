"""A dense model becomes one with experts (megalite/hub/upcycle.py)."""

from pathlib import Path

import pytest
import torch

from megalite.checkpoint.files import Checkpoint
from megalite.errors import ConfigError
from megalite.hub.import_folder import import_hf
from megalite.hub.upcycle import UpcyclingOptions
from tests.families import FAMILY_CONFIGS, hf_model


@pytest.mark.parametrize(("name", "family"), [("mistral", "mixtral"), ("qwen3", "qwen3_moe")])
def test_a_dense_model_with_experts_computes_what_it_did(
    name: str, family: str, tmp_path: Path
) -> None:
    section = FAMILY_CONFIGS[name]
    if name == "qwen3":
        section = {**section, "use_sliding_window": False}
    hf_model(section).save_pretrained(tmp_path / "dense")
    # The import compares its logits with those of transformers' dense model.
    assert (
        import_hf(tmp_path / "dense", tmp_path / "made", True, UpcyclingOptions(6, 2)) is not None
    )
    made = Checkpoint.open(tmp_path / "made")
    assert made.model["model_type"] == family
    gate = made.read("layers.1.mlp.experts.gate.weight")
    assert gate.shape == (6, 50, 36) and torch.equal(gate[0], gate[5])
    assert made.read("layers.1.mlp.router.weight").std() > 0


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])  # a shared expert is not a copy of an MLP
def test_a_family_without_a_counterpart_is_not_upcycled(family: str, tmp_path: Path) -> None:
    hf_model(FAMILY_CONFIGS[family]).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=f"--experts: a {family} model has no counterpart"):
        import_hf(tmp_path / "dense", tmp_path / "made", False, UpcyclingOptions(4, 2))
