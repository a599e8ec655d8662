"""Batches: they depend only on their positions; labels that do not count; ids beyond the vocabulary."""

import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megalite.config import load_config
from megalite.data.indexed import files_of
from megalite.data.indexed_writer import IndexedWriter, write_index
from megalite.data.loader import TrainData, ValidData, check_data
from megalite.errors import ConfigError, DataError
from tests.unit.data.corpora import data_section, write_corpus


@pytest.mark.parametrize("order", [{}, {"order": "megatron", "megatron_samples": 5000}])
def test_a_batch_is_a_function_of_its_positions(tmp_path: Path, order: dict) -> None:
    for i in range(3):
        write_corpus(tmp_path / f"c{i}", 40, seed=i)
    sources = [
        {"path": str(tmp_path / f"c{i}"), "weight": weight} for i, weight in enumerate((0.5, 2, 1))
    ]
    data = data_section(sources, 16, **order)
    whole = TrainData(data, 3, 1000).batch(range(4200))
    assert whole.tokens.dtype == whole.labels.dtype == np.int64 and whole.documents is None
    assert (whole.tokens[:, 1:] == whole.labels[:, :-1]).all()
    again = TrainData(data, 3, 1000)
    for positions in ([4150, 3, 3, 77], range(4090, 4110), [0]):
        assert (again.batch(positions).tokens == whole.tokens[list(positions)]).all()
        assert (again.batch(positions).labels == whole.labels[list(positions)]).all()
    assert not (TrainData(data, 4, 1000).batch(range(64)).tokens == whole.tokens[:64]).all()
    for share, asked in zip(again.shares(4200), (1 / 7, 4 / 7, 2 / 7), strict=True):
        assert share.asked == pytest.approx(asked) and abs(share.samples - 4200 * asked) <= 1
    lines = again.share_lines(4200)
    assert (
        lines[1] == f"data: {tmp_path}/c1: 2,400 of 4,200 samples, 57.1429%; requested 57.1429%"
        and len(lines) == 3
    )


def test_a_far_position_is_read_without_a_table(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 40)
    write_corpus(tmp_path / "b", 40, seed=1)
    data = TrainData(
        data_section([tmp_path / "a", {"path": str(tmp_path / "b"), "weight": 0.17}], 16), 3, 1000
    )
    assert data.batch([10**11]).tokens.shape == (1, 16)


