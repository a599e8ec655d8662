"""Texts with labels: preprocessing, and errors in data and config."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.config import Config, check_model
from megalite.data.indexed import IndexedCorpus, labels_prefix, names_file
from megalite.data.loader import TrainData, check_data
from megalite.data.preprocessing import preprocess
from megalite.errors import ConfigError, DataError
from megalite.model.families import read_spec
from tests.byte_model import save_byte_model
from tests.classifiers import LABELS, labelled_corpus
from tests.small_models import MODELS, VOCABULARY
from tests.unit.data.corpora import data_section, write_corpus

LINES: list[Any] = [
    {"text": "fine", "label": "good"},
    {"text": "", "label": "good"},
    {"text": "no", "label": "bad"},
    {"text": "hm", "label": "none"},
    {"text": "hm"},
    {"text": "one", "label": 1},
    {"label": "bad"},
    {"text": "yes", "label": True},
]
READ: dict[str, Any] = {
    "objective": {"classes": list(LABELS)},
    "samples": "packed",
    "reset_attention": True,
}


def write_lines(path: Path) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(path)


def test_each_text_gets_the_number_of_its_label(tmp_path: Path) -> None:
    folder = save_byte_model(tmp_path / "tokenizer")
    lines = write_lines(tmp_path / "lines.jsonl")
    classes = ["bad", "good", "1"]
    counts = preprocess(
        [lines], folder, tmp_path / "out", append_eod=True, label_key="label", classes=classes
    )
    assert (counts.documents, counts.empty, counts.bad) == (3, 1, 4)
    reasons = [line.partition("jsonl:")[2] for line in counts.named]
    assert reasons == [
        "4: \"label\": 'none': must be one of --classes",
        '5: "label": must be a string or an integer, a label',
        '7: has no key "text"',
        '8: "label": must be a string or an integer, a label',
    ]
    tokens, labels = (IndexedCorpus(p) for p in (tmp_path / "out", labels_prefix(tmp_path / "out")))
    assert [*labels.tokens] == [1] * 5 + [0] * 3 + [2] * 4
    assert labels.dtype == np.uint8 and np.array_equal(labels.sizes, tokens.sizes)
    assert json.loads(names_file(tmp_path / "out").read_text()) == {"classes": classes}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"classes": []}, "--label-key: needs --classes"),
        ({"label_key": None}, "--label-key: needs --classes"),
        ({"classes": ["a", "a"]}, "--classes: a a: must be 2 to 256 different names"),
        ({"classes": ["a"]}, "--classes: a: must be 2 to 256 different names"),
        ({"chat": True}, "--label-key: not with --chat"),
        ({"kind": "txt"}, "must be lines of JSON for --label-key"),
    ],
)
def test_a_mistake_in_preprocessing_is_one_line(
    change: dict[str, Any], line: str, tmp_path: Path
) -> None:
    folder = save_byte_model(tmp_path / "tokenizer")
    keys: dict[str, Any] = {"label_key": "label", "classes": ["a", "b"]} | change
    with pytest.raises((ConfigError, DataError)) as raised:
        preprocess([write_lines(tmp_path / "lines.jsonl")], folder, tmp_path / "out", **keys)
    assert line in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"samples": "windows"}, 'samples: "windows": must be "packed" or "padded"'),
        (
            {"samples": "padded", "reset_attention": False},
            "reset_attention: false: must be true with",
        ),
        ({"loss": "marked"}, 'megalite.data.loss: "marked": must be "all" with'),
        ({"objective": {"classes": ["a", "a"]}}, "must name each label once"),
        ({"objective": {"classes": ["a"]}}, 'classes: ["a"]: must have at least 2'),
        ({"objective": {"classes": ["a", "b"], "masked": 0.1}}, "objective.masked: unknown key"),
    ],
)
def test_a_mistake_in_the_objective_is_one_line(data: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_dict(document(data)).resolve(1)
    assert line in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("section", "keys", "line"),
    [
        ("parallel", {"context": 2}, "parallel.context: 2: must be 1 with"),
        ("train", {"z_loss": 0.1}, "train.z_loss: 0.1: must be 0 with"),
    ],
)
def test_settings_without_effect_on_a_classifier_are_refused(
    section: str, keys: dict[str, Any], line: str
) -> None:
    made = document({})
    made["megalite"][section] = made["megalite"].get(section, {}) | keys
    with pytest.raises(ConfigError) as raised:
        Config.from_dict(made).resolve(2)
    assert line in str(raised.value)


def document(data: dict[str, Any], **model: Any) -> dict[str, Any]:
    read = {"sequence_length": 12, "train": ["corpus"]} | READ | data
    return {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "megalite": {
            "model": MODELS["bert"] | model,
            "data": read,
            "train": {"steps": 1, "run_dir": "run"},
        },
    }


def test_a_classifier_is_not_trained_on_tokens() -> None:
    names = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    made = document({"objective": {"masked": 0.1, "mask_token_id": 3}}, **names)
    config = Config.from_dict(made).resolve(1)
    with pytest.raises(ConfigError, match='must have the labels of the model, a classifier: {"cl'):
        check_model(config, read_spec(config.model))


def test_problems_other_than_single_label_are_refused() -> None:
    names = {"architectures": ["BertForSequenceClassification"]}
    for change, rule in (
        ({"problem_type": "regression"}, "problem_type: 'regression': must be None or"),
        ({"id2label": {"0": "a"}}, "id2label: {0: 'a'}: must have 2 to 256 labels, each once"),
    ):
        with pytest.raises(ConfigError, match=rule):
            read_spec(MODELS["bert"] | names | change)


def test_a_corpus_of_other_labels_or_of_none_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    labelled_corpus(prefix, texts=9, mean=5)
    data = data_section([prefix], 12, **READ)
    check_data(data, VOCABULARY)
    other = data_section([prefix], 12, **READ | {"objective": {"classes": ["good", "bad"]}})
    with pytest.raises(ConfigError, match=r'classes: \["good", "bad"\]: must be \["bad", "so so"'):
        TrainData(other, 1, VOCABULARY)
    write_corpus(tmp_path / "plain", 5, vocabulary=VOCABULARY)
    with pytest.raises(DataError, match="plain.label.json: missing: .* --label-key"):
        TrainData(data_section([tmp_path / "plain"], 12, **READ), 1, VOCABULARY)
