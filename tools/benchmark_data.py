#!/usr/bin/env python3
"""Measure data processing on this machine: tokenization compared with Megatron's, batches, and Megatron's order.

Tokenization rates are per second of CPU time of all processes: per core, and hardly affected by other programs. They
are medians over rounds, with minimum and maximum; after each name is our rate divided by its rate.
"""

import megalite.ranks.startup  # noqa: F401  (first: see there)

# isort: split
import importlib
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megalite.config.section import parse
from megalite.config.sections import Data
from megalite.data.indexed import token_dtype
from megalite.data.indexed_writer import write_index
from megalite.data.loader import TrainData
from megalite.data.megatron import SampleIndex, document_index, shuffle_index
from megalite.data.preprocessing import preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.races.loader_race import write_random_corpus
from megalite.ranks.arguments import ArgumentParser, at_least, positive
from megalite.ranks.run_program import run_program

_WORDS = 4000  # of the synthetic language


def made_up_text(path: Path, megabytes: float) -> None:
    """Writes JSON lines with documents of 50 to 4,000 characters of random words."""
    chance = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(chance.choices(letters, k=chance.randint(1, 9))) for _ in range(_WORDS)]
    frequencies = [1 / (rank + 3) for rank in range(_WORDS)]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            count = chance.randint(10, 700)
            written += file.write(
                json.dumps({"text": " ".join(chance.choices(words, frequencies, k=count))}) + "\n"
            )


def processor_seconds() -> float:
    """CPU seconds of this process and of its children that have exited."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


_encode: Callable[[str], list[int]]


def _start_megatron_worker(folder: str, bare: bool) -> None:
    global _encode
    tokenizer: Any = load_tokenizer(folder)
    _encode = tokenizer.encode if bare else lambda text: tokenizer.inner(text)["input_ids"]


def _megatron_line(line: str) -> tuple[list[int], list[int], int]:
    ids = _encode(json.loads(line)["text"])
    return ids, [len(ids)], len(line)


def megatron_way(text: Path, folder: str, prefix: Path, workers: int, bare: bool) -> None:
    """Tokenizes like Megatron's tools/preprocess_data.py: lines through a Pool in chunks of 32, lists of ids back, one
    writer.

    bare: with our call of the tokenizer instead of transformers' (`tokenizer(text)`), which Megatron uses."""
    vocabulary = load_tokenizer(folder).vocabulary_size
    dtype, sizes = token_dtype(vocabulary), []
    with get_context("spawn").Pool(workers, _start_megatron_worker, (folder, bare)) as pool:
        with open(text, encoding="utf-8") as lines, open(f"{prefix}.bin", "wb") as file:
            for ids, lengths, _ in pool.imap(_megatron_line, lines, 32):
                file.write(np.array(ids, dtype).tobytes())
                sizes += lengths
        pool.close()
        pool.join()
    write_index(Path(f"{prefix}.idx"), dtype, np.array(sizes, np.int32), None)