def test_validation_takes_each_window_once_in_order(tmp_path: Path) -> None:
    flat = [np.concatenate(write_corpus(tmp_path / f"c{i}", 30, seed=i)) for i in range(2)]
    data = data_section([tmp_path / "c0"], 16, valid=[str(tmp_path / "c0"), str(tmp_path / "c1")])
    valid = ValidData(data, 1000)
    sizes = [(len(tokens) - 1) // 16 for tokens in flat]
    assert valid.num_samples == sum(sizes)
    assert valid.corpora == [
        (str(tmp_path / "c0"), range(sizes[0])),
        (str(tmp_path / "c1"), range(sizes[0], sum(sizes))),
    ]
    for tokens, (_, positions) in zip(flat, valid.corpora, strict=True):
        assert (
            valid.batch(positions).tokens.ravel().tolist() == tokens[: len(positions) * 16].tolist()
        )
        assert (
            valid.batch(positions).labels.ravel().tolist()
            == tokens[1 : len(positions) * 16 + 1].tolist()
        )


def test_documents_kept_apart_do_not_predict_each_other(tmp_path: Path) -> None:
    made = write_corpus(tmp_path / "a", 60, mean=9)
    flat, owner = (
        np.concatenate(made),
        np.repeat(np.arange(60), [len(document) for document in made]),
    )
    valid = ValidData(
        data_section(["x"], 20, valid=[str(tmp_path / "a")], reset_attention=True), 1000
    )
    batch = valid.batch(range(valid.num_samples))
    assert batch.documents is not None and batch.documents.dtype == np.int32
    used = valid.num_samples * 20
    ends = owner[:used] != owner[1 : used + 1]
    assert (
        batch.labels.ravel() == np.where(ends, -100, flat[1 : used + 1])
    ).all() and ends.sum() > 20
    starts = owner[:used].reshape(-1, 20)
    assert (batch.documents == starts - starts[:, :1]).all()


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    made = write_corpus(tmp_path / "a", 40)
    place = sum(len(document) for document in made[:7]) + 2
    tokens = files_of(tmp_path / "a")[1]
    data = bytearray(tokens.read_bytes())
    data[2 * place : 2 * place + 2] = struct.pack("<H", 1234)
    tokens.write_bytes(data)
    line = f"a.bin: byte {2 * place}: token {place} (document 7) is 1234: must be from 0 to 999"
    section = data_section([tmp_path / "a"], 16, valid=[str(tmp_path / "a")])
    for read in (
        lambda: TrainData(section, 1, 1000).batch(range(100)),
        lambda: ValidData(section, 1000).batch([place // 16]),
        lambda: check_data(section, 1000),
    ):
        with pytest.raises(DataError) as raised:
            read()
        assert line in str(raised.value)


def test_a_corpus_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(range(16))
    with pytest.raises(
        DataError, match="has 16 tokens: must have at least megalite.data.sequence_length 16 . 1"
    ):
        TrainData(data_section([tmp_path / "a"], 16), 1, 1000)
    assert (
        TrainData(data_section([tmp_path / "a"], 15), 1, 1000).batch([0, 1]).tokens.tolist()
        == [list(range(15))] * 2
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "megalite.data.megatron_samples=5",
            'megalite.data.megatron_samples: 5: needs megalite.data.order "megatron"',
        ),
        (
            "megalite.data.order=megatorn",
            "megalite.data.order: \"megatorn\": must be 'shuffled' or 'megatron'",
        ),
        (
            'megalite.data.train=[{"path":"a","split":[0.5,0.5]}]',
            "megalite.data.train.0.split: [0.5, 0.5]: must be",
        ),
        (
            'megalite.data.train=["a",{"path":"b","weight":1e-7}]',
            "megalite.data.train.1.weight: 1e-07: must be at",
        ),
    ],
)
def test_a_mistake_in_the_section_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("ds_configs/tiny_cpu.json", [override]).resolve(8)
    assert line in str(raised.value)


def test_megatrons_order_is_made_for_the_whole_run() -> None:
    keys = ["megalite.data.order=megatron", "megalite.train.steps=30"]
    config = load_config("ds_configs/tiny_cpu.json", keys).resolve(8)
    assert config.data.megatron_samples == 30 * config.train_batch_size
    with pytest.raises(
        ConfigError, match="must be at least the samples of megalite.train.steps, 480"
    ):
        load_config(
            "ds_configs/tiny_cpu.json", [*keys, "megalite.data.megatron_samples=479"]
        ).resolve(8)


def test_start_and_batch_cost_the_same_at_any_size(tmp_path: Path) -> None:
    """A corpus of 2·10^10 tokens (a sparse file): opening and reading do not take longer."""
    sequences, size = 20, 10**9
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate(2 * sequences * size)
    write_index(tmp_path / "a.idx", np.dtype(np.uint16), np.full(sequences, size, np.int32), None)
    section = data_section([tmp_path / "a", {"path": str(tmp_path / "a"), "weight": 0.3}], 1000)
    tracemalloc.start()
    start = time.perf_counter()
    batch = TrainData(section, 1, 1000).batch(range(10**9, 10**9 + 8))
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.tokens.shape == (8, 1000)
    assert peak < 3e6 and seconds < 5


def test_the_benchmark_and_the_merge_run(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 5)
    for command in (
        ["tools/benchmark_data.py", "--tokens", "300000", "--sequence-length", "64"],
        [
            "tools/merge_data.py",
            "--input",
            str(tmp_path / "a"),
            str(tmp_path / "a"),
            "--output",
            str(tmp_path / "b"),
        ],
    ):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "samples per processor second" in done.stdout or "b: 10 documents" in done.stdout
