"""`megalite.load` and `megalite.train`, and `megalite chat`: equal to transformers, on a tiny model of bytes."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import megalite
from megalite.commands import chat
from megalite.errors import ConfigError, UserError
from megalite.hub.import_hf import import_hf
from tests.byte_model import save_byte_model
from tests.launch.starts import write_config

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("api") / "hf")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a chat template."""
    made = save_byte_model(tmp_path_factory.mktemp("chat") / "hf")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    return made


def reference(folder: Path, text: str, new: int) -> str:
    """What transformers generates, greedily."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(
        text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = model.generate(**ids, max_new_tokens=new, do_sample=False, pad_token_id=0)[0]
    return tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_and_loss_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "checkpoint")
    prompt = "ab\ncd"
    pieces: list[str] = []
    for path in (folder, tmp_path / "checkpoint"):
        model = megalite.load(path)
        text = model.generate(prompt, max_new_tokens=9, on_text=pieces.append)
        assert text == reference(folder, prompt, 9) == "".join(pieces)
        pieces.clear()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder)(ids, labels=ids).loss.item()
        assert model.loss(prompt) == pytest.approx(theirs, rel=1e-5)
        assert model.loss(ids[0].tolist()) == model.loss(prompt)


def test_samples_are_the_same_each_time_and_differ_by_seed(folder: Path) -> None:
    model = megalite.load(folder)
    texts = [model.generate("abc", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_chat_is_the_template_and_generation(chatty: Path) -> None:
    model = megalite.load(chatty)
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    rendered = "system: s\nuser: u\nassistant: a\nuser: v\nassistant: "
    assert model.chat(messages, max_new_tokens=6) == reference(chatty, rendered, 6)
    assert model.chat("u", max_new_tokens=6) == reference(chatty, "user: u\nassistant: ", 6)


def test_mistakes_are_told(folder: Path, tmp_path: Path) -> None:
    model = megalite.load(folder)
    for call, words in (
        (lambda: model.chat("hello"), "has no chat template"),
        (lambda: model.loss("a"), "must have at least 2"),
        (lambda: model.loss([5] * 1000), "max_position_embeddings"),
        (lambda: model.generate("a", 10_000), "--max-new-tokens: 10000"),
        (lambda: model.generate("a", min_p=2.0, temperature=1.0), "--min-p: 2.0"),
        (lambda: megalite.load(tmp_path / "none"), "does not exist"),
        (lambda: megalite.train({"megalite": {}}), "megalite.model: missing"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_chat_reads_lines_and_keeps_the_history(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n/quit\nfour\n"))
    words = [str(chatty), "--system", "s", "--temperature", "0", "--max-new-tokens", "5"]
    assert chat.main(words) == 0
    first = reference(chatty, "system: s\nuser: one\nassistant: ", 5)
    second = reference(
        chatty, f"system: s\nuser: one\nassistant: {first}\nuser: two\nassistant: ", 5
    )
    third = reference(chatty, "system: s\nuser: three\nassistant: ", 5)
    assert capsys.readouterr().out == f"{first}\n{second}\n{third}\n"


def test_chat_answers_a_conversation_in_a_file(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"role": "user", "content": "a\nb"}]))
    words = ["--temperature", "0", "--max-new-tokens", "5", "--messages", str(file)]
    assert chat.main([str(chatty), *words]) == 0
    assert capsys.readouterr().out == reference(chatty, "user: a\nb\nassistant: ", 5) + "\n"
    for text, line in (
        ("[]", r"messages: \[\]: must be a list of messages"),
        ('[{"role": "user"}]', "messages.0.content: missing: must be text"),
        ("[1]", "messages.0: 1: must be an object"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": 3}',
            "tools: 3: must be a list",
        ),
        ("{}", "messages: missing: must be a list of messages"),
        ("x", "is not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=line):
            chat.main([str(chatty), *words])


def test_chat_gives_tools_to_the_template(chatty: Path, tmp_path: Path) -> None:
    model = megalite.load(chatty)
    model.tokenizer.inner.chat_template = "{{ tools | tojson }}" + TEMPLATE  # type: ignore[attr-defined]
    asked, tools = [{"role": "user", "content": "a"}], [{"name": "f"}]
    answer = model.chat(asked, max_new_tokens=5, tools=tools)
    assert answer == reference(chatty, '[{"name": "f"}]user: a\nassistant: ', 5)


GREEDY = ["--temperature", "0", "--max-new-tokens", "5"]


def test_chat_answers_one_prompt_with_newlines(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = reference(chatty, "system: s\nuser: a\nb\nassistant: ", 5) + "\n"
    words = [str(chatty), "--system", "s", *GREEDY]
    assert chat.main([*words, "--prompt", "a\nb"]) == 0
    assert capsys.readouterr().out == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb"))
    assert chat.main([*words, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO('"""\na\nb\n"""\n'))
    assert chat.main(words) == 0
    assert capsys.readouterr().out == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(ConfigError, match="--prompt: must not be empty"):
        chat.main([*words, "--prompt", "-"])


def test_chat_samples_several_answers(chatty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(chatty), "--prompt", "a", "--max-new-tokens", "8", "--temperature", "1"]
    assert chat.main([*words, "--seed", "7", "--samples", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2]
    model = megalite.load(chatty)
    wanted = [model.chat("a", 8, temperature=1.0, seed=7 + i) for i in range(3)]
    assert [row["text"] for row in rows] == wanted and len(set(wanted)) > 1
    for words, line in (
        (["--samples", "2"], "--samples: 2: needs --prompt or --messages"),
        (["--samples", "2", "--prompt", "a", "--temperature", "0"], "needs --temperature above 0"),
    ):
        with pytest.raises(ConfigError, match=line):
            chat.main([str(chatty), *words])


class Terminal(io.StringIO):
    """Standard input that somebody types."""

    def isatty(self) -> bool:
        return True


def test_a_message_that_is_too_long_does_not_end_a_conversation(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = f"a\n{'b' * 100}\nc\n"
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    assert chat.main([str(chatty), *GREEDY]) == 0
    first = reference(chatty, "user: a\nassistant: ", 5)
    last = reference(chatty, f"user: a\nassistant: {first}\nuser: c\nassistant: ", 5)
    told = capsys.readouterr()
    assert told.out == f"> {first}\n> > {last}\n> "
    line = r"the conversation has 1\d\d tokens and the model takes 64"
    assert re.fullmatch(f"{line}: /reset starts a new one\n", told.err)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with pytest.raises(ConfigError, match=line):
        chat.main([str(chatty), *GREEDY])


def test_an_answer_takes_the_room_that_is_left(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model takes 64 tokens, fewer than the default of new ones."""
    room = 64 - len("user: a\nassistant: ")
    wanted = reference(chatty, "user: a\nassistant: ", room)
    assert chat.main([str(chatty), "--temperature", "0", "--prompt", "a"]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    assert chat.main([str(chatty), "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"


def test_input_that_is_not_utf_8_is_one_line(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, line in (
        ([], "standard input: is not UTF-8 .byte 1."),
        (["--prompt", "-"], "--prompt: -: is not UTF-8 .byte 1."),
        (["--messages", "-"], "--messages: -: is not UTF-8 .byte 1."),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), "utf-8"))
        with pytest.raises(ConfigError, match=line):
            chat.main([str(chatty), *GREEDY, *words])


def test_two_system_messages_are_refused(chatty: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    system, user = ({"role": role, "content": "a"} for role in ("system", "user"))
    file.write_text(json.dumps([system, user]))
    with pytest.raises(ConfigError, match="--system: .*talk.json begins with a system message"):
        chat.main([str(chatty), *GREEDY, "--system", "s", "--messages", str(file)])


def test_train_returns_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    run = megalite.train(path, ["megalite.train.steps=2", "megalite.train.limits.step_seconds=60"])
    assert run == tmp_path / "run" and (run / "checkpoints/step_00000002").is_dir()
    assert "step 2/2" in capsys.readouterr().out
    assert megalite.load(run).loss([1, 2, 3, 4, 5]) > 0
    # A dict as well as a file; a run at its last step ends at once.
    again = megalite.train(json.loads(path.read_text()), ["megalite.train.steps=2"])
    assert again == run and "already at step 2 of 2" in capsys.readouterr().out
