"""`megalite import`, `export`, `inspect-checkpoint` and `config`: their output and error messages."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalite.commands import config, export_hf, import_hf, inspect_checkpoint
from megalite.config.explain import explain
from megalite.config.schema import json_schema
from megalite.errors import CheckpointError, ConfigError
from tests.byte_model import save_byte_model
from tests.families import FAMILY_CONFIGS, hf_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("conversions") / "hf")


def imported(folder: Path, tmp_path: Path) -> Path:
    checkpoint = tmp_path / "checkpoint"
    words = ["--model", str(folder), "--output", str(checkpoint), "--no-verify"]
    assert import_hf.main(words) == 0
    return checkpoint


def test_a_folder_comes_back_bit_for_bit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = imported(folder, tmp_path), tmp_path / "out"
    assert capsys.readouterr().out == f"{checkpoint}: written; not verified\n"
    words = ["--checkpoint", str(checkpoint), "--output", str(output), "--verify"]
    assert export_hf.main(words) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{output}: logits equal transformers': maximum difference ")
    assert told.err == "" and (output / "tokenizer.json").exists()
    given, back = (load_file(path / "model.safetensors") for path in (folder, output))
    assert given.keys() == back.keys()
    assert all(torch.equal(given[name], back[name]) for name in given)


def test_a_model_without_a_tokenizer_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_model(FAMILY_CONFIGS["gpt2"]).save_pretrained(tmp_path / "hf")
    checkpoint, output = imported(tmp_path / "hf", tmp_path), tmp_path / "out"
    export_hf.main(["--checkpoint", str(checkpoint), "--output", str(output), "--no-verify"])
    line = f"{output}: has no tokenizer: the checkpoint carries none\n"
    assert capsys.readouterr().err.endswith(line)


def test_experts_per_token_needs_experts(folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(folder), "--output", str(tmp_path / "x"), "--experts-per-token", "2"]
    with pytest.raises(ConfigError, match="^--experts-per-token: 2: needs --experts$"):
        import_hf.main(words)


def test_a_checkpoint_is_described_and_verified(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = imported(folder, tmp_path)
    capsys.readouterr()
    assert inspect_checkpoint.main([str(checkpoint), "--verify"]) == 0
    short = capsys.readouterr().out.splitlines()
    assert short[-1] == "  whole: every file matches its SHA-256"
    assert not any("embedding.tokens.weight" in line for line in short)
    assert inspect_checkpoint.main([str(checkpoint), "--tensors"]) == 0
    assert "embedding.tokens.weight" in capsys.readouterr().out
    weights = max(checkpoint.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert inspect_checkpoint.main([str(checkpoint)]) == 0  # reads no tensor
    with pytest.raises(CheckpointError, match=weights.name):
        inspect_checkpoint.main([str(checkpoint), "--verify"])


def test_a_key_is_explained_and_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.main(["explain", "megalite.parallel.tensor"]) == 0
    assert capsys.readouterr().out.splitlines() == explain("megalite.parallel.tensor")
    assert config.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    with pytest.raises(ConfigError):
        config.main(["explain"])
