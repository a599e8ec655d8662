"""Inputs are read or refused in one line: links in folders, JSON, errors that no rule covers."""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from megalite import inputs
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import CheckpointError, ConfigError, DataError, UserError
from megalite.hub.export_folder import export_hf
from megalite.hub.hf_folder import HFFolder
from megalite.hub.import_folder import import_hf
from megalite.hub.whole import appearing
from megalite.inference.generate_program import _prompts
from megalite.inference.labels import read_labelled
from megalite.inference.translations import read_pairs
from megalite.inputs import lines_of, parse_json, reading
from tests.byte_model import save_byte_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja", "config.json"]
)
def test_a_link_out_of_a_model_folder_is_not_followed(
    folder: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../secret")
    line = rf"model/{name}: is a symbolic link to \.\./secret: must not point outside the folder"
    with pytest.raises(CheckpointError, match=line):
        HFFolder(model)
    with pytest.raises(CheckpointError, match=line):
        import_hf(model, tmp_path / "checkpoint")
    with pytest.raises(DataError, match=line):
        load_tokenizer(model)
    assert not (tmp_path / "checkpoint").exists()


def test_a_link_in_a_checkpoint_is_not_exported(folder: Path, tmp_path: Path) -> None:
    """SHA256SUMS proves nothing here: whoever forges a checkpoint also forges that."""
    import_hf(folder, tmp_path / "checkpoint", verify=False)
    carried = tmp_path / "checkpoint" / "hugging_face" / "tokenizer.json"
    shutil.move(carried, tmp_path / "secret")
    carried.symlink_to(tmp_path / "secret")
    with pytest.raises(
        CheckpointError, match=r"hugging_face/tokenizer\.json: is a symbolic link to .*secret"
    ):
        export_hf(tmp_path / "checkpoint", tmp_path / "exported", verify=False)
    assert not (tmp_path / "exported").exists()


def test_links_within_are_followed_and_those_of_hugging_faces_cache(
    folder: Path, tmp_path: Path
) -> None:
    commit = tmp_path / "models--x--y" / "snapshots" / "0123"
    blobs = commit.parent.parent / "blobs"
    for place in (commit, blobs):
        place.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        shutil.copy(path, blobs / str(number))
        (commit / path.name).symlink_to(f"../../blobs/{number}")
    (commit / "again.json").symlink_to("config.json")
    (tmp_path / "name").symlink_to(commit)
    for path in (commit, tmp_path / "name"):
        assert HFFolder(path).names
        load_tokenizer(path)


@pytest.mark.parametrize(
    "value", ["flash_attention_2", "kernels-community/any", {"": "kernels-community/any"}]
)
def test_the_verifying_model_takes_no_attention_from_a_file(
    folder: Path, tmp_path: Path, value: object
) -> None:
    """A name with a slash is code to fetch and run."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_implementation": value}))
    compared = import_hf(model, tmp_path / "checkpoint", verify=True)
    assert compared is not None and compared.difference < 1e-4
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", verify=False)
    assert "kernels" not in (tmp_path / "exported" / "config.json").read_text()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "4300 digits"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ("{", "is not JSON: .*line 1, column 2"),
    ],
)
def test_json_that_megalite_cannot_use_is_one_line(text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^here: .*{line}") as raised:
        parse_json(text, "here")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_unforeseen_errors_name_what_was_read() -> None:
    class PanicException(BaseException):  # as raised by Rust libraries
        pass

    for error in (ZeroDivisionError("x"), MemoryError(), RecursionError(), PanicException("y\nz")):
        line = r"^FILE: cannot be read: \w+.*MEGALITE_TRACEBACK=1"
        with pytest.raises(DataError, match=line) as raised, reading("FILE", DataError):
            raise error
        assert raised.value.__cause__ is error and "\n" not in str(raised.value)
    for passing in (UserError("ours"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(passing)) as same, reading("FILE"):
            raise passing
        assert same.value is passing


AWKWARD = "a\u2028b\u2029c\x85d\x0ce\x1cf"  # these end a line for str.splitlines, but not in JSON


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(f"\n  \r\n{AWKWARD}\r\n\nlast".encode())
    assert lines_of(file) == [(3, AWKWARD), (5, "last")]


def test_awkward_characters_stay_in_pairs_labels_and_prompts(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    text = AWKWARD.replace("\x0c", "").replace("\x1c", "")  # JSON writes these two as escapes

    def write(*rows: dict[str, Any]) -> str:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n" + "\n\n".join(lines), encoding="utf-8")
        return str(file)

    assert read_pairs(write({"source": text, "target": "b"})) == [(text, "b")]
    with pytest.raises(DataError, match="lines.jsonl:4: "):
        read_pairs(write({"source": text, "target": "b"}, {"source": "a"}))
    options = argparse.Namespace(prompt=None, prompts=write({"prompt": text}, {"prompt": "b"}))
    assert _prompts(options) == [text, "b"]
    options.prompts = write({"prompt": text}, {})
    with pytest.raises(ConfigError, match="lines.jsonl:4: must be an object with a text as its"):
        _prompts(options)
    bad = write({"prompt": text, "completion": "a"}, {"prompt": "b"})
    with pytest.raises(DataError, match='lines.jsonl:4: must hold "prompt" and "completion"'):
        read_labelled(bad, None, 9)  # type: ignore[arg-type]


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    """Only of processes of this host that are gone; others may still be writing."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    dead = tmp_path / f".out.{host}.{ended.pid}.unfinished"
    kept = [
        tmp_path / f".out.{host}.{os.getppid()}.unfinished",
        tmp_path / f".out.other.{ended.pid}.unfinished",
        tmp_path / f".out2.{host}.{ended.pid}.unfinished",
    ]
    own = tmp_path / f".out.{host}.{os.getpid()}.unfinished"  # from a restarted container
    for folder in (dead, own, *kept):
        folder.mkdir()
        (folder / "weights").write_text("x")
    with appearing(tmp_path / "out", ConfigError) as partial:
        assert not dead.exists() and not own.exists() and all(folder.exists() for folder in kept)
        partial.mkdir()
    assert (tmp_path / "out").is_dir() and not partial.exists()


def test_a_device_without_an_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to be read until memory was full."""
    monkeypatch.setattr(inputs, "_MOST_STREAMED", 1 << 20)
    with pytest.raises(
        DataError, match="/dev/zero: cannot be read: is not a file: must end within 1 MiB"
    ):
        inputs.read_text("/dev/zero", DataError)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=("{}" + " " * 200_000,)).start()
    assert inputs.read_json_object(pipe) == {}
