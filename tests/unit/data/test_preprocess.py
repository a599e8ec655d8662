"""From files to a corpus: every form of input, bad lines, several workers, kills, existing outputs."""

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megalite.data import documents
from megalite.data.documents import InputPosition, kind_of, parse, read_chunks, read_texts
from megalite.data.indexed import IndexedCorpus, files_of
from megalite.data.preprocessing import preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import DataError


def lines_of(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts))


def written(prefix: Path) -> list[bytes]:
    return [path.read_bytes() for path in files_of(prefix)]


@pytest.fixture
def forms(tmp_path: Path, texts: list[str]) -> dict[str, Path]:
    """The same documents in each form of input that can contain several."""
    data = lines_of(texts).encode()
    paths = {
        name: tmp_path / f"texts.{name}"
        for name in ("jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet")
    }
    paths["jsonl"].write_bytes(data)
    paths["json"].write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\n").rstrip())
    paths["jsonl.gz"].write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    compressor = zstandard.ZstdCompressor()
    paths["jsonl.zst"].write_bytes(
        compressor.compress(data[:5000]) + compressor.compress(data[5000:])
    )
    table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, paths["parquet"], row_group_size=7)
    return paths


def test_every_form_holds_the_same_documents(
    forms: dict[str, Path], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for chunk_bytes in (documents.CHUNK_BYTES, 1000):
        monkeypatch.setattr(documents, "CHUNK_BYTES", chunk_bytes)
        for path in forms.values():
            assert list(read_texts([str(path)])) == texts, path
    assert list(read_texts([str(forms["jsonl"]), str(forms["parquet"])])) == texts * 2


def test_reading_resumes_from_any_chunk(
    forms: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 500)
    monkeypatch.setattr(documents, "_ROWS", 5)
    for path in forms.values():
        inputs, kinds = [str(path)] * 2, [kind_of(str(path))] * 2
        chunks = list(read_chunks(inputs, kinds, "text", InputPosition()))
        assert len(chunks) > 4
        parsed = [list(parse(chunk, "text")) for chunk in chunks]
        for i in range(0, len(chunks), 7):
            again = read_chunks(inputs, kinds, "text", chunks[i].end)
            found = [list(parse(chunk, "text")) for chunk in again]
            assert sum(found, []) == sum(parsed[i + 1 :], [])


def test_a_text_file_is_one_document_or_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "One line,\nand another.\n\n\n  Two: é漢\r\n\r\nThree\nends.\n \n\t\nFour"
    (tmp_path / "a.txt").write_bytes(text.encode())
    kinds = [kind_of(str(tmp_path / "a.txt"), paragraphs=True)]
    parts = ["One line,\nand another.", "  Two: é漢", "Three\nends.", "Four"]
    for chunk_bytes in (1, 3, 10, 1000):
        monkeypatch.setattr(documents, "CHUNK_BYTES", chunk_bytes)
        assert list(read_texts([str(tmp_path / "a.txt")])) == [text]
        chunks = list(read_chunks([str(tmp_path / "a.txt")], kinds, "text", InputPosition()))
        assert [part for chunk in chunks for part in parse(chunk, "text")] == parts
        assert chunks[-1].end.number in (4, 5)


def test_a_large_text_file_is_read_in_pieces_and_stays_one_document(
    tmp_path: Path, tokenizers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "".join(
        random.Random(1).choice(["word ", "é漢🙂\n", "other\n", "x" * 20]) for _ in range(3000)
    )
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "b.txt").write_text("short")
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(documents, "_WHOLE_BYTES", 3000)
    inputs = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    assert "".join(list(read_texts(inputs))[:-1]) == words
    counts = preprocess(inputs, tokenizers["bpe"], tmp_path / "out", append_eod=True)
    corpus, tokenizer = IndexedCorpus(tmp_path / "out"), load_tokenizer(tokenizers["bpe"])
    corpus.check_index()
    assert counts.documents == corpus.num_documents == 2 and counts.tokens == corpus.num_tokens
    first = corpus.document(0).tolist()
    assert first.count(2) == 1 and first[-1] == 2
    assert tokenizer.decode(first).replace(" ", "") == words.replace(" ", "")
    assert tokenizer.decode(corpus.document(1).tolist()) == "short"


def test_tokens_are_the_tokenizers(
    tmp_path: Path, forms: dict[str, Path], texts: list[str], tokenizers: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(tokenizers["unigram"])
    counts = preprocess([str(forms["jsonl"])], tokenizers["unigram"], tmp_path / "plain")
    corpus = IndexedCorpus(tmp_path / "plain")
    assert [corpus.document(i).tolist() for i in range(len(texts))] == tokenizer.encode_batch(texts)
    assert (counts.documents, counts.tokens, counts.bad, counts.empty) == (
        len(texts),
        corpus.num_tokens,
        0,
        0,
    )
    assert corpus.dtype == np.uint16
    preprocess([str(forms["parquet"])], tokenizers["unigram"], tmp_path / "ended", append_eod=True)
    ended = IndexedCorpus(tmp_path / "ended")
    assert all(
        ended.document(i).tolist() == [*corpus.document(i).tolist(), 2] for i in range(len(texts))
    )
    assert (
        subprocess.run(
            ["sha256sum", "-c", "ended.sha256"], cwd=tmp_path, capture_output=True
        ).returncode
        == 0
    )


BAD = [
    ('{"text": "good"}', ""),
    ('{"text": "cut', "3: is not JSON: Unterminated string"),
    ("[1]", "4: is not a JSON object"),
    ('{"txt": "a"}', '5: has no key "text"'),
    ('{"text": 7}', '6: "text" is not a string'),
    (r'{"text": "\ud800"}', "7: holds half of a surrogate pair"),
    ("[" * 100_000, "8: is not JSON: nested too deeply"),
    ('{"text": ""}', ""),
    ('{"text": "end"}', ""),
]


def test_bad_lines_are_counted_and_named_or_stop(
    tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "first"}\n'
        + "\n".join(line for line, _ in BAD).encode()
        + b'\n{"text": "\xff"}\n'
    )
    counts = preprocess([str(path)], tokenizers["bpe"], tmp_path / "out")
    assert (counts.documents, counts.bad, counts.empty) == (3, 7, 1)
    expected = [reason for _, reason in BAD if reason] + ["11: is not UTF-8"]
    for line, reason in zip(counts.named, expected, strict=True):
        assert line.startswith(f"{path}:{reason}")
    with pytest.raises(DataError, match=r"a.jsonl:3: is not JSON.*\(--strict\)"):
        preprocess([str(path)], tokenizers["bpe"], tmp_path / "strict", strict=True)
    assert not list(tmp_path.glob("strict*"))
    table = pyarrow.table({"text": ["a", None, "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    counts = preprocess([str(tmp_path / "a.parquet")], tokenizers["bpe"], tmp_path / "rows")
    assert counts.named == [f'{tmp_path}/a.parquet:2: "text" is not a string']


def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, tokenizers: dict[str, Path], forms: dict[str, Path]
) -> None:
    for name, size in (("jsonl.gz", 900), ("jsonl.zst", 900), ("parquet", 900)):
        (tmp_path / f"cut.{name}").write_bytes(forms[name].read_bytes()[:size])
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "empty.jsonl").write_text("\n")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "n.parquet")
    for name, line in (
        ("absent.jsonl", "no such file"),
        ("cut.jsonl.gz", "is damaged: Compressed file ended"),
        ("cut.jsonl.zst", "is damaged: Compressed file ended"),
        ("cut.parquet", "is not a .parquet file"),
        ("n.parquet", 'has no column "text" .--text-key.; it has n'),
        ("a.csv", "must end in .jsonl, .txt or .parquet"),
        ("empty.jsonl", "nothing to write: no document in the inputs, 0 bad lines"),
    ):
        with pytest.raises(DataError, match=line) as raised:
            preprocess([str(tmp_path / name)], tokenizers["bpe"], tmp_path / "out")
        assert "\n" not in str(raised.value)
        assert not list(tmp_path.glob("out.???"))
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of 256 MiB, compressed to a few hundred KB; the limit is 8 MiB."""
    path, part = tmp_path / f"endless.{form}", bytes(1 << 20)
    pack = {"jsonl": open, "jsonl.gz": gzip.open, "jsonl.zst": zstandard.open}[form]
    with pack(path, "wb") as file:
        file.write(b'{"text": "good"}\n')
        for _ in range(256):
            file.write(part)
    monkeypatch.setattr(documents, "_LARGEST_LINE", 8 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=r"line 2: does not end within 8 MiB: must be lines of JSON"
        ) as raised:
            list(read_texts([str(path)]))
        assert str(raised.value).startswith(f"{path}: ")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_an_existing_output_is_kept(
    tmp_path: Path, forms: dict[str, Path], tokenizers: dict[str, Path]
) -> None:
    preprocess([str(forms["jsonl"])], tokenizers["bpe"], tmp_path / "out")
    before = written(tmp_path / "out")
    with pytest.raises(DataError, match="out.idx: already exists"):
        preprocess([str(forms["jsonl"])], tokenizers["bpe"], tmp_path / "out", append_eod=True)
    assert written(tmp_path / "out") == before
    preprocess(
        [str(forms["jsonl"])], tokenizers["bpe"], tmp_path / "out", append_eod=True, overwrite=True
    )
    assert written(tmp_path / "out") != before
    IndexedCorpus(tmp_path / "out").check_index()
    assert not list(tmp_path.glob("out.partial"))


KILLED = """
import os, signal, sys
from megalite.data import documents, partial, preprocessing
documents.CHUNK_BYTES, partial._JOURNAL_SECONDS = 2000, 0.0
inputs, tokenizer, output, workers, chunks, where = sys.argv[1:]
add, replace = partial.Partial.add, os.replace
done = []
def counted(self, *arguments):
    done.append(1)
    if where == "add" and len(done) > int(chunks):
        self._files["tokens.bin"].write(b"never vouched for"); self._files["tokens.bin"].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return add(self, *arguments)
def renamed(source, target):
    if where == "rename" and str(target).endswith((".bin", ".idx", ".sha256")):
        done.append(1)
        if len(done) > int(chunks):
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)
partial.Partial.add = counted
os.replace = renamed
if where == "rename":
    partial.Partial.add = add
