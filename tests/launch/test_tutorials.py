"""The tutorials of docs/tutorials word by word: their commands run, and print what the pages show."""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megalite.data.indexed import token_dtype
from megalite.data.indexed_writer import IndexedWriter
from tests.launch.starts import BIN, rows
from tests.pages import Block, blocks, outputs_of
from tests.ranks import REPOSITORY

TUTORIALS = REPOSITORY / "docs/tutorials"
RUN = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
NUMBER = re.compile(r"\b[0-9a-f]{12}\b|\d[\d,.:]*(e[-+]\d+)?")
TOLD_BY_A_MODEL = re.compile(r"(?<=^sample: ).*|(?<=\"text\": \").*")


def environment(folder: Path) -> dict[str, str]:
    """With a command `megalite`, as an installation makes it."""
    command = folder / ".bin/megalite"
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m megalite "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": path}


def run(folder: Path, block: Block) -> str:
    """What a block prints, on both streams."""
    done = subprocess.run(
        [*RUN[block.language], block.text], cwd=folder, env=environment(folder), timeout=200,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{block.text}\n{done.stdout}"
    return done.stdout


def follow(name: str, folder: Path) -> None:
    """Runs a page's blocks in order; an output that is shown after one must be in what it printed."""
    printed = ""
    for block in blocks((TUTORIALS / f"{name}.md").read_text()):
        if block.language in RUN:
            printed = run(folder, block)
        elif block.language == "text":
            check_shown(block.text, printed)


def check_shown(shown: str, printed: str) -> None:
    """The lines shown are among those printed, in order. Numbers may differ: they depend on the machine, and what a
    model tells depends on them. `…` is whatever was left out; alone on a line, any lines."""
    lines = [pattern_free(line) for line in printed.splitlines()]
    for line in shown.splitlines():
        parts = [re.escape(part) for part in pattern_free(line).split("…")]
        wanted = re.compile(".*".join(parts))
        place = next((i for i, found in enumerate(lines) if wanted.fullmatch(found)), None)
        assert place is not None or line.strip() == "…", f"{line}\nis not in\n{printed}"
        lines = lines[0 if place is None else place + 1 :]


def pattern_free(line: str) -> str:
    """A line without what may differ."""
    words = " ".join(line.split()).replace("[ ", "[")
    return NUMBER.sub("#", TOLD_BY_A_MODEL.sub("", words))


def test_what_is_shown_is_compared() -> None:
    printed = "a\nstep 20/60  loss 3.21\nstep 60/60  loss 0.5\nsample: x\nb: 0ab1c2d3e4f5\n"
    check_shown("step 20/60  loss 9.99\n…\nsample: y\nb: aaaabbbbcccc\n", printed)
    check_shown("step … loss 1\n", printed)
    for wrong in ("step 20/60  norm 1\n", "sample: x\na\n", "c\n"):
        with pytest.raises(AssertionError, match="is not in"):
            check_shown(wrong, printed)


def test_own_text(tmp_path: Path) -> None:
    follow("own_text", tmp_path)
    run_dir = tmp_path / "runs/my"
    losses = [row["valid_loss"] for row in rows(run_dir) if "valid_loss" in row]
    assert losses[-1] < losses[0] and (run_dir / "report.html").is_file()


def test_chat(tmp_path: Path) -> None:
    follow("chat", tmp_path)
    assert (tmp_path / "exported/chat_template.jinja").is_file()


NOVEL = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. "
)


