"""The tools that collect labelled texts and translations, on small packages that the test creates."""

import io
import itertools
import json
import os
import runpy
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megalite.data.collected import write_collected
from megalite.errors import ConfigError, DataError
from tests.ranks import REPOSITORY

LEXICON = """
class SentimentIntensityAnalyzer:
    def polarity_scores(self, text):
        return {"compound": 0.5 if "good" in text else -0.5 if "bad" in text else 0.0}
"""


def run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, f"tools/{tool}.py", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def catalogue(messages: list[tuple[str, str]], charset: str, order: str) -> bytes:
    """A message catalogue; the first entry is the header."""
    header = f"Content-Type: text/plain; charset={charset}\n"
    entries = [(b"", header.encode())]
    entries += [(source.encode(charset), target.encode(charset)) for source, target in messages]
    tables, texts, place = b"", b"", 28 + 16 * len(entries)
    for side in (0, 1):
        for entry in entries:
            tables += struct.pack(f"{order}2I", len(entry[side]), place + len(texts))
            texts += entry[side] + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return head + tables + texts


@pytest.mark.parametrize(("charset", "order"), [("utf-8", "<"), ("iso-8859-1", ">")])
def test_messages_of_a_catalogue(charset: str, order: str) -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools/collect_catalogues.py"))
    content = catalogue(
        [
            ("_Open", "Ö_ffnen"),
            ("menu\x04Close", "Schließen"),
            ("%d file\x00%d files", "%d Datei\x00%d Dateien"),
            ("one\ntwo", "eins\nzwei"),
            ("not yet", ""),
        ],
        charset,
        order,
    )
    assert list(tool["messages"](content)) == [
        ("Open", "Öffnen"),
        ("Close", "Schließen"),
        ("%d file", "%d Datei"),
        ("one two", "eins zwei"),
    ]
    with pytest.raises(ValueError, match="no message catalogue"):
        list(tool["messages"](b"none" + content[4:]))


SAME = [
    ("cannot open %s", "Cannot open '%.40s'!"),
    ("%d words", "{number} words"),
    ("cannot open the file", "cannot close the file"),
    ("open the file", "cannot open the file"),
    ("to open the file again", "again to open the file"),
    ("one two three four five six seven eight", "one three four five seven six eight"),
]
OTHER = [
    ("cannot open %s", "cannot close %s"),
    ("open the file", "close the file"),
    ("cannot open the file", "cannot close a file"),
    ("one two three four five six seven", "two three four five six one"),
]


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [(*pair, True) for pair in SAME] + [(*pair, False) for pair in OTHER],
)
def test_messages_that_are_nearly_the_same_are_a_family(
    one: str, other: str, is_same: bool
) -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools/collect_catalogues.py"))
    first, second = tool["words"](one), tool["words"](other)
    families = tool["Families"]([first, second])
    assert (families.of(first) == families.of(second)) is is_same


def test_a_family_of_messages_is_only_in_one_part(tmp_path: Path) -> None:
    """Each message has a near-duplicate, and one package repeats the messages of the others."""
    names = ["".join(letters) for letters in itertools.product("abcdef", repeat=3)]
    messages = [(f"{name} {what}", f"Meldung {name}") for name in names for what in ("%s", "%d!")]
    for package in ("one", "two"):
        folder = tmp_path / "packages" / package / "usr/share/locale/de/LC_MESSAGES"
        folder.mkdir(parents=True)
        both = [*messages[:300], ("same", package)] if package == "one" else messages[100:]
        (folder / "a.mo").write_bytes(catalogue(both, "utf-8", "<"))
    run(
        "collect_catalogues", "--language", "de", "--output", str(tmp_path), "--packages", "one", "two"
    )  # fmt: skip
    parts = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid", "text")
    }
    train, valid = ([line["source"] for line in parts[name]] for name in ("train", "valid"))
    assert sorted([*train, *valid]) == sorted([source for source, _ in messages] + ["same"])
    held_out = {source.split()[0] for source in valid}
    assert not held_out & {source.split()[0] for source in train} and 5 < len(held_out) < 40
    assert len(parts["text"]) == 2 * len(train)


DOWNLOAD = """#!/bin/sh
test -z "$FAILS" || exit 100
touch "$2_1.0_all.deb"
"""
UNPACK = """#!/bin/sh
mkdir "$3"
touch "$3/half"
test -z "$KILLED" || exit 1
touch "$3/whole"
"""


