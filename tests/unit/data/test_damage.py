"""300 damaged pairs of files: each gives a one-line error and is never read as data, also with `python -O`."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megalite.data import corpus_check as verify
from megalite.data.corpus_check import check_corpus, write_checksums
from megalite.data.indexed import files_of, marks_prefix
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import DataError
from tests.unit.data.corpora import write_corpus

VOCABULARY = 1000
Damage = Callable[[Path, Path, random.Random], None]


def flip(path: Path, chance: random.Random, start: int, stop: int) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(start, stop)] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def overwrite(path: Path, place: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def grow(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + bytes(chance.randrange(1, 20)))


def sequences(index: Path) -> int:
    return struct.unpack("<Q", index.read_bytes()[18:26])[0]


def bad_pointer(index: Path, tokens: Path, chance: random.Random) -> None:
    count = sequences(index)
    value = chance.choice([-2, tokens.stat().st_size, 1 << 40])
    overwrite(index, 34 + 4 * count + 8 * chance.randrange(count), struct.pack("<q", value))


def bad_token(index: Path, tokens: Path, chance: random.Random) -> None:
    place = 2 * chance.randrange(tokens.stat().st_size // 2)
    overwrite(tokens, place, struct.pack("<H", chance.randrange(VOCABULARY, 65_536)))


def other_pair(index: Path, tokens: Path, chance: random.Random) -> None:
    write_corpus(index.parent / "other", 60, seed=chance.randrange(10**6))
    os.replace(index.parent / "other.idx", index)


def swapped(index: Path, tokens: Path, chance: random.Random) -> None:
    data = index.read_bytes()
    index.write_bytes(tokens.read_bytes())
    tokens.write_bytes(data)


KINDS: dict[str, tuple[int, Damage]] = {
    "header bit": (80, lambda index, tokens, chance: flip(index, chance, 0, 34)),
    "index bit": (80, lambda index, tokens, chance: flip(index, chance, 34, index.stat().st_size)),
    "index cut": (30, lambda index, tokens, chance: cut(index, chance)),
    "tokens cut": (30, lambda index, tokens, chance: cut(tokens, chance)),
    "index longer": (10, lambda index, tokens, chance: grow(index, chance)),
    "tokens longer": (10, lambda index, tokens, chance: grow(tokens, chance)),
    "type code": (
        9,
        lambda index, tokens, chance: overwrite(
            index, 17, bytes([chance.choice([0, 1, 4, 5, 6, 7, 9])])
        ),
    ),
    "pointer": (15, bad_pointer),
    "token id": (15, bad_token),
    "index of another": (10, other_pair),
    "swapped": (1, swapped),
    "empty index": (1, lambda index, tokens, chance: index.write_bytes(b"") and None),
    "empty tokens": (1, lambda index, tokens, chance: tokens.write_bytes(b"") and None),
    "no index": (1, lambda index, tokens, chance: index.unlink()),
    "no tokens": (1, lambda index, tokens, chance: tokens.unlink()),
    "no documents": (
        1,
        lambda index, tokens, chance: index.write_bytes(index.read_bytes()[:18] + bytes(16)),
    ),
    "bit of the tokens, with checksums": (
        5,
        lambda index, tokens, chance: flip_one_low(tokens, chance),
    ),
}


def flip_one_low(tokens: Path, chance: random.Random) -> None:
    """A flip that gives another id of the vocabulary, which only the checksum can find."""
    write_checksums(tokens.with_suffix(""))
    place = 2 * chance.randrange(tokens.stat().st_size // 2)
    data = bytearray(tokens.read_bytes())
    data[place] ^= 1 if data[place] | data[place + 1] else 2
    tokens.write_bytes(data)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """A folder for each damage, of corpora with one and with several sequences per document."""
    folder, chance, cases = tmp_path_factory.mktemp("damaged"), random.Random(11), []
    write_corpus(folder / "whole", 60)
    check_corpus(str(folder / "whole"), VOCABULARY)
    for kind, (times, damage) in KINDS.items():
        for _ in range(times):
            place = folder / str(len(cases))
            place.mkdir()
            for path in files_of(folder / "whole"):
                shutil.copy(path, place)
            index, tokens = files_of(place / "whole")
            damage(index, tokens, chance)
            cases.append((kind, place / "whole"))
    return cases


def test_each_damage_is_found_and_named(damaged: list[tuple[str, Path]]) -> None:
    assert len(damaged) == 300
    for kind, prefix in damaged:
        with pytest.raises(DataError) as raised:
            check_corpus(str(prefix), VOCABULARY)
        line = str(raised.value)
        assert "\n" not in line and any(line.startswith(str(path)) for path in files_of(prefix)), (
            kind,
            line,
        )


def test_each_damage_is_found_without_assertions_too(damaged: list[tuple[str, Path]]) -> None:
    program = (
        "import sys\nfrom megalite.data.corpus_check import check_corpus\nfrom megalite.errors import DataError\n"
        "for prefix in sys.stdin.read().split():\n"
        f"    try: check_corpus(prefix, {VOCABULARY})\n"
        "    except DataError: continue\n"
        "    print(prefix)\n"
    )
    prefixes = "\n".join(str(prefix) for _, prefix in damaged)
    run = subprocess.run(
        [sys.executable, "-O", "-c", program],
        input=prefixes,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


READER = """
import json, os, sys
from megalite.config import Data
from megalite.config.section import parse
from megalite.data.loader import TrainData
from megalite.errors import DataError

