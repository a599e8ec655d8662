"""`megalite.load` and `megalite.train`: equal to transformers, on a tiny byte-level model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import megalite
from megalite.errors import UserError
from megalite.hub.import_folder import import_hf
from tests.byte_model import TEMPLATE, reference, save_byte_model, save_chatty_model
from tests.launch.starts import write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("api") / "hf")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chatty_model(tmp_path_factory.mktemp("chat") / "hf")


def test_generate_and_loss_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "checkpoint")
    prompt = "ab\ncd"
    pieces: list[str] = []
    for path in (folder, tmp_path / "checkpoint"):
        model = megalite.load(path)
        text = model.generate(prompt, max_new_tokens=9, on_text=pieces.append)
        assert text == reference(folder, prompt, 9) == "".join(pieces)
        pieces.clear()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder)(ids, labels=ids).loss.item()
        assert model.loss(prompt) == pytest.approx(theirs, rel=1e-5)
        assert model.loss(ids[0].tolist()) == model.loss(prompt)


def test_a_model_is_shown_in_a_line(folder: Path) -> None:
    model = megalite.load(folder)
    count = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    kind = model.weights.model["model_type"]
    assert repr(model) == f"<megalite.Model {kind}, {count:,} parameters, {folder}>"


def test_samples_are_the_same_each_time_and_differ_by_seed(folder: Path) -> None:
    model = megalite.load(folder)
    texts = [model.generate("abc", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_chat_is_template_plus_generation(chatty: Path) -> None:
    model = megalite.load(chatty)
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    rendered = "system: s\nuser: u\nassistant: a\nuser: v\nassistant: "
    assert model.chat(messages, max_new_tokens=6) == reference(chatty, rendered, 6)
    assert model.chat("u", max_new_tokens=6) == reference(chatty, "user: u\nassistant: ", 6)


def test_mistakes_are_reported(folder: Path, tmp_path: Path) -> None:
    model = megalite.load(folder)
    for call, words in (
        (lambda: model.chat("hello"), "has no chat template"),
        (lambda: model.loss("a"), "must have at least 2"),
        (lambda: model.loss([5] * 1000), "max_position_embeddings"),
        (lambda: model.generate("a", 10_000), "--max-new-tokens: 10000"),
        (lambda: model.generate("a", min_p=2.0, temperature=1.0), "--min-p: 2.0"),
        (lambda: megalite.load(tmp_path / "none"), "does not exist"),
        (lambda: megalite.train({"megalite": {}}), "megalite.model: missing"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_chat_gives_tools_to_the_template(chatty: Path, tmp_path: Path) -> None:
    model = megalite.load(chatty)
    model.tokenizer.inner.chat_template = "{{ tools | tojson }}" + TEMPLATE  # type: ignore[attr-defined]
    asked, tools = [{"role": "user", "content": "a"}], [{"name": "f"}]
    answer = model.chat(asked, max_new_tokens=5, tools=tools)
    assert answer == reference(chatty, '[{"name": "f"}]user: a\nassistant: ', 5)


def test_train_returns_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    run = megalite.train(path, ["megalite.train.steps=2", "megalite.train.limits.step_seconds=60"])
    assert run == tmp_path / "run" and (run / "checkpoints/step_00000002").is_dir()
    assert "step 2/2" in capsys.readouterr().out
    assert megalite.load(run).loss([1, 2, 3, 4, 5]) > 0
    # A dict works like a file; a run that is at its last step ends at once.
    again = megalite.train(json.loads(path.read_text()), ["megalite.train.steps=2"])
    assert (
        again == run
        and "already at step 2 of 2: to continue, raise megalite.train.steps"
        in capsys.readouterr().out
    )
