"""`megalite chat`: its answers equal those of transformers, on a tiny byte-level model."""

import io
import json
import re
from pathlib import Path

import pytest

import megalite
from megalite.commands import chat
from megalite.errors import ConfigError
from tests.byte_model import reference, save_chatty_model


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chatty_model(tmp_path_factory.mktemp("chat") / "hf")


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
        ('[{"role": "user"}]', "messages.0.content: missing: must be a string"),
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
    """Standard input that is a terminal."""

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
    line = r"the conversation has 1\d\d tokens and the model takes at most 64"
    assert re.fullmatch(f"{line}: /reset starts a new one\n", told.err)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with pytest.raises(ConfigError, match=line):
        chat.main([str(chatty), *GREEDY])


def test_an_answer_is_limited_to_the_remaining_length(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model takes 64 tokens, fewer than the default number of new tokens."""
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
    with pytest.raises(
        ConfigError, match="--system: .*talk.json already begins with a system message"
    ):
        chat.main([str(chatty), *GREEDY, "--system", "s", "--messages", str(file)])
