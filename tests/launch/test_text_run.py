"""`megalite pretrain my.txt`: from a text to a run with samples, in one process; a single long document is enough."""

import json
import subprocess
from pathlib import Path

import pytest

from megalite.checkpoint.files import checkpoints_of
from megalite.commands.from_text import find_inputs, size_for, vocabulary_for
from megalite.data.indexed import IndexedCorpus
from megalite.errors import DataError
from tests.launch.starts import rows
from tests.programs import run_program
from tests.ranks import REPOSITORY

SHORT = ["megalite.train.steps=4", "megalite.train.eval_interval=2"]


def book(characters: int) -> str:
    """One document of English words: this repository's own pages."""
    text = "".join(path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md")))
    return (text * (1 + characters // len(text)))[:characters]


def pretrain(folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_program("megalite", "pretrain", *words, folder=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_a_text_file_becomes_a_run_with_samples(tmp_path: Path) -> None:
    (tmp_path / "my.book.txt").write_text(book(60_000))
    first = pretrain(tmp_path, "my.book.txt", *SHORT)
    run = tmp_path / "runs/my"
    assert [row["step"] for row in rows(run) if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(run) if "valid_loss" in row] == [2, 4]
    assert [path.name for path in checkpoints_of(run)][-1] == "step_00000004"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["prompt"] and sample["text"] for sample in samples)
    assert first.stderr.count("sample: ") == len(samples)

    # What was chosen is an ordinary config, printed and kept.
    (folder,) = (tmp_path / "runs/data").iterdir()
    chosen = json.loads(first.stdout[: first.stdout.rindex("}") + 1])
    assert chosen == json.loads((folder / "config.json").read_text())
    parts = [IndexedCorpus(folder / name) for name in ("train", "valid")]
    share = parts[1].num_tokens / (parts[0].num_tokens + parts[1].num_tokens)
    assert share == pytest.approx(0.05, abs=0.005)

    # A second start finds the corpora, and the run at its end; a longer one resumes.
    again = pretrain(tmp_path, "my.book.txt", *SHORT)
    assert "reused from an earlier start" in again.stderr and "already at step 4" in again.stdout
    config = str(folder / "config.json")
    words = [
        "--deepspeed_config",
        config,
        "megalite.train.steps=5",
        "scheduler.params.warmup_steps=0",
    ]
    longer = pretrain(tmp_path, *words)
    assert "resuming from step 4" in longer.stderr + longer.stdout
    assert [row["step"] for row in rows(run) if "loss" in row] == [1, 2, 3, 4, 5]

    # Another text under the same name is other data: a new folder, and the old run is not silently continued.
    (tmp_path / "my.book.txt").write_text(book(70_000))
    other = pretrain(tmp_path, "my.book.txt", *SHORT, code=2)
    assert len(list((tmp_path / "runs/data").iterdir())) == 2
    assert "must be" in other.stderr.splitlines()[-1]


def test_a_folder_with_a_tokenizer_is_checked(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    (texts / "more").mkdir(parents=True)
    (texts / "a.md").write_text(book(30_000))
    (texts / "more/b.txt").write_text(book(9_000))
    (texts / "settings.json").write_text("{}")
    assert find_inputs([str(texts)], tmp_path / "runs/texts") == [
        str(texts / "a.md"),
        str(texts / "more/b.txt"),
    ]
    first = pretrain(tmp_path, "texts", "--check", "--vocab-size", "600")
    resolved = json.loads(first.stdout)
    assert resolved["megalite"]["model"]["vocab_size"] == 600
    assert not (tmp_path / "runs/texts").exists()
    tokenizer = resolved["megalite"]["data"]["tokenizer"]
    second = pretrain(tmp_path, "texts", "--check", "--tokenizer", tokenizer, "--run-dir", "runs/b")
    given = json.loads(second.stdout)["megalite"]
    assert given["train"]["run_dir"] == "runs/b"
    held = [Path(tmp_path, folder, "tokenizer.json").read_bytes()
            for folder in (tokenizer, given["data"]["tokenizer"])]  # fmt: skip
    assert held[0] == held[1] and given["data"]["tokenizer"] != tokenizer


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "--deepspeed_config: missing: give a config, or a text file to train on"),
        (["none.txt"], "none.txt: no such file: must be a text file or a folder of text files"),
        (["empty"], "empty: must contain .txt, .md, .jsonl or .parquet files"),
        (["short.txt"], "tokens for valid: must have more than a sample's"),
        (["a.pdf"], "a.pdf: must end in"),
        (
            ["short.txt", "--vocab-size", "9", "--tokenizer", "x"],
            "--vocab-size: 9: cannot be used with --tokenizer",
        ),
        (["short.txt", "--valid-share", "1.5"], "--valid-share: 1.5: must be a number above 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], line: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "short.txt").write_text(book(2_500))
    lines = pretrain(tmp_path, *words, code=2).stderr.splitlines()
    assert lines[-1].startswith("megalite pretrain: ") and line in lines[-1]
    assert not list(tmp_path.glob("runs/data/*"))


def test_a_text_is_not_prepared_on_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = pretrain(tmp_path, "a.txt", code=2)
    assert "a.txt: text is prepared by one process" in done.stderr


def test_choices_grow_with_the_text(tmp_path: Path) -> None:
    for gpu in (False, True):
        sizes = [size_for(tokens, gpu) for tokens in (10**3, 10**5, 10**7, 10**9)]
        assert [size.hidden for size in sizes] == sorted(size.hidden for size in sizes)
        assert all(size.hidden % size.heads == 0 for size in sizes)
    (tmp_path / "a.txt").write_text("abc " * 1000)
    assert vocabulary_for([str(tmp_path / "a.txt")]) == 512
    (tmp_path / "b.txt").write_text("".join(chr(0x4E00 + i) for i in range(3000)))
    assert vocabulary_for([str(tmp_path / "b.txt")]) == 4096
    with pytest.raises(DataError):
        find_inputs([str(tmp_path / "none")], tmp_path / "runs/none")
