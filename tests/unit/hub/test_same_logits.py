"""The check of a conversion fails if a weight differs (megalite/hub/same_logits.py)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.errors import ConversionError
from megalite.hub import same_logits
from megalite.hub.same_logits import BOUND, compare, fits
from megalite.model.families import read_spec
from tests.families import FAMILY_CONFIGS, hf_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("same_logits")
    hf_model(FAMILY_CONFIGS["mistral"]).save_pretrained(made)
    return made


def test_a_folder_is_equal_to_itself(folder: Path) -> None:
    found = compare(folder, folder, wanted=True)
    assert found is not None
    assert found.difference <= found.bound == BOUND * max(1.0, found.largest)
    assert str(found).startswith("logits equal transformers': maximum difference ")
    assert compare(folder, folder, wanted=False) is None


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_weight_that_differs_is_found(folder: Path, tmp_path: Path, factor: float) -> None:
    other = tmp_path / "other"
    hf_model(FAMILY_CONFIGS["mistral"]).save_pretrained(other)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= factor
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"other: logits differ from transformers' by .*most"):
        compare(folder, other, wanted=True)


def test_weights_may_be_rounded_as_the_folder_was(folder: Path, tmp_path: Path) -> None:
    model = hf_model(FAMILY_CONFIGS["mistral"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert compare(folder, tmp_path, True, torch.bfloat16) is not None
    with pytest.raises(ConversionError):
        compare(folder, tmp_path, True)


def test_it_is_skipped_if_memory_is_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(FAMILY_CONFIGS["mistral"])
    memory = SimpleNamespace(available=10**9)
    monkeypatch.setattr(same_logits.psutil, "virtual_memory", lambda: memory)
    assert fits(spec)
    memory.available = 8 * spec.num_parameters  # twice the weights in fp32, plus the logits
    assert not fits(spec) and compare(folder, folder, wanted=None) is None