for number, (prefix, keys, name) in enumerate(json.load(sys.stdin)):
    data = TrainData(parse(Data, {"train": [prefix], "sequence_length": 64, **keys}), 1, 1000)
    data.batch(range(40))
    os.truncate(f"{prefix}{name}", os.stat(f"{prefix}{name}").st_size // 3)
    try:
        data.batch(range(40))
    except DataError as error:
        print(error, flush=True)
"""


def test_a_corpus_truncated_during_a_run_is_named(tmp_path: Path) -> None:
    """Reading a memory map beyond the end of its file would silently kill the process by SIGBUS."""
    kinds: list[dict[str, object]] = [
        {}, {"reset_attention": True}, {"order": "megatron", "megatron_samples": 200}, {"samples": "packed"},
        {"samples": "padded", "loss": "marked"},
    ]  # fmt: skip
    cases: list[tuple[str, dict[str, object], str]] = []
    for number, keys in enumerate(kinds):
        marked = "loss" in keys
        for name in (".bin", ".idx", *([".mask.bin", ".mask.idx"] if marked else [])):
            prefix = tmp_path / f"{number}{name}"
            documents = write_corpus(prefix, 2000)
            if marked:
                with IndexedWriter(marks_prefix(prefix), np.uint8) as writer:
                    for document in documents:
                        writer.add_document(np.ones(len(document), np.uint8))
            cases.append((str(prefix), keys, name))
    run = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr)
    for line, (prefix, _, name) in zip(run.stdout.splitlines(), cases, strict=True):
        path = Path(f"{prefix}{name}")
        assert line.startswith(f"{path}: ") and line.endswith("must not change during a run"), line
        assert f"{path.stat().st_size} bytes" in line


def test_the_check_is_cached_and_repeated_for_a_changed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(os.environ["XDG_CACHE_HOME"])
    write_corpus(tmp_path / "a", 30, vocabulary=500)
    reads: list[str] = []
    read_through = verify.read_through
    monkeypatch.setattr(
        verify, "read_through", lambda corpus: reads.append(corpus.prefix) or read_through(corpus)
    )
    check_corpus(str(tmp_path / "a"), 500)
    check_corpus(str(tmp_path / "a"), 600)
    with pytest.raises(DataError, match="must be from 0 to 9,"):
        check_corpus(str(tmp_path / "a"), 10)
    assert len(reads) == 1
    index, tokens = files_of(tmp_path / "a")
    overwrite(tokens, 0, struct.pack("<H", 700))
    os.utime(tokens, ns=(0, tokens.stat().st_mtime_ns + 10**9))
    with pytest.raises(DataError, match="byte 0: token 0 .document 0. is 700"):
        check_corpus(str(tmp_path / "a"), 500)
    assert len(reads) == 2
    (cache / "megalite" / "checked_data.json").write_text("torn {")
    check_corpus(str(tmp_path / "a"), 701)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    check_corpus(str(tmp_path / "a"), 701)