def test_a_package_that_was_half_unpacked_is_unpacked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack = runpy.run_path(str(REPOSITORY / "tools/collect_catalogues.py"))["_unpack"]
    (tmp_path / "bin").mkdir()
    for name, text in (("apt-get", DOWNLOAD), ("dpkg-deb", UNPACK)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    folder = tmp_path / "packages"
    monkeypatch.setenv("KILLED", "1")
    with pytest.raises(ConfigError, match="--packages: vim: cannot be downloaded"):
        unpack("vim", folder)
    assert not (folder / "vim").exists()
    monkeypatch.delenv("KILLED")
    unpack("vim", folder)
    assert {path.name for path in (folder / "vim").iterdir()} == {"half", "whole"}
    assert not (folder / "vim.partial").exists()


@pytest.mark.parametrize("name", ["sentiment", "topics"])
def test_a_launcher_that_is_started_again_exports_again(name: str) -> None:
    """An existing folder would end the export with 2, and contain the weights of the first start."""
    lines = (REPOSITORY / "launcher" / f"{name}.sh").read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines) if "export_hf.py" in line]
    folder = lines[number].rpartition("--output ")[2]
    assert lines[number - 1] == f"rm -rf {folder}" and folder.startswith("runs/")


def test_translations_by_beams_have_their_own_file(tmp_path: Path) -> None:
    """The loop of launcher/translate.sh, with another program instead of deepspeed."""
    text = (REPOSITORY / "launcher/translate.sh").read_text()
    loop = text[text.index("for beams in") :]
    script = f"""set -euo pipefail
free_port() {{ echo 1; }}
deepspeed() {{ while [ "$1" != --write ]; do shift; done; echo "{{$2"; }}
data=x
{loop}"""
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [Path(line.removeprefix("{")).name for line in done.stdout.splitlines()]
    assert names == ["translations.jsonl", "translations-beams.jsonl"]


def test_sentences_and_their_labels_in_the_lexicon(tmp_path: Path) -> None:
    (tmp_path / "vaderSentiment").mkdir()
    (tmp_path / "vaderSentiment/vaderSentiment.py").write_text(LEXICON)
    (tmp_path / "additional_resources").mkdir()
    lines = (
        "9_1\t1.5\ta good film\r\n10_1\t-0.5\ta bad film\r\n10_2\t0.5\tR&amp;B\r\n10_3\t0.0\tno\r\n"
    )
    with tarfile.open(tmp_path / "additional_resources/hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        for name in (
            "movieReviewSnippets",
            "amazonReviewSnippets",
            "nytEditorialSnippets",
            "tweets",
        ):
            content = lines.encode() if name == "tweets" else b""
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    told = run("collect_sentiment", "--source", str(tmp_path), "--output", str(tmp_path / "out"))
    lexicon = json.loads(told.splitlines()[-1])["lexicon"]
    assert (lexicon["accuracy"], lexicon["texts"], lexicon["says_nothing"]) == (1.0, 2, 0.5)
    valid = (tmp_path / "out/valid.jsonl").read_text().splitlines()
    assert [(line["text"], line["label"]) for line in map(json.loads, valid)] == [
        ("a bad film", "negative"),
        ("R&B", "positive"),
    ]
    train = (tmp_path / "out/train.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in train] == ["a good film"]


def test_the_nearest_text_shares_the_rarest_trigrams() -> None:
    nearest = runpy.run_path(str(REPOSITORY / "tools/nearest_translations.py"))["Nearest"]
    index = nearest(["open the file", "close the file", "close the window", "quit"])
    found = [index.find(text) for text in ("opening a file", "the window", "Quit!", "closed file")]
    assert found == [0, 2, 3, 1]


def test_a_user_s_own_texts_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"train.jsonl: already exists with other content; choose"):
        write_collected(tmp_path / "train.jsonl", ["theirs\n"])
    assert (tmp_path / "train.jsonl").read_text() == "mine"
    (tmp_path / "valid.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="valid.jsonl: already exists"):
        write_collected(tmp_path / "valid.jsonl", ["theirs\n"])
    for _ in range(2):  # a launcher that is started again
        write_collected(tmp_path / "new" / "text.jsonl", ["one\n", "two\n"])
    assert (tmp_path / "new" / "text.jsonl").read_text() == "one\ntwo\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize("language", ["/", "../x", "*"])
def test_a_language_is_a_code(language: str, tmp_path: Path) -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools/collect_catalogues.py"))
    with pytest.raises(ConfigError, match="--language: .*: must be a code such as de"):
        tool["main"](["--language", language, "--output", str(tmp_path)])
