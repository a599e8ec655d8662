"""Megatron's order compared with a slow, plain implementation of its rules, and with megatron-core itself."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.indexed import IndexedCorpus
from megalite.data.loader import TrainData
from megalite.data.megatron import MegatronBlend, MegatronSamples, SampleIndex
from megalite.data.samples import read_tokens
from megalite.errors import DataError
from tests.unit.data.corpora import data_section, write_corpus


def oracle(documents: list[np.ndarray], length: int, samples: int, seed: int) -> list[list[int]]:
    """The samples by Megatron's rules, with lists and loops."""
    tokens = sum(len(document) for document in documents)
    epochs = 1
    while epochs * tokens < samples * length + 1:
        epochs += 1
    chance = np.random.RandomState(seed)
    apart = False
    if epochs > 1:
        before = ((epochs - 1) * tokens - 1) // length
        apart = samples - before < int(0.8 * ((tokens - 1) // length))
    order: list[int] = []
    for part in [epochs - 1, 1] if apart else [epochs]:
        piece = np.array(list(range(len(documents))) * part, np.int32)
        chance.shuffle(piece)
        order += piece.tolist()
    flat = [token for document in order for token in documents[document].tolist()]
    made = [flat[i * length : i * length + length + 1] for i in range((len(flat) - 1) // length)]
    first = before if apart else len(made)
    shuffled = []
    for part in (list(range(first)), list(range(first, len(made)))):
        piece = np.array(part, np.uint32)
        if part:
            chance.shuffle(piece)
        shuffled += piece.tolist()
    return [made[i] for i in shuffled]


def read(samples: MegatronSamples, length: int) -> list[list[int]]:
    out = np.empty((samples.num_samples, length + 1), np.int64)
    for row, pieces in zip(out, samples.pieces(np.arange(samples.num_samples)), strict=True):
        read_tokens(samples.corpus, pieces, row)
    return out.tolist()


@pytest.mark.parametrize("seed", range(12))
def test_samples_are_those_of_the_oracle(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    made = write_corpus(
        tmp_path / "a", chance.randint(1, 60), mean=chance.choice([3, 30, 200]), seed=seed
    )
    corpus, length, wanted = (
        IndexedCorpus(tmp_path / "a"),
        chance.randint(1, 60),
        chance.randint(1, 300),
    )
    samples = MegatronSamples(corpus, range(len(made)), length, wanted, seed)
    assert samples.num_samples >= wanted
    assert read(samples, length) == oracle(made, length, wanted, seed)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=300), st.integers(1, 90))
def test_a_sample_begins_where_counting_says(sizes: list[int], length: int) -> None:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    within = np.concatenate([np.arange(size) for size in sizes])
    if len(owner) == 0:
        return
    index = SampleIndex(np.array(sizes, np.int32), np.arange(len(sizes), dtype=np.int32), length)
    samples = np.arange((len(owner) - 1) // length + 1)
    documents, tokens = index.begins(samples)
    assert documents.tolist() == owner[samples * length].tolist()
    assert tokens.tolist() == within[samples * length].tolist()


def test_a_run_longer_than_the_order_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 50)
    data = TrainData(
        data_section([tmp_path / "a"], 8, order="megatron", megatron_samples=100), 1, 1000
    )
    assert data.batch(range(100)).tokens.shape == (100, 8)
    with pytest.raises(DataError, match="built for 100 samples but the run needs sample 100"):
        data.batch([100])


class TestMegatronCore:
    """Comparison with megatron-core itself."""

    @pytest.fixture
    def core(self) -> Any:
        reason = "megatron-core is not installed"
        pytest.importorskip("megatron.core.datasets.helpers_cpp", reason=reason)
        from megatron.core.datasets import blended_megatron_dataset_builder as builder  # pyright: ignore
        from megatron.core.datasets import gpt_dataset  # pyright: ignore

        class Tokenizer:
            eod, vocab_size, unique_identifiers, pad = 0, 1000, {"tokenizer": "test"}, -1

        def build(
            blend: Any, samples: int, length: int, seed: int, folder: Path, split: str | None
        ) -> Any:
            apart = (
                {"blend_per_split": [blend, None, None]}
                if split is None
                else {"blend": blend, "split": split}
            )
            config = gpt_dataset.GPTDatasetConfig(
                random_seed=seed,
                sequence_length=length,
                tokenizer=Tokenizer(),
                path_to_cache=str(folder / "cache"),
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
                mid_level_dataset_surplus=0.005,
                **apart,
            )
            make = builder.BlendedMegatronDatasetBuilder(
                gpt_dataset.GPTDataset, [samples, 0, 0], lambda: True, config
            )
            return make.build()[0]

        return build

    @pytest.fixture
    def world(self, core: Any, tmp_path: Path) -> Any:
        """A process group, since BlendedDataset asks for the rank."""
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        yield
        dist.destroy_process_group()

    @pytest.mark.parametrize(
        ("samples", "length"), [(20, 16), (300, 16), (410, 16), (1000, 7), (90, 50)]
    )
    def test_one_corpus(self, core: Any, tmp_path: Path, samples: int, length: int) -> None:
        made = write_corpus(tmp_path / "a", 100)
        split = "969,31,0" if length == 7 else "1,0,0"
        theirs = core(([str(tmp_path / "a")], None), samples, length, 77, tmp_path, split)
        source = {"path": str(tmp_path / "a"), "split": [0, 0.969] if length == 7 else None}
        ours = TrainData(
            data_section([source], length, order="megatron", megatron_samples=samples), 77, 1000
        )
        batch = ours.batch(range(samples))
        assert len(made) == 100
        for i in range(samples):
            assert theirs[i]["tokens"].tolist() == batch.tokens[i].tolist()
            assert theirs[i]["labels"].tolist() == batch.labels[i].tolist()

    @pytest.mark.parametrize("weights", [[0.3, 0.7], [1.0, 1.0, 1.0], [5.0, 0.11, 1.7, 0.9]])
    @pytest.mark.usefixtures("world")
    def test_a_blend(self, core: Any, tmp_path: Path, weights: list[float]) -> None:
        prefixes = [str(tmp_path / f"c{i}") for i in range(len(weights))]
        for i, prefix in enumerate(prefixes):
            write_corpus(Path(prefix), 40, seed=i)
        theirs = core((prefixes, weights), 500, 16, 5, tmp_path, None)
        sources = [
            {"path": prefix, "weight": weight}
            for prefix, weight in zip(prefixes, weights, strict=True)
        ]
        ours = TrainData(data_section(sources, 16, order="megatron", megatron_samples=500), 5, 1000)
        tokens = ours.batch(range(500)).tokens
        assert all(theirs[i]["tokens"].tolist() == tokens[i].tolist() for i in range(500))
        given = np.bincount([theirs[i]["dataset_id"] for i in range(333)], minlength=len(weights))
        assert [share.samples for share in ours.shares(333)] == given.tolist()


def test_a_blend_counts_what_it_gives() -> None:
    blend = MegatronBlend([3, 1], 80)
    corpora, places = blend.locate(np.arange(80))
    assert blend.counts(80) == [60, 20] and places[corpora == 1].tolist() == list(range(20))
