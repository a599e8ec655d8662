"""Fine-tuning data: conversations and completions to marked tokens, and whole documents to samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megalite.config import load_config
from megalite.data.chat import ChatEncoder, NotChat
from megalite.data.indexed import IndexedCorpus, IndexedWriter
from megalite.data.loader import TrainData, ValidData, check_data, marks_prefix
from megalite.data.packing import best_fit
from megalite.data.preprocess import preprocess
from megalite.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megalite.errors import ConfigError, DataError
from tests.unit.data.corpora import data_section

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
GENERATION = PLAIN.replace("{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}")  # fmt: skip
LAST_DIFFERS = PLAIN.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<last>{% endif %}{{ m.content }}",
)
TALK = [
    {"role": "system", "content": "Answer with import."},
    {"role": "user", "content": "what is def?"},
    {"role": "assistant", "content": "a  function:\n  def f"},
    {"role": "user", "content": "self"},
    {"role": "assistant", "content": "return"},
]


@pytest.fixture(params=["bpe", "unigram"])
def tokenizer(tokenizers: dict[str, Path], request: pytest.FixtureRequest) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(tokenizers[request.param]))


def counted(tokenizer: HuggingFaceTokenizer, ids: list[int], marks: list[int]) -> list[str]:
    """The texts of the runs of marked tokens."""
    runs: list[list[int]] = []
    for place, (token, mark) in enumerate(zip(ids, marks, strict=True)):
        if mark:
            if place == 0 or not marks[place - 1]:
                runs.append([])
            runs[-1].append(token)
    return [
        tokenizer.decode([0, *run], skip_special_tokens=False).removeprefix("<unk>") for run in runs
    ]


@pytest.mark.parametrize("template", [PLAIN, GENERATION])
def test_the_assistants_tokens_count_and_no_others(
    tokenizer: HuggingFaceTokenizer, template: str
) -> None:
    tokenizer.inner.chat_template = template
    ((ids, marks),) = ChatEncoder(tokenizer, "folder").encode({"messages": TALK})
    whole = tokenizer.inner.apply_chat_template(
        TALK, tokenizer_kwargs={"split_special_tokens": False}
    )
    assert ids == whole["input_ids"]
    assert counted(tokenizer, ids, marks) == ["a  function:\n  def f</s>", "return</s>"]


def test_an_answer_that_is_written_otherwise_when_it_is_last_is_a_document_of_its_own(
    tokenizer: HuggingFaceTokenizer,
) -> None:
    tokenizer.inner.chat_template = LAST_DIFFERS
    documents = ChatEncoder(tokenizer, "folder").encode({"messages": TALK})
    texts = [counted(tokenizer, *document) for document in documents]
    assert texts == [["<last>a  function:\n  def f</s>"], ["<last>return</s>"]]


def test_a_completion_counts_with_its_end(tokenizer: HuggingFaceTokenizer) -> None:
    encoder = ChatEncoder(tokenizer, "folder")
    ((ids, marks),) = encoder.encode({"prompt": "import os\nLabel:", "completion": " class"})
    assert ids == [*tokenizer.encode("import os\nLabel: class"), 2]
    assert counted(tokenizer, ids, marks)[0].strip() == "class</s>"
    assert sum(marks) == len(ids) - len(tokenizer.encode("import os\nLabel:"))
    ((ids, marks),) = encoder.encode(
        {"prompt": "Label: ", "completion": "class"}
    )  # the space goes with the answer
    assert counted(tokenizer, ids, marks)[0].strip() == "class</s>"
    tokenizer.inner.chat_template = PLAIN
    ((ids, marks),) = ChatEncoder(tokenizer, "folder").encode(
        {"prompt": TALK[:4], "completion": TALK[4:]}
    )
    assert counted(tokenizer, ids, marks) == ["return</s>"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": "a"}, 'has neither "messages" nor "prompt" and "completion"'),
        ({"messages": []}, '"messages" is no list of messages'),
        ({"messages": [{"role": "user"}]}, '"messages": message 0 has no text as its content'),
        ({"messages": [{"content": "a"}]}, '"messages": message 0 has no role'),
        ({"messages": TALK[:2]}, "holds no message of the assistant"),
        ({"prompt": "a", "completion": 3}, '"prompt" is no list of messages'),
    ],
)
def test_a_line_of_another_form_is_refused(
    tokenizers: dict[str, Path], line: dict[str, Any], reason: str
) -> None:
    tokenizer = HuggingFaceTokenizer(AutoTokenizer.from_pretrained(tokenizers["bpe"]))
    tokenizer.inner.chat_template = PLAIN
    with pytest.raises(NotChat) as raised:
        ChatEncoder(tokenizer, "folder").encode(line)
    assert str(raised.value) == reason
    tokenizer.inner.chat_template = None
    with pytest.raises(NotChat, match="needs a chat template"):
        ChatEncoder(tokenizer, "folder").encode({"messages": TALK})


@pytest.fixture(scope="module")
def chats(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of conversations and completions with its marks."""
    folder = tmp_path_factory.mktemp("chats")
    inner = AutoTokenizer.from_pretrained(tokenizers["bpe"])
    inner.chat_template = PLAIN
    inner.save_pretrained(folder / "tokenizer")
    talks = [{"messages": TALK[: 3 + 2 * (i % 2)]} for i in range(30)]
    completions = [{"prompt": "def " * (i % 7), "completion": "x" * (1 + i)} for i in range(30)]
    lines = talks + completions
    bad = '{"messages": 1}\n'
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + bad)
    inputs, output = [str(folder / "chats.jsonl")], folder / "chats"
    counts = preprocess(inputs, folder / "tokenizer", output, chat=True, workers=2)
    assert (counts.documents, counts.bad) == (60, 1) and counts.named[0].endswith(
        '"messages" is no list of messages'
    )
    return output


