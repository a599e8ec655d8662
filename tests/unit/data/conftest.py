"""Fixtures of the data tests: a separate cache folder, a small text and tokenizers trained on it."""

import json
from pathlib import Path

import pytest

from megalite.data.tokenizer_training import train_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of checked corpora is in a folder of the test, not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The Python files of this project and some awkward documents."""
    files = sorted(Path(__file__).parents[3].glob("megalite/**/*.py"))
    awkward = [
        "é漢🙂 a\tb\r\n\r\n c",
        "   leading\n\n\n",
        "</s><s> <unk> <0x0A> ▁x",
        "~" * 40 + " " * 70 + "=" * 33,
    ]
    return [file.read_text() for file in files if file.stat().st_size] + awkward


@pytest.fixture(scope="session")
def text_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as lines of JSON."""
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tokenizers(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer folder for each model type."""
    folders = {kind: tmp_path_factory.mktemp("tokenizers") / kind for kind in ("bpe", "unigram")}
    for kind, folder in folders.items():
        train_tokenizer([str(text_file)], 500, kind, folder)
    return folders
