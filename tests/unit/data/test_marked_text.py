"""inspect-data marks exactly the tokens that are trained on, readable in 60 columns."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megalite.commands import inspect_data
from megalite.data.indexed import IndexedCorpus
from megalite.data.inspection import Show, inspect
from megalite.data.marked_text import CLOSE, OPEN, drawn, runs_of, shown
from megalite.data.preprocessing import preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError, DataError
from tests.unit.data.test_chat_encoder import PLAIN, TALK

LONG = "class self return import def " * 8


@pytest.fixture(params=["bpe", "unigram"])
def talks(tokenizers: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A corpus of conversations and its tokenizer."""
    inner = AutoTokenizer.from_pretrained(tokenizers[request.param])
    inner.chat_template = PLAIN
    inner.add_special_tokens({"mask_token": "<mask>"})
    inner.save_pretrained(tmp_path / "tokenizer")
    long = [{"role": "user", "content": "é 漢字\t\x1b[31m"}, {"role": "assistant", "content": LONG}]
    lines = [{"messages": talk} for talk in (TALK, long)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    preprocess(
        [str(tmp_path / "talks.jsonl")], tmp_path / "tokenizer", tmp_path / "talks", chat=True
    )
    return tmp_path / "talks"


def lines_of(prefix: Path, **show: Any) -> list[str]:
    settings = {"tokenizer": str(prefix.parent / "tokenizer"), "width": 2000, "columns": 60}
    return list(inspect([str(prefix)], Show(**settings | show)))


def test_answers_are_in_brackets_and_lines_are_narrow(talks: Path) -> None:
    lines = lines_of(talks, mask=True)
    marks = IndexedCorpus(f"{talks}.mask").tokens
    count, every = int(marks.sum()), len(marks)
    assert lines[1] == f"  trained on: {count:,} of {every:,} tokens, {count / every:.1%}"
    begin = lines.index(next(line for line in lines if line.startswith("  document 1")))
    first, second = ("\n".join(part) for part in (lines[3:begin], lines[begin + 1 :]))
    found = re.findall(r"\[\[(.*?)\]\]", first, re.DOTALL)
    assert [" ".join(part.split()) for part in found] == ["a function: def f</s>", "return</s>"]
    assert "[user]" in first and "what is def?" in first
    (answer,) = re.findall(r"\[\[(.*?)\]\]", second, re.DOTALL)
    assert (
        answer.split() == f"{LONG.rstrip()} </s>".split()
        or answer.split() == (LONG + "</s>").split()
    )
    assert "\x1b" not in second and max(map(len, lines[1:])) <= 60


def test_colour_takes_the_place_of_brackets(talks: Path) -> None:
    plain, coloured = (lines_of(talks, mask=True, colour=colour) for colour in (False, True))
    text = "\n".join(coloured)
    assert "\x1b[30;42m" in text and OPEN not in text
    words = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in coloured]
    flat = "".join("".join(plain).replace(OPEN, "").replace(CLOSE, "").split())
    assert "".join("".join(words).split()) == flat


def test_without_a_tokenizer_ids_are_shown(talks: Path) -> None:
    lines = lines_of(talks, mask=True, tokenizer=None, documents=1)
    ids, marks = (IndexedCorpus(f"{talks}{end}").document(0).tolist() for end in ("", ".mask"))
    words = " ".join(lines[3:]).replace(OPEN, "").replace(CLOSE, "").split()
    assert list(map(int, words)) == ids
    inside = " ".join(re.findall(r"\[\[(.*?)\]\]", " ".join(lines[3:])))
    wanted = [token for token, mark in zip(ids, marks, strict=True) if mark]
    assert list(map(int, inside.split())) == wanted


def test_pairs_show_the_translation(talks: Path) -> None:
    source = talks.parent / "pairs.jsonl"
    source.write_text(json.dumps({"source": "import", "target": "return"}) + "\n")
    folder = talks.parent / "tokenizer"
    preprocess([str(source)], folder, talks.parent / "pairs", template="{source} =")
    shown_text = " ".join(" ".join(lines_of(talks.parent / "pairs", mask=True)[3:]).split())
    assert re.fullmatch(r"import = ?\[\[ ?return</s>\]\]", shown_text)


def test_masked_modelling_shows_one_draw(talks: Path) -> None:
    tokenizer = load_tokenizer(talks.parent / "tokenizer")
    ids = IndexedCorpus(talks).document(1)
    marks = drawn(ids, 1, 0.3, tokenizer)
    assert 0.1 * len(ids) < marks.sum() < 0.5 * len(ids)
    lines = lines_of(talks, masked=0.3)
    assert lines[1].startswith("  document 0: ")  # no total, which would change with each draw
    assert (
        f"  document 1: {marks.sum()} of {len(ids)} tokens, {marks.sum() / len(ids):.1%}" in lines
    )
    assert shown(runs_of(ids.tolist(), marks, tokenizer), 2000, 60, False)[-1] == lines[-1]


def test_a_long_document_is_cut(talks: Path) -> None:
    lines = lines_of(talks, mask=True, width=30)
    assert lines[-1].endswith("…") and sum(len(line.strip()) for line in lines[-3:]) < 100


def test_mistakes_are_named(talks: Path, tokenizers: dict[str, Path]) -> None:
    for suffix in (".idx", ".bin"):
        Path(f"{talks}.mask{suffix}").rename(talks.parent / f"gone{suffix}")
    with pytest.raises(
        ConfigError, match=r"--mask: .*talks.mask.idx: missing: must exist along with"
    ):
        lines_of(talks, mask=True)
    with pytest.raises(ConfigError, match=r"--masked: 0.3: needs --tokenizer with a mask"):
        lines_of(talks, masked=0.3, tokenizer=str(tokenizers["bpe"]))
    for suffix in (".idx", ".bin"):
        Path(f"{talks}.mask{suffix}").write_bytes(Path(f"{talks}{suffix}").read_bytes())
    with pytest.raises(DataError, match="must have a byte for each of the"):
        lines_of(talks, mask=True)


def test_the_program_takes_brackets_where_there_is_no_terminal(
    talks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    words = [str(talks), "--tokenizer", str(talks.parent / "tokenizer")]
    assert inspect_data.main([*words, "--mask"]) == 0
    text = capsys.readouterr().out
    assert "[[return</s>]]" in text.replace("[[ ", "[[") and "tokens per document" not in text
    assert text.splitlines() == lines_of(talks, mask=True)
    assert inspect_data.main([*words, "--masked", "0.3", "--verify"]) == 0
    assert "verified: " in capsys.readouterr().out
    for share in ("0", "1", "x"):
        with pytest.raises(ConfigError, match="--masked"):
            inspect_data.main([*words, "--masked", share])
    with pytest.raises(ConfigError, match="not allowed with"):
        inspect_data.main([*words, "--masked", "0.3", "--mask"])
