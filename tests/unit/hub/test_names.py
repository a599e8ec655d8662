"""Names of tensors are mapped to Hugging Face's and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalite.hub.names import biases_to_hf, state_of, to_hf
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from tests.families import FAMILY_CONFIGS, hf_model
from tests.hf_tensors import from_hf


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_names_lead_to_files_and_back(name: str, tmp_path: Path) -> None:
    """Every tensor of the file that transformers writes, exactly once and bit for bit."""
    model, spec = hf_model(FAMILY_CONFIGS[name]), read_spec(FAMILY_CONFIGS[name])
    model.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    names = [place.name for _, place in placed(Stage(spec, Grid()))]
    ours = {name: from_hf(spec, name, theirs.__getitem__) for name in names}
    back = dict(to_hf(spec, names, ours.__getitem__))
    back |= biases_to_hf(spec, state_of(spec, theirs.__getitem__))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
