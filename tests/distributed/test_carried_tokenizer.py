"""A run's checkpoints contain its tokenizer: readers need neither its folder nor the run's working directory."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megalite.checkpoint.files import Checkpoint, checkpoints_of, find_checkpoint, verify
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import CheckpointError
from megalite.hub.carried import tokenizer_of
from megalite.hub.export_folder import export_hf
from megalite.hub.hf_folder import HFFolder
from megalite.hub.import_folder import import_hf
from megalite.inference.generate_program import generate_main
from tests.byte_model import save_byte_model
from tests.programs import run_program
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, train

TEXT = "bcd efg"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("carried") / "hf")


def with_tokenizer(folder: Path, run: str, tokenizer: Path, steps: int) -> dict[str, Any]:
    made = document(folder, run, {}, train={"steps": steps, "checkpoint_interval": 1})
    made["megalite"]["data"]["tokenizer"] = str(tokenizer)
    return made


def generated(
    rank: int, world_size: int, arguments: list[str], elsewhere: Path
) -> list[dict[str, Any]]:
    os.chdir(elsewhere)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert generate_main(arguments) == 0
    return [json.loads(line) for line in printed.getvalue().splitlines()]


def test_a_run_without_its_tokenizer_s_folder_generates_and_is_exported(
    hf: Path, tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(hf, tokenizer)
    wanted = load_tokenizer(tokenizer).encode(TEXT)
    starts = [(with_tokenizer(tmp_path, "run", tokenizer, steps), nothing) for steps in (1, 2)]
    assert run_ranks(1, train, starts) == [[0, 0]]
    shutil.rmtree(tokenizer)
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "elsewhere" / "moved"
    (tmp_path / "run").rename(run)
    for folder in checkpoints_of(run):
        verify(folder)
        found = tokenizer_of(Checkpoint.open(folder))
        assert found == folder / "hugging_face" and load_tokenizer(found).encode(TEXT) == wanted
        assert not list(found.glob("*.safetensors")) and not (found / "config.json").exists()
    export_hf(run, tmp_path / "out", verify=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == wanted
    arguments = ["--checkpoint", "moved", "--prompt", TEXT, "--max-new-tokens", "3"]
    ((line,),) = run_ranks(1, generated, arguments, tmp_path / "elsewhere", init=False)
    assert line["prompt"] == TEXT and isinstance(line["text"], str)
    carried = checkpoints_of(run)[-1] / "hugging_face" / "tokenizer.json"
    carried.write_text(carried.read_text().replace("<s>", "<t>"))
    with pytest.raises(CheckpointError, match="hugging_face/tokenizer.json: damaged"):
        verify(checkpoints_of(run)[-1])


def test_a_tokenizer_may_be_a_file(tmp_path: Path) -> None:
    lines, model = ["abc bcd cde", "efg bcd", "abc efg"] * 20, tmp_path / "letters.model"
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "letters"),
        vocab_size=13,
        minloglevel=2,
    )
    assert run_ranks(1, train, [(with_tokenizer(tmp_path, "run", model, 1), nothing)]) == [[0]]
    wanted = load_tokenizer(model).encode(TEXT)
    model.unlink()
    found = tokenizer_of(Checkpoint.open(find_checkpoint(tmp_path / "run")))
    assert found is not None and load_tokenizer(found).encode(TEXT) == wanted


def test_an_export_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    """A checkpoint of an earlier release names a folder, which may have been moved."""
    assert run_ranks(1, train, [(document(tmp_path, "run", {}, train={"steps": 1}), nothing)]) == [
        [0]
    ]
    words = ["--no-verify", "--checkpoint", str(tmp_path / "run"), "--output", f"{tmp_path}/out"]
    done = run_program("tools/export_hf.py", *words)
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/out: written; not verified\n", (
        done.stderr
    )
    assert (
        done.stderr
        == f"export_hf.py: {tmp_path}/out: has no tokenizer: the checkpoint carries none\n"
    )


@pytest.mark.parametrize(("configured", "wanted"), [(50256, 2), (2, 2), (5, [2, 5]), (None, 2)])
def test_an_export_ends_texts_at_the_tokenizer_s_end(
    hf: Path, tmp_path: Path, configured: int | None, wanted: int | list[int]
) -> None:
    """The config of a model trained from scratch has its family's default, such as 50256."""
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": configured}))
    import_hf(source, tmp_path / "checkpoint", verify=False)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", verify=False)
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings["eos_token_id"] == wanted


def test_what_goes_with_loaded_weights_goes_with_the_run_s(hf: Path, tmp_path: Path) -> None:
    """Generation settings, and their tokenizer if the config names none; also when the run is resumed."""
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    made = document(tmp_path, "run", {}, train={"steps": 1, "load": str(source)})
    made["megalite"]["model"] = HFFolder(source).model
    assert run_ranks(1, train, [(made, nothing)]) == [[0]]
    shutil.rmtree(source)
    made["megalite"]["train"]["steps"] = 2
    assert run_ranks(1, train, [(made, nothing)]) == [[0]]
    folder = find_checkpoint(tmp_path / "run") / "hugging_face"
    assert folder.parent.name == "step_00000002"
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 5]}
    assert load_tokenizer(folder).encode(TEXT) == load_tokenizer(hf).encode(TEXT)
