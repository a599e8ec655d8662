"""`megalite pretrain TEXT` without training: its inputs, tokenizer, config and samples."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalite import api
from megalite.commands import pretrain
from megalite.commands.from_text import (
    TRAIN,
    VALID,
    TextRun,
    choose_config,
    data_folder,
    find_inputs,
    prepare_text,
)
from megalite.data.indexed import IndexedCorpus
from megalite.data.tokenizer import EQUAL_FILE, load_tokenizer
from megalite.data.tokenizer_training import VocabularyTooLarge
from megalite.errors import ConfigError, DataError
from tests.byte_model import save_byte_model


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of very similar lines, from which few pieces can be learned."""
    path = tmp_path_factory.mktemp("alike") / "log.txt"
    numbers = random.Random(1)
    lines = (f"{numbers.randrange(10**6):06} sensor ok\n" for _ in range(1200))
    path.write_text("".join(lines))
    return path


def test_a_text_of_similar_lines_gets_a_smaller_vocabulary(alike: Path, tmp_path: Path) -> None:
    folder, _ = prepare_text(TextRun("log", [str(alike)], tmp_path / "runs/log"))
    size = load_tokenizer(folder / "tokenizer").vocabulary_size
    assert 259 < size < 512
    config = json.loads((folder / "config.json").read_text())
    assert config["megalite"]["model"]["vocab_size"] == size
    asked = TextRun("log", [str(alike)], tmp_path / "runs/log", vocab_size=512)
    with pytest.raises(VocabularyTooLarge) as error:
        prepare_text(asked)
    assert str(error.value) == f"--vocab-size: 512: must be at most {size} for this text"


def test_outputs_and_hidden_files_are_not_inputs(tmp_path: Path) -> None:
    run = tmp_path / "runs/my"
    made = data_folder(run) / "my-0123456789ab"
    kept = [tmp_path / name for name in ("a.txt", "data/b.txt", "runs/data/notes/c.txt")]
    for path in (
        *kept,
        run / "metrics.jsonl",
        made / "tokenizer/merges.txt",
        tmp_path / ".git/d.txt",
        tmp_path / "notes/.e.txt",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    assert find_inputs([str(tmp_path)], run) == [str(path) for path in kept]
    # Paths given by the user are always inputs, wherever they are.
    assert find_inputs([str(run / "metrics.jsonl")], run) == [str(run / "metrics.jsonl")]
    assert find_inputs([str(tmp_path / ".git")], run) == [str(tmp_path / ".git/d.txt")]


def test_only_the_tokenizer_is_copied_from_its_folder(alike: Path, tmp_path: Path) -> None:
    given = save_byte_model(tmp_path / "model")
    (given / EQUAL_FILE).write_text("{}")
    run = TextRun("log", [str(alike)], tmp_path / "runs/log", str(given))
    folder, _ = prepare_text(run)
    taken = {path.name for path in (folder / "tokenizer").iterdir()}
    assert taken == {"tokenizer.json", "tokenizer_config.json", EQUAL_FILE}
    # Other weights do not change the inputs.
    (given / "model.safetensors").write_bytes(b"other")
    assert prepare_text(run) == (folder, True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--tokenizer: .*/empty: contains no tokenizer"):
        prepare_text(TextRun("log", [str(alike)], tmp_path / "runs/log", str(tmp_path / "empty")))


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config that is chosen for a text."""
    corpora = {"train": 50_000, "valid": 3_000}
    monkeypatch.setattr(
        "megalite.commands.from_text.IndexedCorpus",
        lambda path: SimpleNamespace(num_tokens=corpora[Path(path).name]),
    )
    monkeypatch.setattr(
        "megalite.commands.from_text.load_tokenizer",
        lambda folder: SimpleNamespace(vocabulary_size=512),
    )
    run = TextRun("a", ["a.txt"], tmp_path / "run")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(choose_config(run, tmp_path, tmp_path)))
    return path


def test_a_config_without_a_schedule_needs_no_shorter_warmup(chosen: Path) -> None:
    words = ["scheduler=null", "megalite.train.steps=4"]
    assert pretrain._with_shorter_warmup(chosen, words) == words


def test_fewer_steps_shorten_the_warmup_and_mistakes_are_one_line(chosen: Path) -> None:
    steps = ["megalite.train.steps=4"]
    wanted = [*steps, "scheduler.params.warmup_steps=0"]
    assert pretrain._with_shorter_warmup(chosen, steps) == wanted
    for override, line in (
        ("megalite.train=3", "megalite.train: 3: must be"),
        ("scheduler.params=null", "scheduler.params: null: must be"),
    ):
        with pytest.raises(ConfigError, match=line):
            pretrain._with_shorter_warmup(chosen, [override])


class Model:
    """The parts of a model that samples need; it has 20 positions, and each word is a token."""

    stage = SimpleNamespace(spec=SimpleNamespace(max_positions=20))

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.asked = tokenizer, list[int]()

    def generate(self, prompt: str, max_new_tokens: int, **options: Any) -> str:
        self.asked.append(max_new_tokens)
        if len(self.asked) == 2:
            raise ConfigError("something")
        return "more"


def test_a_failed_sample_is_a_note(
    alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = save_byte_model(tmp_path / "model")
    run = TextRun("log", [str(alike)], tmp_path / "runs/log", str(given))
    folder, _ = prepare_text(run)
    model = Model(load_tokenizer(folder / "tokenizer"))
    monkeypatch.setattr(api, "load", lambda run_dir: model)
    run.run_dir.mkdir(parents=True)
    pretrain._show_samples(run.run_dir, folder)
    assert len(model.asked) == 3 and all(12 <= count < 20 for count in model.asked)
    assert len((run.run_dir / "samples.jsonl").read_text().splitlines()) == 2
    assert "no sample: something\n" in capsys.readouterr().err
    assert IndexedCorpus(folder / TRAIN).num_tokens > IndexedCorpus(folder / VALID).num_tokens


def test_a_world_size_without_a_check_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        pretrain.main(["a.txt", "--world-size", "2"])
    rule = "only with --check; a run has as many ranks as its launcher starts"
    assert str(error.value) == f"--world-size: 2: {rule}"


def test_a_folder_without_a_tokenizer_is_named_as_given(alike: Path, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("x")
    run = TextRun("log", [str(alike)], tmp_path / "runs/log", tokenizer=str(tmp_path / "words"))
    with pytest.raises(DataError, match=f"^{tmp_path}/words: is not a sentencepiece model$"):
        prepare_text(run)


def test_texts_without_text_are_named(tmp_path: Path) -> None:
    for name, text in (("a.txt", "\n\n"), ("b.txt", "")):
        (tmp_path / name).write_text(text)
    texts = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    with pytest.raises(DataError, match=r"^.*/a.txt and 1 more: contains no text$"):
        prepare_text(TextRun("a", texts, tmp_path / "runs/a"))


@pytest.mark.parametrize(("size", "rule"), [(1, "260$"), (260, r"\d+ for this text, a piece for")])
def test_a_vocabulary_that_is_too_small_is_one_line(
    alike: Path, tmp_path: Path, size: int, rule: str
) -> None:
    run = TextRun("log", [str(alike)], tmp_path / "runs/log", vocab_size=size)
    with pytest.raises(DataError, match=f"^--vocab-size: {size}: must be at least {rule}"):
        prepare_text(run)