def test_marks_lie_beside_the_tokens(chats: Path) -> None:
    tokenizer = load_tokenizer(chats.parent / "tokenizer")
    corpus, marks = IndexedCorpus(chats), IndexedCorpus(marks_prefix(str(chats)))
    for opened in (corpus, marks):
        opened.check_index()
    assert marks.num_tokens == corpus.num_tokens and (marks.sizes == corpus.sizes).all()
    encoder = ChatEncoder(tokenizer, "folder")
    lines = (chats.parent / "chats.jsonl").read_text().splitlines()[:60]
    for number, line in enumerate(lines):
        assert encoder.encode(json.loads(line)) == [
            (corpus.document(number).tolist(), marks.document(number).tolist())
        ]


def answers(
    data: ValidData | TrainData, positions: range
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each document of some samples: its tokens and its labels."""
    batch = data.batch(positions)
    assert batch.documents is not None
    found = []
    for tokens, labels, documents in zip(batch.tokens, batch.labels, batch.documents, strict=True):
        for number in range(documents[-1] + 1):
            here = documents == number
            found.append((tuple(tokens[here].tolist()), tuple(labels[here].tolist())))
    return found


def test_packed_documents_are_those_of_padded_ones(chats: Path) -> None:
    corpus, marks = IndexedCorpus(chats), IndexedCorpus(marks_prefix(str(chats)))
    length = 64
    expected = []
    for i in range(60):
        ids, counts = corpus.document(i)[: length + 1].astype(int), marks.document(i)[: length + 1]
        expected.append(
            (tuple(ids[:-1].tolist()), tuple(np.where(counts[1:], ids[1:], -100).tolist()))
        )
    found = {}
    for samples in ("packed", "padded"):
        section = data_section(
            [chats],
            length,
            valid=[str(chats)],
            samples=samples,
            loss="marked",
            reset_attention=True,
        )
        check_data(section, 500)
        valid = ValidData(section, 500)
        parts = answers(valid, range(valid.num_samples))
        filling = [part for part in parts if set(part[1]) == {-100} and set(part[0]) <= {0}]
        found[samples] = sorted(part for part in parts if part not in filling)
        assert found[samples] == sorted(expected)
        train = TrainData(section, 1, 500)
        assert sorted(answers(train, range(valid.num_samples))) == sorted(parts)
        assert answers(train, range(valid.num_samples)) != answers(
            train, range(valid.num_samples, 2 * valid.num_samples)
        )
        assert valid.num_samples == 60 if samples == "padded" else valid.num_samples < 55
        longer = sum(len(corpus.document(i)) > length + 1 for i in range(60))
        cut = f"{longer} of 60 documents are cut to megalite.data.sequence_length 64 + 1 tokens"
        assert longer > 0 and train.notes == [f"data: {chats}: {cut}"]


def test_windows_can_be_marked_too(chats: Path) -> None:
    section = data_section([chats], 32, valid=[str(chats)], loss="marked")
    batch = ValidData(section, 500).batch(range(20))
    marks = IndexedCorpus(marks_prefix(str(chats))).tokens[1 : 20 * 32 + 1].reshape(20, 32)
    assert ((batch.labels != -100) == (marks == 1)).all() and 0 < marks.mean() < 1


def test_marks_are_never_passed_over_in_silence(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match='megalite.data.loss: missing: .*chats.mask.idx exists: say "marked"'
    ):
        TrainData(data_section([chats], 32), 1, 500)
    TrainData(data_section([chats], 32, loss="all"), 1, 500)
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(range(100))
    with pytest.raises(DataError, match="a.mask.idx: cannot be read"):
        TrainData(data_section([tmp_path / "a"], 32, loss="marked"), 1, 500)
    with IndexedWriter(tmp_path / "a.mask", np.uint8) as writer:
        writer.add_document([1] * 99)
    with pytest.raises(
        DataError, match="a.mask.bin: holds 99 tokens of uint8: must mark each of the 100"
    ):
        TrainData(data_section([tmp_path / "a"], 32, loss="marked"), 1, 500)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            ["samples=packed"],
            'megalite.data.samples: "packed": needs megalite.data.reset_attention true',
        ),
        (
            ["samples=padded", "order=megatron"],
            'megalite.data.samples: "padded": must be "windows" with',
        ),
        (["loss=answers"], "megalite.data.loss: \"answers\": must be 'all' or 'marked'"),
    ],
)
def test_a_mistake_in_the_section_is_one_line(keys: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("ds_configs/tiny_cpu.json", [f"megalite.data.{key}" for key in keys]).resolve(8)
    assert line in str(raised.value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_is_the_plain_rule(sizes: list[int]) -> None:
    rooms: list[int] = []
    expected: dict[int, int] = {}
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        fitting = [room for room in rooms if room >= sizes[place]]
        room = min(fitting) if fitting else 50
        if fitting:
            rooms.remove(room)
        rooms.append(room - sizes[place])
        expected[place] = room
    found = best_fit(np.array(sizes), 50)
    used = np.bincount(found, weights=sizes)
    assert (
        len(used) == len(rooms)
        and used.max() <= 50
        and sorted((50 - used).tolist()) == sorted(rooms)
    )
