"""Masked language modelling: which tokens are predicted; this depends only on the sample's number."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megalite.config import Config, check_model, load_config
from megalite.data.indexed import IndexedCorpus
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import UNCOUNTED, TrainData, ValidData, tokenizer_ids
from megalite.data.position import Position
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.parallel.grid import ALONE, Axis
from megalite.training.batches import LazyMicroBatches
from megalite.training.fingerprint import IDS, difference, fingerprint
from tests.small_models import MODELS
from tests.unit.data.corpora import data_section, write_corpus

VOCABULARY, LENGTH, MASK, SPECIAL = 1000, 32, 4, [0, 1, 2, 3]
OBJECTIVE = {
    "masked": 0.15,
    "keep": 0.1,
    "swap": 0.2,
    "mask_token_id": MASK,
    "special_token_ids": SPECIAL,
}


def training(folder: Path, seed: int = 7, documents: int = 400, **keys: Any) -> TrainData:
    if not (folder / "c.idx").exists():
        write_corpus(folder / "c", documents, vocabulary=VOCABULARY)
    return TrainData(
        data_section([folder / "c"], LENGTH, **{"objective": OBJECTIVE, **keys}), seed, VOCABULARY
    )


def within_four_deviations(count: int, of: int, share: float) -> bool:
    return abs(count - of * share) <= 4 * (of * share * (1 - share)) ** 0.5


def test_shares_are_those_asked_for(tmp_path: Path) -> None:
    tokens, labels, *_ = training(tmp_path).batch(range(4000))
    plain, *_ = training(tmp_path, objective={**OBJECTIVE, "masked": 1e-9}).batch(range(4000))
    chosen, possible = labels != UNCOUNTED, ~np.isin(plain, [MASK, *SPECIAL])
    assert (labels[chosen] == plain[chosen]).all() and (tokens[~chosen] == plain[~chosen]).all()
    assert not (chosen & ~possible).any() and (~possible).sum() > 300, (
        "special tokens are never asked for"
    )
    assert within_four_deviations(chosen.sum(), possible.sum(), 0.15)
    masked, kept = (tokens == MASK) & chosen, (tokens == plain) & chosen
    swapped = chosen & ~masked & ~kept
    assert within_four_deviations(masked.sum(), chosen.sum(), 0.7)
    others = VOCABULARY - 5  # the token itself may be drawn
    assert within_four_deviations(kept.sum(), chosen.sum(), 0.1 + 0.2 / others)
    assert within_four_deviations(swapped.sum(), chosen.sum(), 0.2 * (1 - 1 / others))
    drawn = np.bincount(tokens[swapped], minlength=VOCABULARY)
    assert drawn[[MASK, *SPECIAL]].sum() == 0 and (drawn > 0).mean() > 0.9
    # Positions and neighbouring samples are drawn independently.
    rate = chosen.sum() / possible.sum()
    for one, other in ((chosen[:, 1:], chosen[:, :-1]), (chosen[1:], chosen[:-1])):
        assert within_four_deviations((one & other).sum(), one.size, rate**2 * possible.mean() ** 2)


def test_masks_follow_from_the_sample_s_number_alone(tmp_path: Path) -> None:
    data = training(tmp_path)
    whole = data.batch(range(64))
    again = training(tmp_path)
    for positions in ([63, 5, 5], range(17, 40), [0]):
        for name in ("tokens", "labels"):
            assert (
                getattr(again.batch(positions), name) == getattr(whole, name)[list(positions)]
            ).all()
    assert not (training(tmp_path, seed=8).batch(range(64)).labels == whole.labels).all()
    device, made = torch.device("cpu"), []
    for micro, data_size in ((2, 1), (4, 2), (1, 4)):
        rows: dict[int, Any] = {}
        for rank in range(data_size):
            axis = Axis(data_size, rank, tuple(range(data_size)), None) if data_size > 1 else ALONE
            for number, batch in enumerate(
                LazyMicroBatches(data, 8, 16, micro, axis, device).read()
            ):
                first = (number * data_size + rank) * micro
                rows |= {first + i: (batch.tokens[i], batch.labels[i]) for i in range(micro)}
                assert batch.context.counted is not None
                assert (
                    batch.context.counted.tolist()
                    == (batch.labels.flatten() != -100).nonzero()[:, 0].tolist()
                )
        made.append(torch.stack([torch.stack(rows[i]) for i in range(16)]))
    assert made[0].equal(made[1]) and made[0].equal(made[2])
    assert made[0][:, 0].equal(torch.from_numpy(whole.tokens[8:24]))


def test_an_epoch_has_new_masks_and_evaluation_the_same_ones(tmp_path: Path) -> None:
    data = training(tmp_path, documents=3)
    size = IndexedCorpus(str(tmp_path / "c")).num_tokens // LENGTH
    first, second = data.batch(range(size)), data.batch(range(size, 2 * size))
    plain = training(tmp_path, objective={**OBJECTIVE, "masked": 1e-9})
    order = [plain.batch(range(start, start + size)).tokens for start in (0, size)]
    for row, tokens in enumerate(order[0]):
        (other,) = np.flatnonzero((order[1] == tokens).all(axis=1))
        assert not (first.labels[row] == second.labels[other]).all()
    keys = {"objective": OBJECTIVE, "valid": [str(tmp_path / "c")]}
    valid = ValidData(data_section([tmp_path / "c"], LENGTH, **keys), VOCABULARY)
    assert valid.num_samples == size
    assert (valid.batch([0, 1]).labels == valid.batch([1, 0]).labels[::-1]).all()
    assert not (valid.batch([0]).labels == first.labels[0]).all()


def test_whole_documents_keep_their_last_token_and_padding_is_not_predicted(tmp_path: Path) -> None:
    documents = [[5, 6, 7], [8], [9] * 40, [10, 11]]
    with IndexedWriter(tmp_path / "c", np.uint16) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    objective = {**OBJECTIVE, "masked": 0.999, "keep": 1.0, "swap": 0}
    data = training(tmp_path, samples="packed", reset_attention=True, objective=objective)
    assert (
        "1 of 4 documents are truncated to megalite.data.sequence_length 32 tokens" in data.notes[0]
    )
    rows = sorted(data.batch(range(2)).tokens.tolist())
    assert rows == [[5, 6, 7, 8, 10, 11] + [0] * 26, [9] * 32]
    batch = data.batch(range(200))
    filling = (batch.tokens == 0).all(axis=0) | (batch.tokens == 0)
    assert (batch.labels[filling] == UNCOUNTED).all() and (batch.labels != UNCOUNTED).mean() > 0.5


def test_the_share_follows_the_steps_and_evaluation_has_the_last(tmp_path: Path) -> None:
    """The tokens of a smaller share are among those of a larger one; halfway the share is the mean."""
    keys = {"objective": {**OBJECTIVE, "masked": [0.6, 0.2]}, "valid": [str(tmp_path / "c")]}
    data, last = training(tmp_path, **keys), None
    possible = np.isin(data.batch(range(500)).tokens, SPECIAL, invert=True).sum()
    for step, share in ((0, 0.6), (50, 0.4), (100, 0.2), (130, 0.2)):
        chosen = data.at(Position(step), 101).batch(range(500)).labels != UNCOUNTED
        assert within_four_deviations(chosen.sum(), possible, share)
        assert last is None or (last | ~chosen).all()
        last = chosen
    assert (data.at(Position(0), 1).batch(range(9)).labels == data.batch(range(9)).labels).all()
    found = []
    for masked in ([0.6, 0.2], [0.1, 0.2], 0.2):
        keys["objective"] = {**OBJECTIVE, "masked": masked}
        section = data_section([tmp_path / "c"], LENGTH, **keys)
        found.append(ValidData(section, VOCABULARY).batch(range(50)).labels)
        assert (found[-1] == found[0]).all()
        ends = masked if isinstance(masked, list) else [masked, masked]
        assert section.counted_share == pytest.approx(sum(ends) / 2)


def test_another_objective_is_another_run(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", 10)
    run = load_config(
        TINY, [*BASE, f"megalite.data.train={[str(tmp_path / 'c')]}".replace("'", '"')]
    ).resolve(8)
    assert difference(fingerprint(run), run) is None
    document = run.to_json()
    document["megalite"]["data"]["objective"]["keep"] = 0.2
    found = difference(fingerprint(run), Config.from_dict(document))
    assert (
        found is not None and found[0].startswith("megalite.data.objective: ") and "0.2" in found[0]
    )


def tokenizer_with(folder: Path, *names: str, **special: str) -> Path:
    """A tokenizer whose ids are the positions of the names."""
    model = models.WordLevel({name: number for number, name in enumerate(names)}, names[0])
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)
    made.save_pretrained(folder)
    return folder


def test_another_tokenizer_s_ids_are_another_run(tmp_path: Path) -> None:
    """A checkpoint from before this was recorded is accepted."""
    write_corpus(tmp_path / "c", 10, vocabulary=20)
    names = [f"word{number}" for number in range(20)]
    usual = {"mask_token": "word3", "eos_token": "word0"}
    first = tokenizer_with(tmp_path / "first", *names, **usual)

    def run(tokenizer: Path, *keys: str) -> Config:
        path = str(tmp_path / "c")
        given = [f'megalite.data.train=["{path}"]', f"megalite.data.tokenizer={tokenizer}"]
        masked = 'megalite.data.objective={"masked":0.15}'
        return load_config(TINY, [*BASE[1:2], *given, masked, *keys]).resolve(8)

    was = json.loads(json.dumps(fingerprint(run(first))))
    assert difference(was, run(first)) is None
    shutil.copytree(first, tmp_path / "moved")
    assert difference(was, run(tmp_path / "moved")) is None
    cases = {
        "mask token 4": tokenizer_with(
            tmp_path / "mask", *names, mask_token="word4", eos_token="word0"
        ),
        "special tokens [0, 2, 3]": tokenizer_with(
            tmp_path / "special", *names, **usual, cls_token="word2"
        ),
        "number of ids 21": tokenizer_with(tmp_path / "more", *names, "one more", **usual),
    }
    for told, folder in cases.items():
        given, _ = difference(was, run(folder)) or ("", "")
        assert given == f"megalite.data.tokenizer: {folder}: {told}"
        old = {key: value for key, value in was.items() if key != IDS}
        assert difference(old, run(folder)) is None


def test_another_tokenizer_s_sentinels_are_another_run(tmp_path: Path) -> None:
    names = [*(f"<extra_id_{number}>" for number in range(5)), "end", "other", "third"]
    first = tokenizer_with(tmp_path / "first", *names, eos_token="end")
    other = tokenizer_with(tmp_path / "other", *names[::-1], eos_token="end")
    ends = tokenizer_with(tmp_path / "ends", *names, eos_token="other")
    found = [
        tokenizer_ids(
            data_section(
                ["x"],
                12,
                tokenizer=str(folder),
                objective={"span_corruption": 0.5},
                samples="windows",
            ),
            20,
        )
        for folder in (first, other, ends)
    ]
    assert [ids["end of document"] for ids in found] == [5, 2, 6]
    assert [ids["sentinels"] for ids in found] == [[0], [7], [0]]


TINY = "ds_configs/tiny_cpu.json"
BASE = ["megalite.data.tokenizer=null", "megalite.data.sequence_length=64"]
BASE += ['megalite.data.objective={"masked":0.15,"mask_token_id":4}']


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["megalite.data.objective=masked"],
            'objective: "masked": must be "causal", "prefix" or an object such as {"masked":',
        ),
        (
            ['megalite.data.objective={"maskd":0.1}'],
            "maskd: unknown key; did you mean megalite.data.objective.masked?",
        ),
        (
            ['megalite.data.objective={"masked":1.5}'],
            "megalite.data.objective.masked: 1.5: must be above 0 and below 1, or two",
        ),
        (
            ['megalite.data.objective={"masked":[0.3,1.0]}'],
            "masked: [0.3, 1.0]: must be above 0 and below 1, or two such numbers, for the first and",
        ),
        (
            ['megalite.data.objective={"masked":[0.3]}'],
            "megalite.data.objective.masked: [0.3]: must be above 0 and below 1, or two",
        ),
        (
            [
                BASE[0],
                'megalite.data.objective={"masked":0.3,"whole_word":true,"mask_token_id":4}',
            ],
            "megalite.data.objective.whole_word: true: needs megalite.data.tokenizer",
        ),
        (['megalite.data.objective={"keep":0.5}'], "megalite.data.objective.masked: missing"),
        (
            ['megalite.data.objective={"masked":0.1,"keep":0.6,"swap":0.5}'],
            "keep: 0.6: must be at most 1 together",
        ),
        (
            [BASE[0], 'megalite.data.objective={"masked":0.1}'],
            "megalite.data.objective.mask_token_id: missing",
        ),
        (
            [*BASE, "megalite.data.order=megatron"],
            'order: "megatron": must be "shuffled" with a masked',
        ),
        ([*BASE, "megalite.data.loss=marked"], 'loss: "marked": must be "all" with a masked'),
        (
            [*BASE, "megalite.data.samples=padded"],
            'samples: "padded": needs megalite.data.reset_attention true with a',
        ),
    ],
)
def test_a_mistake_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(TINY, overrides).resolve(8)
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_the_objective_must_suit_the_model() -> None:
    bert, llama = read_spec(MODELS["bert"]), read_spec(MODELS["llama"])
    causal, masked = (load_config(TINY, [*BASE[:2], *keys]).resolve(8) for keys in ([], BASE[2:]))
    check_model(masked, bert)
    check_model(causal, llama)
    with pytest.raises(
        ConfigError, match="objective: .*0.15.*: needs an encoder, such as bert: a llama model"
    ):
        check_model(masked, llama)
    with pytest.raises(
        ConfigError, match='objective: "causal": must be {"masked": 0.15} or similar with a bert'
    ):
        check_model(causal, bert)


def test_tokens_come_from_the_tokenizer(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    keys = {"tokenizer": str(tokenizers["bpe"]), "objective": {"masked": 0.15}}
    with pytest.raises(
        ConfigError, match="tokenizer: .*: has no mask token: give megalite.data.objective.mask_tok"
    ):
        training(tmp_path, **keys)
    with pytest.raises(
        ConfigError,
        match="objective.mask_token_id: 1000: must be below the model's vocab_size 1000",
    ):
        training(tmp_path, objective={"masked": 0.15, "mask_token_id": 1000})