def neox_files(folder: Path) -> None:
    """What a user of GPT-NeoX has: a tokenizer of single bytes in place of the 20B one, and data tokenized by it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.save(str(folder / "20B_tokenizer.json"))
    (folder / "data").mkdir()
    with IndexedWriter(folder / "data/mydata_text_document", token_dtype(len(vocabulary))) as out:
        for chapter in range(1, 13):
            out.add_document([*inner.encode(f"Chapter {chapter}. {16 * NOVEL}").ids, 0])


def test_from_neox(tmp_path: Path) -> None:
    neox_files(tmp_path)
    follow("from_neox", tmp_path)
    resolved = json.loads((tmp_path / "resolved.json").read_text())
    assert resolved["megalite"]["parallel"]["tensor"] == 2
    assert [row["step"] for row in rows(tmp_path / "runs/small") if "loss" in row][-1] == 10


def test_the_neox_config_says_what_the_yaml_says() -> None:
    page = (TUTORIALS / "from_neox.md").read_text()
    theirs = yaml.safe_load(next(b.text for b in blocks(page) if b.language == "yaml"))
    ours = json.loads(re.search(r"small\.json <<'EOF'\n(.*?)\nEOF", page, re.DOTALL)[1])  # type: ignore[index]
    model, data, train = (ours["megalite"][name] for name in ("model", "data", "train"))
    rate, schedule = ours["optimizer"]["params"], ours["scheduler"]
    same = {
        "num_layers": model["num_hidden_layers"],
        "hidden_size": model["hidden_size"],
        "num_attention_heads": model["num_attention_heads"],
        "max_position_embeddings": model["max_position_embeddings"],
        "rotary_pct": model["rotary_pct"],
        "no_weight_tying": not model["tie_word_embeddings"],
        "gpt_j_residual": model["use_parallel_residual"],
        "hidden_dropout": model["hidden_dropout"],
        "attention_dropout": model["attention_dropout"],
        "pipe_parallel_size": ours["megalite"]["parallel"]["pipe"],
        "model_parallel_size": ours["megalite"]["parallel"]["tensor"],
        "seq_length": data["sequence_length"],
        "data_path": data["train"][0]["path"],
        "train_iters": train["steps"],
        "checkpoint_factor": train["checkpoint_interval"],
        "eval_interval": train["eval_interval"],
        "eval_iters": train["eval_steps"],
        "optimizer": {**ours["optimizer"], "params": {k: v for k, v in rate.items() if k != "weight_decay"}},
        "weight_decay": rate["weight_decay"],
        "min_lr": rate["lr"] * schedule["params"]["min_ratio"],
        "warmup": schedule["params"]["warmup_steps"] / train["steps"],
        "lr_decay_style": schedule["type"],
        "lr_decay_iters": schedule["params"]["total_steps"],
        **{name: ours[name] for name in ("zero_optimization", "gradient_clipping", "gradient_accumulation_steps",
                                         "train_micro_batch_size_per_gpu")},
    }  # fmt: skip
    assert {name: theirs[name] for name in same} == same
    left = {"pos_emb", "split", "tokenizer_type", "vocab_file", "save"}
    assert set(theirs) == set(same) | left
    parts = [int(part) for part in theirs["split"].split(",")]
    assert data["train"][0]["split"] == [0, parts[0] / sum(parts)]
    assert data["valid"][0]["split"] == [parts[0] / sum(parts), 1]
    assert model["intermediate_size"] == 4 * model["hidden_size"]


@contextlib.contextmanager
def working_in(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    before, variables = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)


def execute(cells: list[str]) -> list[str]:
    """What each cell prints, its last expression's value too, as a notebook shows it; in one namespace."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    outputs = []
    for number, cell in enumerate(cells):
        tree = ast.parse(cell)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(tree, f"cell {number}", "exec"), namespace)
            if last is not None:
                value = eval(
                    compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace
                )  # type: ignore[attr-defined]
                if value is not None:
                    print(repr(value))
        outputs.append(printed.getvalue())
    return outputs


def test_the_notebook(tmp_path: Path) -> None:
    """Its cells in one process, without a kernel; what is stored is what they print."""
    notebook = json.loads((TUTORIALS / "api.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(
        notebook["cells"]
    )
    with working_in(tmp_path, environment(tmp_path)):
        printed = execute(["".join(cell["source"]) for cell in cells])
    for cell, found in zip(cells, printed, strict=True):
        stored = outputs_of(cell)
        check_shown(stored, found)
        assert bool(stored) == bool(found)