if __name__ == "__main__":
    preprocessing.preprocess(inputs.split(","), tokenizer, output, workers=int(workers), append_eod=True)
    print("finished", len(done))
"""


@pytest.mark.parametrize(
    ("workers", "where", "stops"),
    [(1, "add", [3, 9, 40]), (2, "add", [5]), (1, "rename", [0, 1, 1])],
)
def test_a_killed_run_is_resumed(
    tmp_path: Path,
    forms: dict[str, Path],
    tokenizers: dict[str, Path],
    workers: int,
    where: str,
    stops: list[int],
) -> None:
    """Killed at several places, the resumed run writes the same bytes as an uninterrupted one."""
    inputs = ",".join(str(forms[name]) for name in ("jsonl.gz", "parquet", "jsonl.zst", "jsonl"))
    # A single file needs no transformers, which makes starting quick.
    model = tokenizers["bpe"] / "tokenizer.model"
    preprocess(inputs.split(","), model, tmp_path / "whole", append_eod=True)
    (tmp_path / "killed.py").write_text(KILLED)

    def run(stop: int) -> subprocess.CompletedProcess[str]:
        arguments = [inputs, str(model), str(tmp_path / "out"), str(workers), str(stop), where]
        return subprocess.run(
            [sys.executable, str(tmp_path / "killed.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )

    for stop in stops:
        assert run(stop).returncode == -signal.SIGKILL
        assert not (tmp_path / "out.idx").exists()
    last = run(10**6)
    assert last.returncode == 0, last.stderr
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert (tmp_path / "out.sha256").exists() and not (tmp_path / "out.partial").exists()
    if where == "add":  # the last run did not start from the beginning
        chunks = sum(len(list(_small_chunks(path))) for path in inputs.split(","))
        assert int(last.stdout.split()[1]) <= chunks - sum(stops) + 2 * workers
    if workers > 1:
        _wait_until_gone(str(tmp_path / "killed.py"))


def _small_chunks(path: str) -> list[documents.TextChunk]:
    size, documents.CHUNK_BYTES = documents.CHUNK_BYTES, 2000
    try:
        return list(read_chunks([path], [kind_of(path)], "text", InputPosition()))
    finally:
        documents.CHUNK_BYTES = size


def _wait_until_gone(command: str) -> None:
    """Waits until the workers of a killed run have exited."""
    for _ in range(100):
        found = [
            pid for pid in os.listdir("/proc") if pid.isdigit() and command in _command_line(pid)
        ]
        if not found:
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {found}")


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_partial_result_of_other_arguments_is_refused(
    tmp_path: Path,
    forms: dict[str, Path],
    tokenizers: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megalite.data.preprocessing.Partial.finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            preprocess([str(forms["jsonl"])], tokenizers["bpe"], tmp_path / "out")
    with pytest.raises(
        DataError, match="out.partial: was written with other inputs, options or tokenizer"
    ):
        preprocess([str(forms["jsonl"])], tokenizers["unigram"], tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(
            "megalite.data.preprocessing.read_chunks", lambda inputs, kinds, key, place: iter(())
        )
        # Everything had been tokenized.
        counts = preprocess([str(forms["jsonl"])], tokenizers["bpe"], tmp_path / "out")
    assert counts.documents == IndexedCorpus(tmp_path / "out").num_documents > 0


def test_the_program(
    tmp_path: Path, forms: dict[str, Path], tokenizers: dict[str, Path], texts: list[str]
) -> None:
    def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        model = str(tokenizers["bpe"] / "tokenizer.model")
        command = [sys.executable, "tools/preprocess_data.py", "--tokenizer", model, *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, timeout=60)

    done = run(
        "--input",
        "-",
        "--output",
        str(tmp_path / "out"),
        stdin=forms["jsonl"].read_bytes() + b"{\n",
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"{len(texts)} documents" in done.stdout.decode() and "1 bad lines" in done.stdout.decode()
    )
    assert done.stderr.decode().startswith("bad line: -:")
    preprocess([str(forms["jsonl"])], tokenizers["bpe"], tmp_path / "same")
    assert written(tmp_path / "out") == written(tmp_path / "same")
    again = run("--input", str(forms["jsonl"]), "--output", str(tmp_path / "out"))
    assert again.returncode == 2 and len(again.stderr.decode().splitlines()) == 1


def test_progress_is_a_line_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megalite.data import progress

    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    lines = io.StringIO()
    monkeypatch.setattr(sys, "stderr", lines)
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").write_bytes(bytes(3000))
    with progress.Progress([str(tmp_path / "a"), str(tmp_path / "b")], 4000) as shown:
        shown.show(0, 500, 10, 100)
        time.sleep(0.01)
        shown.show(1, 1000, 20, 2000)
    last = lines.getvalue().splitlines()[-1]
    assert last.startswith("50 %: 20 documents, 2,000 tokens, ") and last.endswith(" left")
