"""tools/inspect_data.py: its output; damaged files give one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from megalite.data.corpus_check import write_checksums
from megalite.data.indexed import IndexedCorpus, files_of
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.inspection import Show, histogram, inspect
from tests.unit.data.corpora import write_corpus


def test_lengths_are_counted_by_powers_of_two(tmp_path: Path) -> None:
    lengths = [0, 1, 2, 3, 4, 7, 8, 1000]
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.zeros(length, np.int64), [length // 2, length - length // 2])
    corpus = IndexedCorpus(tmp_path / "a")
    assert corpus.document_lengths(0, 8).tolist() == lengths and corpus.document_lengths(
        2, 5
    ).tolist() == [2, 3, 4]
    lines = list(histogram(corpus))
    assert lines[0] == "  tokens per document: 0 to 1,000, 128.1 on average"
    counts = [line.split()[:4] for line in lines[1:]]
    expected = [
        ("0", "0", "1"),
        ("1", "1", "1"),
        ("2", "3", "2"),
        ("4", "7", "2"),
        ("8", "15", "1"),
    ]
    assert counts[:5] == [[low, "to", high, count] for low, high, count in expected]
    assert counts[-1] == ["512", "to", "1,023", "1"] and len(counts) == 11


def test_what_is_shown(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    made = write_corpus(tmp_path / "a", 50, vocabulary=400)
    write_corpus(tmp_path / "b", 10, vocabulary=400)
    prefixes = [str(tmp_path / name) for name in "ab"]
    text = "\n".join(
        inspect(
            prefixes, Show(weights=[3, 1], samples=1000, sequence_length=16, verify=True, first=7)
        )
    )
    assert "tokens uint16 (code 8)" in text and "50 documents and 50 sequences" in text
    assert " ".join(map(str, made[7][:50].tolist())) in text
    assert "75.0000%  75.0000%           750" in text and "no checksum file; token ids" in text
    shown = "\n".join(inspect(prefixes[:1], Show(tokenizer=str(tokenizers["bpe"]), verify=True)))
    assert "below the vocabulary's 500" in shown


def test_damage_is_one_line_and_exit_two(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 50)
    write_checksums(tmp_path / "a")
    tokens = files_of(tmp_path / "a")[1]
    whole = tokens.read_bytes()

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-O", "tools/inspect_data.py", str(tmp_path / "a"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    assert run("--verify") == (0, "")
    assert run("--verify", "--vocab-size", "900")[0] == 2
    tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    code, line = run("--verify")
    assert code == 2 and "a.bin: SHA-256 is" in line and line.count("\n") == 1
    tokens.write_bytes(whole[:-2])
    code, line = run()
    assert code == 2 and "a.bin: has" in line and line.count("\n") == 1
