"""Samples of encoder-decoders: pairs and span corruption, which depend only on the sample's number."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.config import Config, check_model, load_config
from megalite.config.objectives import Spans, span_lengths
from megalite.config.section import parse
from megalite.data.indexed import marks_prefix
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import UNCOUNTED, TrainData, ValidData
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from tests.small_models import MODELS
from tests.unit.data.corpora import data_section, write_corpus

START, END, VOCABULARY, LENGTH = 9, 2, 1000, 64
SENTINELS = list(range(999, 980, -1))
SPANS: dict[str, Any] = {
    "span_corruption": 0.2,
    "mean_span": 2.5,
    "start_token_id": START,
    "end_token_id": END,
    "sentinel_token_ids": SENTINELS,
}
PAIRS = [([11, 12, 13], [21, 22]), ([14], [23]), (list(range(100, 120)), list(range(200, 215)))]


def pairs(folder: Path, source_length: int, length: int) -> TrainData:
    if not (folder / "p.idx").exists():
        with (
            IndexedWriter(folder / "p", np.uint16) as tokens,
            IndexedWriter(Path(marks_prefix(folder / "p")), np.uint8) as marks,
        ):
            for source, target in PAIRS:
                tokens.add_document(np.array([*source, *target, END]))
                marks.add_document(np.array([0] * len(source) + [1] * (len(target) + 1)))
    objective = {"source_length": source_length, "start_token_id": START}
    keys = {"samples": "padded", "loss": "marked", "reset_attention": True, "objective": objective}
    return TrainData(data_section([folder / "p"], length, **keys), 3, VOCABULARY)


def test_a_pair_is_a_source_and_a_target_that_begins_with_its_start(tmp_path: Path) -> None:
    data = pairs(tmp_path, 6, 11)
    tokens, labels, documents, _ = data.batch(range(3))
    assert documents is not None
    seen = set()
    for row in range(3):
        number = next(n for n, (s, _) in enumerate(PAIRS) if s[0] == tokens[row, 0])
        seen.add(number)
        source, target = PAIRS[number][0][:5], [*PAIRS[number][1], END][:5]
        filling = 5 - len(source)
        assert tokens[row, :6].tolist() == [*source, END] + [0] * filling
        assert documents[row, :6].tolist() == [0] * (len(source) + 1) + [1] * filling
        assert tokens[row, 6 : 6 + len(target)].tolist() == [START, *target[:-1]]
        assert labels[row].tolist() == [-100] * 6 + target + [-100] * (5 - len(target))
    assert seen == {0, 1, 2}, "each once an epoch"
    (note,) = data.notes
    longest = max(len(source) for source, _ in PAIRS), max(len(target) for _, target in PAIRS)
    lost = [sum(len(s) > 5 for s, _ in PAIRS), sum(len(t) + 1 > 5 for _, t in PAIRS)]
    assert f"of 3 pairs, {lost[0]} sources and {lost[1]} targets are truncated" in note
    assert sum(lost) > 0 and not pairs(tmp_path / "roomy", longest[0] + 1, sum(longest) + 2).notes


def corrupted(folder: Path, seed: int = 5, length: int = LENGTH) -> TrainData:
    if not (folder / "c.idx").exists():
        write_corpus(folder / "c", 200, vocabulary=900)
    return TrainData(data_section([folder / "c"], length, objective=SPANS), seed, VOCABULARY)


def test_source_and_target_together_are_the_text(tmp_path: Path) -> None:
    data = corrupted(tmp_path)
    lengths = span_lengths(parse(Spans, SPANS), LENGTH)
    assert lengths is not None and lengths.source + lengths.target <= LENGTH
    tokens, labels, documents, _ = data.batch(range(40))
    assert documents is None
    plain = data_section([tmp_path / "c"], lengths.text, objective={"masked": 1e-9, "mask_token_id": 1})  # fmt: skip
    whole = TrainData(plain, 5, VOCABULARY).batch(range(40)).tokens
    noise = 0
    for row in range(40):
        source, target = tokens[row, : lengths.source].tolist(), labels[row, lengths.source :]
        wanted = target[target != UNCOUNTED].tolist()
        assert len(wanted) == lengths.target and wanted[-1] == source[-1] == END
        assert (labels[row, : lengths.source] == UNCOUNTED).all()
        begun = tokens[row, lengths.source : lengths.source + lengths.target].tolist()
        assert begun == [START, *wanted[:-1]]
        used = SENTINELS[: lengths.spans]
        assert (
            [t for t in source if t in SENTINELS] == used == [t for t in wanted if t in SENTINELS]
        )
        spans: dict[int, list[int]] = {}
        for token in wanted[:-1]:
            if token in used:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        assert all(spans.values())
        noise += sum(map(len, spans.values()))
        rebuilt = [t for token in source[:-1] for t in spans.get(token, [token])]
        assert rebuilt == whole[row].tolist()
    assert noise == 40 * lengths.noise and lengths.noise == round(0.2 * lengths.text)


def test_spans_follow_from_the_sample_s_number_alone(tmp_path: Path) -> None:
    whole = corrupted(tmp_path).batch(range(64))
    for positions in ([63, 5, 5], range(17, 40)):
        again = corrupted(tmp_path).batch(positions)
        assert (again.tokens == whole.tokens[list(positions)]).all()
        assert (again.labels == whole.labels[list(positions)]).all()
    other = corrupted(tmp_path, seed=6).batch(range(64))
    assert not (other.labels == whole.labels).all()
    # The same texts in another epoch, or elsewhere in the run, have other spans; each place is as likely as another.
    count = len(np.unique(whole.labels, axis=0))
    assert count == 64
    valid = {"valid": [str(tmp_path / "c")], "objective": SPANS}
    section = data_section([tmp_path / "c"], LENGTH, **valid)
    first, second = (ValidData(section, VOCABULARY).batch(range(8)) for _ in range(2))
    assert (first.tokens == second.tokens).all(), "an evaluation has the same spans every time"


def test_each_division_is_as_likely_as_another(tmp_path: Path) -> None:
    """The first span may start anywhere that leaves space for the others; the mean is within four deviations."""
    lengths = span_lengths(parse(Spans, SPANS), LENGTH)
    assert lengths is not None
    tokens = corrupted(tmp_path).batch(range(2000)).tokens
    first = np.argmax(tokens == SENTINELS[0], axis=1)
    kept, spans = lengths.text - lengths.noise, lengths.spans
    mean = kept / spans
    spread = np.sqrt((kept - spans) * kept * (spans - 1) / (spans**2 * (spans + 1)))
    assert abs(first.mean() - mean) < 4 * spread / 2000**0.5


BASE: dict[str, Any] = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "megalite": {
        "model": {**MODELS["t5"], "decoder_start_token_id": START},
        "data": {"sequence_length": LENGTH, "train": ["c"], "objective": SPANS},
        "train": {"steps": 3, "run_dir": "r"},
    },
}
_OF_PAIRS = {"objective": {"source_length": 40, "start_token_id": START}, "samples": "padded",
             "loss": "marked", "reset_attention": True}  # fmt: skip


@pytest.mark.parametrize(
    ("section", "change", "line"),
    [
        ("data", {"objective": "causal"}, 'objective: "causal": must be {"source_length": 64} or'),
        ("data", {"objective": {"masked": 0.1, "mask_token_id": 1}}, "or similar with a t5 model"),
        ("data", {"objective": {**SPANS, "start_token_id": 0}},
         "start_token_id: 0: must be the model's decoder_start_token_id 9"),
        ("data", {"objective": {"span_corruption": 0.1, "end_token_id": 1}},
         "sentinel_token_ids: missing: give it or megalite.data.tokenizer"),
        ("data", {"sequence_length": 4}, "sequence_length: 4: is too short for a span"),
        ("data", {"reset_attention": True}, "true: must be false with megalite.data.objective.span_corruption"),
        ("data", {**_OF_PAIRS, "samples": "packed"}, 'must be "padded" with megalite.data.objective.source_length'),
        ("data", {**_OF_PAIRS, "loss": "all"}, 'loss: "all": must be "marked"'),
        ("data", {**_OF_PAIRS, "sequence_length": 40}, "40: must be below megalite.data.sequence_length 40"),
        ("model", MODELS["llama"], "needs an encoder-decoder, such as t5: a llama model has no source"),
        ("parallel", {"tensor": 2, "sequence": True}, "sequence: true: must be false with a t5 model"),
        ("parallel", {"context": 2}, "megalite.parallel.context: 2: must be 1 with a t5 model"),
        ("train", {"sample_prompts": ["a"]}, 'sample_prompts: ["a"]: must be left out with a t5 model'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(section: str, change: dict[str, Any], line: str) -> None:
    keys = json.loads(json.dumps(BASE))
    before = {} if section == "model" else keys["megalite"].get(section, {})
    keys["megalite"][section] = {**before, **change}
    with pytest.raises(ConfigError) as raised:
        config = Config.from_dict(keys).resolve(4)
        check_model(config, read_spec(config.model))
    assert line in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"end_token_id": 1000}, "end_token_id: 1000: must be below the model's vocab_size 1000"),
        (
            {"sentinel_token_ids": [5, 5, 6]},
            "sentinel_token_ids: 2 tokens: must be 4, one per span",
        ),
    ],
)
def test_a_token_that_is_missing_is_one_line(
    tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    write_corpus(tmp_path / "c", 20, vocabulary=900)
    section = data_section([tmp_path / "c"], LENGTH, objective={**SPANS, **change})
    with pytest.raises(ConfigError, match=line):
        TrainData(section, 1, VOCABULARY)


def test_the_shipped_config_has_t5_s_own_lengths() -> None:
    spans = load_config("ds_configs/t5.json").data.spans
    assert spans is not None and (spans.source, spans.target) == (512, 114)
