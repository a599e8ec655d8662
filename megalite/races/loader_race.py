"""Race of the loaders: milliseconds of CPU time per batch of ours, in both orders, and of megatron-core's GPTDataset
with torch's collation, from the same corpus, in one process."""

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megalite.config.section import parse
from megalite.config.sections import Data
from megalite.data.indexed_writer import write_index
from megalite.data.loader import TrainData
from megalite.races.referee import spread

LENGTH, VOCABULARY, BATCH, SAMPLES = 1024, 50_000, 16, 4096
SIZES = (10**7, 10**8)

Read = Callable[[Sequence[int]], Any]


def write_random_corpus(prefix: Path, tokens: int, mean: int, vocabulary: int = VOCABULARY) -> None:
    """Writes a corpus of random ids in documents of `mean` tokens on average, in chunks."""
    chance = np.random.default_rng(0)
    sizes = chance.integers(1, 2 * mean, tokens // mean).astype(np.int32)
    left = int(sizes.sum(dtype=np.int64))
    with open(f"{prefix}.bin", "wb") as file:
        while left > 0:
            part = min(left, 1 << 22)
            file.write(chance.integers(0, vocabulary, part, dtype=np.uint16).tobytes())
            left -= part
    write_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), sizes, None)


def main(rounds: int) -> None:
    """Prints a line for each loader and size of corpus."""
    setup = (
        f"samples of {LENGTH:,} tokens, batches of {BATCH}, {rounds} rounds of {SAMPLES:,} samples"
    )
    print(f"\nloader: {setup}; milliseconds per batch in one process")
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="loader_") as folder:
            prefix = Path(folder) / "corpus"
            write_random_corpus(prefix, size, 1000)
            for line in _lines(prefix, size, rounds):
                print(line, flush=True)


def _lines(prefix: Path, size: int, rounds: int) -> Iterator[str]:
    # Imports torch, which no loader's start includes.
    importlib.import_module("megatron.core.datasets.gpt_dataset")
    ways: dict[str, Read] = {}
    opened: dict[str, float] = {}
    makes = {
        "megalite": _ours("shuffled"),
        "megalite, Megatron's order": _ours("megatron"),
        "GPTDataset": _megatron,
    }
    for name, make in makes.items():
        start = time.process_time()
        ways[name] = make(prefix, size // LENGTH)
        ways[name](range(1))
        opened[name] = time.process_time() - start
    batches = [range(i, i + BATCH) for i in range(0, SAMPLES, BATCH)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            start = time.process_time()
            for batch in batches:
                ways[name](batch)
            seconds[name].append((time.process_time() - start) / len(batches) * 1e3)
    theirs = median(seconds["GPTDataset"][1:])
    for name, values in seconds.items():
        ratio = theirs / median(values[1:])
        first = f"first batch after {opened[name] * 1e3:8.1f} ms"
        yield f"{size:>13,} tokens  {name:26}  {spread(values[1:])} ms  ratio {ratio:.2f}  {first}"


def _ours(order: str) -> Callable[[Path, int], Read]:
    def make(prefix: Path, samples: int) -> Read:
        import torch

        keys = {"train": [str(prefix)], "sequence_length": LENGTH, "order": order}
        if order == "megatron":
            keys["megatron_samples"] = samples
        data = TrainData(parse(Data, keys), 1, VOCABULARY, check=False)

        def read(positions: Sequence[int]) -> Any:
            batch = data.batch(positions)
            return torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)

        return read

    return make


def _megatron(prefix: Path, samples: int) -> Read:
    from torch.utils.data import default_collate

    builder = importlib.import_module("megatron.core.datasets.blended_megatron_dataset_builder")
    gpt_dataset = importlib.import_module("megatron.core.datasets.gpt_dataset")

    class StandInTokenizer:
        eod, vocab_size, unique_identifiers, pad = 0, VOCABULARY, {"tokenizer": "made up"}, -1

    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        tokenizer=StandInTokenizer(),
        path_to_cache=str(prefix.parent / "cache"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
        blend=([str(prefix)], None),
        split="1,0,0",
    )
    make = builder.BlendedMegatronDatasetBuilder(
        gpt_dataset.GPTDataset, [samples, 0, 0], lambda: True, config
    )
    dataset = make.build()[0]
    return lambda positions: default_collate([dataset[i] for i in positions])