def tokenizing(text: Path, folder: str, scratch: Path, workers: int, rounds: int) -> Iterator[str]:
    """Runs all implementations on the same file in turns; their start-up is measured on a file of one line and
    subtracted."""
    small = scratch / "one.jsonl"
    small.write_text('{"text": "one"}\n')
    megabytes = text.stat().st_size / 1e6
    # One-time loading in this process is not part of any start-up.
    load_tokenizer(folder).encode("one")
    ways: dict[str, Callable[[Path, Path], Any]] = {
        "megalite": lambda source, to: preprocess([str(source)], folder, to, workers=workers),
        "Megatron's way, transformers' call": lambda source, to: megatron_way(
            source, folder, to, workers, False
        ),
        "Megatron's way, our call": lambda source, to: megatron_way(
            source, folder, to, workers, True
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        results = []
        for number, (name, way) in enumerate(ways.items()):
            seconds = []
            for source in (small, text):
                before, prefix = processor_seconds(), scratch / f"way{number}_{turn}_{source.stem}"
                way(source, prefix)
                seconds.append(processor_seconds() - before)
            results.append(Path(f"{prefix}.bin").read_bytes())
            rates[name].append(megabytes / (seconds[1] - seconds[0]))
        assert results[0] == results[1] == results[2], "all ways must give the same tokens"
    ours = median(rates["megalite"])
    for name, values in rates.items():
        yield (
            f"  {median(values):8.2f} MB per processor second ({min(values):.2f} to {max(values):.2f})  {name}: "
            f"{ours / median(values):.2f}"
        )


def batches(scratch: Path, tokens: int, length: int, rounds: int) -> Iterator[str]:
    """Start-up time and samples per second for corpora of growing sizes, at the beginning and far inside a run."""
    for size in (tokens // 100, tokens // 10, tokens):
        prefix = scratch / f"corpus{size}"
        write_random_corpus(prefix, size, 1000)
        source = {"path": str(prefix), "weight": 0.7}
        keys = {"train": [source, {"path": str(prefix), "weight": 0.3}], "sequence_length": length}
        start = time.perf_counter()
        data = TrainData(parse(Data, keys), 1, 50_000, check=False)
        data.batch([10**9])
        opened = time.perf_counter() - start
        rates: dict[int, list[float]] = {0: [], 10**9: []}
        for turn in range(rounds):
            for first, found in rates.items():
                begin = first + 3200 * turn
                start = time.process_time()
                for position in range(begin, begin + 3200, 16):
                    data.batch(range(position, position + 16))
                found.append(3200 / (time.process_time() - start))
        near, far = (median(found) for found in rates.values())
        yield (
            f"  {size:>13,} tokens: first batch after {1e3 * opened:6.2f} ms; {near:9,.0f} samples per processor "
            f"second from position 0, {far:9,.0f} from position 10^9 ({near * length / 1e6:,.0f} M tokens)"
        )


def megatrons_order(tokens: int, length: int) -> Iterator[str]:
    """Times the three indices for one epoch; the sample index also with megatron-core's helper, if it is installed."""
    try:
        make = importlib.import_module("megatron.core.datasets.helpers").build_sample_idx
    except ImportError:
        make = None
    for mean in (100, 1000, 10_000):
        chance = np.random.default_rng(0)
        sizes = chance.integers(1, 2 * mean, tokens // mean).astype(np.int32)
        total = int(sizes.sum(dtype=np.int64))
        state = np.random.RandomState(1)
        start = time.perf_counter()
        order = document_index(len(sizes), 1, False, state)
        shuffle_index((total - 1) // length, (total - 1) // length, state)
        tables = time.perf_counter() - start
        ours = fastest(SampleIndex, sizes, order, length)
        line = f"  documents of {mean:>6,}: shuffles {1e3 * tables:7.2f} ms, sample index {1e3 * ours:6.2f} ms"
        if make is not None:
            line += f", megatron-core's helper {1e3 * fastest(make, sizes, order, length, 1, total):6.2f} ms"
        yield line


def fastest(call: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of the fastest of ten calls."""
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        call(*arguments)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="tokenizer to measure with; without it tokenization is skipped",
    )
    parser.add_argument("--input", metavar="FILE", help=".jsonl to tokenize (default: random text)")
    parser.add_argument(
        "--megabytes", type=positive, default=20, help="size of the random text (default: 20)"
    )
    parser.add_argument(
        "--workers", type=at_least(1), default=1, help="processes that tokenize (default: 1)"
    )
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        default=3,
        help="rounds of tokenization and of batches (default: 3)",
    )
    parser.add_argument(
        "--tokens",
        type=at_least(1),
        default=100_000_000,
        help="size of the largest corpus (default: 10^8)",
    )
    parser.add_argument(
        "--sequence-length",
        type=at_least(1),
        default=2048,
        help="tokens per sample (default: 2,048)",
    )
    args = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if args.tokenizer:
            text = Path(args.input) if args.input else scratch / "text.jsonl"
            if not args.input:
                made_up_text(text, args.megabytes)
            print(f"tokenizing {text.stat().st_size / 1e6:.1f} MB, {args.workers} workers:")
            for line in tokenizing(text, args.tokenizer, scratch, args.workers, args.rounds):
                print(line, flush=True)
        print(f"batches of 16 samples of {args.sequence_length} tokens, blend of two:")
        for line in batches(scratch, args.tokens, args.sequence_length, args.rounds):
            print(line, flush=True)
        print(f"Megatron's order of {args.tokens:,} tokens:")
        for line in megatrons_order(args.tokens, args.sequence_length):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    run_program(main)
