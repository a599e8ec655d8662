"""WordPiece tokenizers: training, reading by transformers and by megalite, and corpora with [CLS] and [SEP]."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, BertTokenizerFast

from megalite.data.indexed import IndexedCorpus
from megalite.data.loader import UNCOUNTED, TrainData
from megalite.data.preprocessing import preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.data.wordpiece import SPECIAL, train_wordpiece
from megalite.errors import ConfigError, DataError
from tests.unit.data.corpora import data_section

SIZE = 400


@pytest.fixture(scope="module")
def folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece") / "tokenizer"
    train_wordpiece([str(text_file)], SIZE, folder, lowercase=True)
    return folder


def test_transformers_reads_what_was_trained(folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert theirs.convert_tokens_to_ids(list(SPECIAL.values())) == [0, 1, 2, 3, 4]
    assert (ours.vocabulary_size, ours.mask_id, ours.cls_id, ours.sep_id) == (SIZE, 4, 2, 3)
    assert ours.special_ids == {0, 1, 2, 3, 4} and ours.eod_id is None
    assert theirs("Def forward")["input_ids"] == [2, *ours.encode("def Forward"), 3]
    assert theirs.decode(ours.encode("return the shape")) == "return the shape"


def test_an_existing_bert_tokenizer_is_read(folder: Path, tmp_path: Path) -> None:
    """In the older form: only vocab.txt and a config."""
    vocabulary = load_tokenizer(folder).inner.get_vocab()  # type: ignore[attr-defined]
    (tmp_path / "vocab.txt").write_text(
        "\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer"})
    )
    old = load_tokenizer(tmp_path)
    assert isinstance(old.inner, BertTokenizerFast)  # type: ignore[attr-defined]
    assert (old.mask_id, old.cls_id, old.sep_id) == (4, 2, 3)
    assert old.encode("def forward(self)") == load_tokenizer(folder).encode("def forward(self)")


def test_documents_start_with_cls_and_end_with_sep_which_are_never_masked(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    counts = preprocess([str(text_file)], folder, tmp_path / "corpus", cls_sep=True)
    corpus = IndexedCorpus(str(tmp_path / "corpus"))
    for document in range(counts.documents):
        ids = corpus.read(corpus.document_start(document), corpus.document_start(document + 1))
        assert ids[0] == 2 and ids[-1] == 3 and not np.isin(ids[1:-1], [2, 3]).any()
    keys = {
        "tokenizer": str(folder),
        "samples": "packed",
        "reset_attention": True,
        "objective": {"masked": 0.15},
    }
    batch = TrainData(data_section([tmp_path / "corpus"], 64, **keys), 1, SIZE).batch(range(50))
    asked = batch.labels != UNCOUNTED
    assert (batch.tokens[asked] == 4).mean() > 0.7 and not np.isin(
        batch.labels[asked], [0, 1, 2, 3, 4]
    ).any()
    assert (batch.tokens[:, 0] == 2).all()


def test_mistakes_are_one_line(
    folder: Path, text_file: Path, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="already exists; choose a new folder"):
        train_wordpiece([str(text_file)], SIZE, folder)
    with pytest.raises(DataError, match="--vocab-size: 90000: must be at most"):
        train_wordpiece([str(text_file)], 90_000, tmp_path / "new")
    with pytest.raises(DataError, match="has no .CLS. and .SEP. tokens, which --cls-sep needs"):
        preprocess([str(text_file)], tokenizers["bpe"], tmp_path / "corpus", cls_sep=True)
    with pytest.raises(ConfigError, match="--append-eod: not with --cls-sep"):
        preprocess([str(text_file)], folder, tmp_path / "corpus", cls_sep=True, append_eod=True)
