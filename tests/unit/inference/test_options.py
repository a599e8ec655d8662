"""Options without effect are refused before ranks start, and output files are checked first."""

import json
from pathlib import Path
from typing import Any

import pytest

import megalite
from megalite.commands import train_tokenizer
from megalite.data.progress import Counted
from megalite.errors import ConfigError, DataError, UserError
from megalite.inference import evaluate_program, generate_program
from megalite.inference.translations import check_writable
from megalite.parallel.grid import Grid
from megalite.ranks.rank_info import rank_info
from tests.byte_model import save_byte_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("options") / "hf")


class Started(Exception):
    """Raised where ranks would start, after all checks have passed."""


def prepared_only(prepare: Any) -> None:
    prepare(True)
    raise Started


@pytest.fixture(autouse=True)
def without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in (evaluate_program, generate_program):
        monkeypatch.setattr(program, "start_ranks", prepared_only)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data", "x", "--write", "y"], "--write: only with --translations"),
        (["--data", "x", "--beams", "2"], "--beams: only with --translations"),
        (["--labelled", "x", "--length-penalty", "1"], "--length-penalty: only with --transl"),
        (["--tasks", "x", "--template", "{source}"], "--template: only with --translations"),
        (["--data", "x", "--max-new-tokens", "128"], "--max-new-tokens: only with --transl"),
        (["--data", "x", "--num-fewshot", "0"], "--num-fewshot: only with --tasks"),
        (["--translations", "x", "--limit", "3"], "--limit: only with --tasks"),
        (["--data", "x", "--include-path", "y"], "--include-path: only with --tasks"),
        (["--data", "x", "--apply-chat-template"], "--apply-chat-template: only with --tasks"),
    ],
)
def test_evaluate_refuses_options_of_other_kinds(folder: Path, words: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        evaluate_program.evaluate_main(["--checkpoint", str(folder), *words])


def test_every_option_of_one_kind_has_an_owner() -> None:
    parser = evaluate_program._parser()
    defaults = vars(parser.parse_args(["--checkpoint", "x", "--data", "y"]))
    for name, owner in evaluate_program.OWNERS.items():
        assert defaults[name] in (None, False) and owner in defaults


def test_translations_are_written_to_a_new_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("kept")
    with pytest.raises(DataError, match="--write: .*old.jsonl: already exists; choose a new file"):
        check_writable(tmp_path / "old.jsonl")
    with pytest.raises(DataError, match="--write: .*: .*none must be an existing folder"):
        check_writable(tmp_path / "none/new.jsonl")
    check_writable(tmp_path / "new.jsonl")
    pytest.importorskip("sacrebleu")
    lines = tmp_path / "pairs.jsonl"
    lines.write_text(json.dumps({"source": "a", "target": "b"}))
    words = ["--checkpoint", str(folder), "--translations", str(lines), "--template", "{source}"]
    words += ["--max-new-tokens", "5", "--write"]
    with pytest.raises(DataError, match="already exists"):
        evaluate_program.evaluate_main([*words, str(tmp_path / "old.jsonl")])
    with pytest.raises(Started):
        evaluate_program.evaluate_main([*words, str(tmp_path / "new.jsonl")])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--stop-id", "99999"], "--stop-id: 99999: must be below the model's vocab_size"),
        (["--stop", ""], "--stop: must not be empty"),
        (["--length-penalty", "2"], "--length-penalty: 2.0: only with --beams"),
        (["--stream", "--samples", "2", "--temperature", "1"], "--stream: only with one prompt"),
    ],
)
def test_generate_refuses_options_that_do_nothing(
    folder: Path, words: list[str], line: str
) -> None:
    base = ["--checkpoint", str(folder), "--max-new-tokens", "5", "--prompt", "a"]
    with pytest.raises(UserError, match=line):
        generate_program.generate_main([*base, *words])
    with pytest.raises(Started):
        generate_program.generate_main([*base, "--stream"])


def test_streaming_needs_a_single_prompt(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    words = ["--checkpoint", str(folder), "--max-new-tokens", "5", "--prompts", str(prompts)]
    with pytest.raises(ConfigError, match="--stream: only with one prompt and one sample"):
        generate_program.generate_main([*words, "--stream"])


def test_a_beam_search_shows_no_bar(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokens are only known at the end."""
    visible: list[bool] = []

    class Bar(Counted):
        def __init__(self, what: str, total: int, shown: bool) -> None:
            super().__init__(what, total, False)
            visible.append(shown)

    monkeypatch.setattr(generate_program, "Counted", Bar)
    monkeypatch.setattr(
        generate_program, "start_ranks", lambda prepare: (rank_info(), prepare(True))
    )
    monkeypatch.setattr(generate_program, "stop_ranks", lambda: None)
    monkeypatch.setattr(generate_program, "from_rank_0", lambda value: value)
    stage = megalite.load(folder).stage
    monkeypatch.setattr(generate_program, "load_stage", lambda prepared, dtype: (stage, Grid()))
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda everyone, own: everyone.__setitem__(0, own)
    )
    words = ["--checkpoint", str(folder), "--max-new-tokens", "5", "--prompt", "a"]
    for more in ([], ["--beams", "2"]):
        assert generate_program.generate_main([*words, *more]) == 0
        assert json.loads(capsys.readouterr().out)["prompt"] == "a"
    assert visible == [True, False]


def test_wordpiece_takes_every_line(tmp_path: Path) -> None:
    words = ["--input", "x", "--vocab-size", "300", "--output", str(tmp_path / "out")]
    words += ["--model-type", "wordpiece", "--max-sentences", "5"]
    with pytest.raises(ConfigError, match="--max-sentences: 5: only with --model-type bpe or"):
        train_tokenizer.main(words)
