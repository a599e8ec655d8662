"""Fine-tuning data: conversations and completions become marked tokens, whole documents become samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megalite.commands.preprocess import main
from megalite.config import load_config
from megalite.data.chat_encoder import ChatEncoder
from megalite.data.chat_forms import NotChat, sample_of
from megalite.data.indexed import IndexedCorpus
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import TrainData, ValidData, check_data, marks_prefix
from megalite.data.packing import best_fit
from megalite.data.preprocessing import preprocess
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
    """The text of each run of marked tokens."""
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


def test_an_answer_rendered_differently_when_last_is_a_separate_document(
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
    # The space is tokenized with the answer.
    ((ids, marks),) = encoder.encode({"prompt": "Label: ", "completion": "class"})
    assert counted(tokenizer, ids, marks)[0].strip() == "class</s>"
    tokenizer.inner.chat_template = PLAIN
    ((ids, marks),) = ChatEncoder(tokenizer, "folder").encode(
        {"prompt": TALK[:4], "completion": TALK[4:]}
    )
    assert counted(tokenizer, ids, marks) == ["return</s>"]


TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}},
]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"def": 2}}}
WITH_TOOLS = (
    "{% for t in tools or [] %}[tool] {{ t | tojson }}\n{% endfor %}{% for m in messages %}[{{ m.role }}]\n"
    "{% if m.role == 'assistant' %}BEGIN{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}{{ eos_token }}END"
    "{% else %}{{ m.name }}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
UNMARKED = WITH_TOOLS.replace("BEGIN", "").replace("END", "")
MARKED = WITH_TOOLS.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SEARCH = [
    message("user", "self"),
    message("assistant", "", tool_calls=[CALL]),
    message("tool", "def f", name="find"),
    message("assistant", "return 2"),
]
FORMS: list[tuple[str, dict[str, Any], list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    ("messages", {"messages": TALK, "tools": [], "prompt": "unused"}, TALK, None),
    (
        "ShareGPT",
        {"conversations": [{"from": "system", "value": "import"}, {"from": "human", "value": "def"},
                           {"from": "gpt", "value": "class"}, {"from": "human", "value": "self"},
                           {"from": "gpt", "value": "return"}]},
        [message("system", "import"), message("user", "def"), message("assistant", "class"),
         message("user", "self"), message("assistant", "return")],
        None,
    ),
    (
        "ShareGPT",
        {"conversations": [{"from": "human", "value": "self"},
                           {"from": "function_call", "value": '{"name": "find", "arguments": {"def": 2}}'},
                           {"from": "observation", "value": "def f"}, {"from": "gpt", "value": "return 2"}],
         "system": "import", "tools": json.dumps(TOOLS)},
        [message("system", "import"), *SEARCH],
        TOOLS,
    ),
    (
        "Alpaca",
        {"instruction": "import", "input": "self", "output": "return", "messages": None},
        [message("user", "import\nself"), message("assistant", "return")],
        None,
    ),
    (
        "Alpaca",
        {"instruction": "import", "input": "", "output": "return", "system": "class", "history": []},
        [message("system", "class"), message("user", "import"), message("assistant", "return")],
        None,
    ),
    ("messages with tools", {"messages": SEARCH, "tools": TOOLS}, SEARCH, TOOLS),
    (
        "messages with tools",
        {"messages": [message("user", "self", name=None, tool_calls=[]),
                      {"role": "assistant", "content": None,
                       "tool_calls": [{"name": "find", "arguments": '{"def": 2}'}]}, *SEARCH[2:]],
         "tools": json.dumps(TOOLS)},
        SEARCH,
        TOOLS,
    ),
    (
        "prompt and completion",
        {"prompt": SEARCH[:1], "completion": SEARCH[1:], "tools": TOOLS},
        SEARCH,
        TOOLS,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("form", "line", "messages", "tools"), FORMS)
@pytest.mark.parametrize("template", [UNMARKED, MARKED])
def test_each_form_gives_the_tokens_and_marks_of_transformers(
    tokenizer: HuggingFaceTokenizer,
    template: str,
    form: str,
    line: dict[str, Any],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> None:
    inner = tokenizer.inner
    inner.chat_template = template
    ((ids, marks),) = ChatEncoder(tokenizer, "folder").encode(line)
    assert sample_of(line).form == form
    theirs = inner.apply_chat_template(
        messages,
        tools=tools,
        chat_template=MARKED,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"split_special_tokens": False},
    )
    assert ids == theirs["input_ids"] and marks == theirs["assistant_masks"]
    assert 0 < sum(marks) < len(marks)


def test_a_template_for_tools_is_used_for_lines_with_tools(
    tokenizer: HuggingFaceTokenizer,
) -> None:
    tokenizer.inner.chat_template = {"default": PLAIN, "tool_use": UNMARKED}
    encoder = ChatEncoder(tokenizer, "folder")
    ((with_tools, _),) = encoder.encode({"messages": SEARCH, "tools": TOOLS})
    ((without, _),) = encoder.encode({"messages": TALK})
    assert "[tool]" in tokenizer.decode(with_tools) and "[tool]" not in tokenizer.decode(without)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            {"text": "a", "messages": None},
            'must have "messages", "conversations", "prompt" and "completion", or "instruction" and "output": has '
            '["text"]',
        ),
        ({"messages": []}, "messages: []: must be a list of messages"),
        ({"messages": [3]}, "messages.0: 3: must be an object"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: missing: must be a string"),
        ({"messages": [{"content": "a"}]}, "messages.0.role: missing: must be a string"),
        ({"messages": TALK[:2]}, "messages: must contain an assistant message"),
        (
            {"messages": TALK[2:]},
            "messages.0: must not be an assistant message: no message comes before it",
        ),
        ({"prompt": "a", "completion": 3}, 'prompt: "a": must be a list of messages'),
        (
            {"prompt": TALK[:2], "completion": TALK[:2]},
            "completion: must contain an assistant message",
        ),
        ({"conversations": "a"}, 'conversations: "a": must be a list of messages'),
        ({"conversations": ["a"]}, 'conversations.0: "a": must be an object'),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            'conversations.0.from: "narrator": must be one of system, human, user, gpt, assistant, function_call, '
            "tool, observation",
        ),
        (
            {"conversations": [{"from": "human"}]},
            "conversations.0.value: missing: must be a string",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "find"}]},
            'conversations.0.value: "find": must be JSON',
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}], "system": 3},
            "system: 3: must be a string",
        ),
        ({"instruction": "a", "output": 3}, "output: 3: must be a string"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            'history: [["c", "d"]]: must be empty: use "messages" for several turns',
        ),
        (
            {"messages": TALK, "tools": "find"},
            'tools: "find": must be JSON',
        ),
        (
            {"messages": TALK, "tools": [3]},
            "tools: [3]: must be a list of objects, or the JSON of one as a string",
        ),
        (
            {"messages": TALK, "tools": TOOLS},
            "tools: must be left out: the chat template does not use them",
        ),
        (
            {"messages": SEARCH},
            "messages.1.tool_calls: must be left out: the chat template does not render them",
        ),
        (
            {"messages": [message("user", "a", tool_calls=[CALL])]},
            "messages.0.tool_calls: "
            '[{"type": "function", "function": {"name": "find", "arguments": {"def": 2}}}]: '
            "must be in an assistant message",
        ),
        (
            {"messages": [message("assistant", "", tool_calls={"name": "a"})]},
            'messages.0.tool_calls: {"name": "a"}: must be a list of calls',
        ),
        (
            {"messages": [message("assistant", "", tool_calls=[{"type": "function"}])]},
            'messages.0.tool_calls.0: {"type": "function"}: must be an object with the name and arguments of a '
            "function",
        ),
        (
            {"messages": [message("assistant", "", tool_calls=[{"name": "a", "arguments": "3"}])]},
            "messages.0.tool_calls.0.arguments: 3: must be an object, or the JSON of one as a string",
        ),
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
    with pytest.raises(DataError, match="^folder: the tokenizer has no chat template: "):
        ChatEncoder(tokenizer, "folder").encode({"messages": TALK})


def test_generation_that_holds_no_answer_is_refused(tokenizer: HuggingFaceTokenizer) -> None:
    tokenizer.inner.chat_template = PLAIN + "{% generation %}{% endgeneration %}"
    with pytest.raises(NotChat, match="contains no tokens of these messages"):
        ChatEncoder(tokenizer, "folder").encode({"messages": TALK})


def test_the_report_counts_forms_and_bad_lines(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = AutoTokenizer.from_pretrained(tokenizers["bpe"])
    inner.chat_template = UNMARKED
    inner.save_pretrained(tmp_path / "tokenizer")
    lines, output = tmp_path / "lines.jsonl", tmp_path / "talks"
    words = ["--chat", "--input", str(lines), "--tokenizer", str(tmp_path / "tokenizer"),
             "--output", str(output)]  # fmt: skip
    good = [line for _, line, _, _ in FORMS]
    bad = [{"messages": 1}, {"instruction": "a", "output": None}]
    lines.write_text("".join(json.dumps(line) + "\n" for line in [bad[0], *good, bad[1]]))
    assert main(words) == 0
    told = capsys.readouterr()
    assert told.out.endswith(
        "0 empty documents left out, 2 bad lines; 1 samples as messages, 2 samples as ShareGPT, 2 samples as Alpaca, "
        "2 samples as messages with tools, 1 samples as prompt and completion\n"
    )
    assert told.err.splitlines() == [
        f"bad line: {lines}:1: messages: 1: must be a list of messages",
        f'bad line: {lines}:10: must have "messages", "conversations", "prompt" and "completion", or "instruction" and '
        '"output": has ["instruction"]',
    ]
    lines.write_text("".join(json.dumps(line) + "\n" for line in bad))
    with pytest.raises(DataError) as raised:  # each is one line on standard error
        main([*words, "--overwrite"])
    assert raised.value.lines == (
        f"{output}: nothing to write: no document in the inputs, 2 bad lines",
        f"bad line: {lines}:1: messages: 1: must be a list of messages",
        told.err.splitlines()[1].replace(":10:", ":2:"),
    )


@pytest.fixture(scope="module")
def chats(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of conversations and completions, with marks."""
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
        "messages: 1: must be a list of messages"
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
        cut = (
            f"{longer} of 60 documents are truncated to megalite.data.sequence_length 64 + 1 tokens"
        )
        assert longer > 0 and train.notes == [f"data: {chats}: {cut}"]


def test_windows_can_be_marked_too(chats: Path) -> None:
    section = data_section([chats], 32, valid=[str(chats)], loss="marked")
    batch = ValidData(section, 500).batch(range(20))
    marks = IndexedCorpus(marks_prefix(str(chats))).tokens[1 : 20 * 32 + 1].reshape(20, 32)
    assert ((batch.labels != -100) == (marks == 1)).all() and 0 < marks.mean() < 1


def test_marks_are_never_silently_ignored(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match='megalite.data.loss: missing: .*chats.mask.idx exists: set "marked"'
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
        DataError, match="a.mask.bin: has 99 entries of uint8: must have a byte for each of the 100"
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
