"""Translation pairs: tokens and marks, beam search compared with transformers' on every layout, chrF and BLEU."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from megalite.checkpoint.weights import load_module
from megalite.data.indexed import IndexedCorpus, marks_prefix
from megalite.data.preprocessing import preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.hub.hf_folder import HFFolder
from megalite.inference.beams import Beams
from megalite.inference.evaluate_program import evaluate_main
from megalite.inference.generate import Generator, Text
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.pipeline.pipeline_plan import inference_cut
from tests.byte_model import save_byte_model
from tests.families import FAMILY_CONFIGS, hf_model
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, train

PROMPTS = [[5, 9, 3], [77], [11, 12, 13, 14, 15, 16, 17, 18], [130, 0, 64, 2, 5], [40, 41]]
NEW, STOPS = 7, list(range(0, 40))  # many stop ids, so that texts end early
BEAMS = [Beams(2), Beams(3, length_penalty=0.0), Beams(4, length_penalty=2.0)]
NAMES = ("llama", "gpt2")
PAIRS = [("open", "auf"), ("close-it", "zu"), ("file", "die-Datei")]  # its bytes have no space


def searched(
    rank: int, world_size: int, pipe: int, tensor: int, folders: list[Path]
) -> list[list[Text]]:
    grid, results = Grid.build(pipe, tensor), []
    for path in folders:
        folder = HFFolder(path)
        stage = Stage(folder.spec, grid, inference_cut(folder.spec, grid.pipe.size))
        load_module(folder.read, stage)
        generator = Generator(stage, grid, batch_size=2)
        for beams in BEAMS:
            results.append(generator.generate(PROMPTS, NEW, stop_ids=STOPS, beams=beams))
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for name in NAMES:
        made.append(tmp_path_factory.mktemp(name))
        config = FAMILY_CONFIGS[name]
        hf_model(config).save_pretrained(made[-1])
    return made


def test_beams_find_what_transformers_finds(folders: list[Path]) -> None:
    (results,) = run_ranks(1, searched, 1, 1, folders)
    told: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": STOPS}
    cases = [(name, beams) for name in NAMES for beams in BEAMS]
    lengths = set()
    for (name, beams), texts in zip(cases, results, strict=True):
        model = hf_model(FAMILY_CONFIGS[name])
        for text in texts:
            ids = torch.tensor([text.prompt])
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=beams.size,
                length_penalty=beams.length_penalty,
                pad_token_id=0,
                **told,
            )[0, ids.shape[1] :].tolist()
            assert text.tokens == found, (name, beams)
            assert text.finished == ("stop" if found[-1] in STOPS else "length")
            lengths.add(len(found))
    assert len(lengths) > 3


@pytest.mark.parametrize(("pipe", "tensor"), [(2, 2), (3, 1)])
def test_beams_are_the_same_on_a_layout(folders: list[Path], pipe: int, tensor: int) -> None:
    (one,) = run_ranks(1, searched, 1, 1, folders)
    for found in run_ranks(pipe * tensor, searched, pipe, tensor, folders):
        assert found == one


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> str:
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_loss_counts_the_translation_and_its_end(tmp_path: Path) -> None:
    folder = save_byte_model(tmp_path / "byte")
    lines = write_pairs(tmp_path / "lines.jsonl", [*PAIRS, ("x", " ")])
    counts = preprocess([lines], folder, tmp_path / "out", template="<{source}>")
    assert (counts.documents, counts.bad) == (3, 1)
    assert counts.named[0].endswith(':4: "source" or "target" is empty')
    tokenizer = load_tokenizer(folder)
    tokens = IndexedCorpus(tmp_path / "out")
    marks = IndexedCorpus(marks_prefix(tmp_path / "out"))
    for number, (source, target) in enumerate(PAIRS):
        start, stop = tokens.document_start(number), tokens.document_start(number + 1)
        ids = tokens.read(start, stop).tolist()
        assert tokenizer.decode(ids[:-1]) == f"<{source}>{target}"
        assert ids[-1] == tokenizer.eod_id
        wanted = [0] * (len(source) + 2) + [1] * (len(target) + 1)
        assert marks.read(start, stop).tolist() == wanted
    for keys, line in (
        ({"template": "none"}, "--template: 'none': must contain {source}"),
        ({"chat": True}, "--pairs: not with --chat"),
        ({"append_eod": True}, "--append-eod: not with --pairs"),
    ):
        with pytest.raises((ConfigError, DataError), match=line):
            preprocess([lines], folder, tmp_path / "no", **{"template": "{source}", **keys})


def evaluated(rank: int, world_size: int, arguments: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert evaluate_main(arguments) == 0
    return printed.getvalue()


def test_a_model_that_has_learnt_its_pairs_translates_them(tmp_path: Path) -> None:
    """Trained on pipe 2 until it has memorized three pairs, evaluated on tensor 2, with greedy and beam search."""
    folder = save_byte_model(tmp_path / "byte")
    lines = write_pairs(tmp_path / "lines.jsonl", PAIRS)
    preprocess([lines], folder, tmp_path / "pairs", template="{source}=>")
    made = document(tmp_path, "run", {"pipe": 2}, train={"steps": 60})
    made["megalite"]["model"] |= {"vocab_size": 131, "max_position_embeddings": 64}
    made["megalite"]["data"] = {
        "tokenizer": str(folder),
        "sequence_length": 32,
        "train": [str(tmp_path / "pairs")],
        "samples": "packed",
        "reset_attention": True,
        "loss": "marked",
    }
    assert run_ranks(2, train, [(made, nothing)], timeout_seconds=120) == [[0], [0]]
    unseen = [*PAIRS, ("open-it", "unbekannt")]
    lines = write_pairs(tmp_path / "unseen.jsonl", unseen)
    base = ["--checkpoint", str(tmp_path / "run"), "--translations", lines]
    base += [
        "--template",
        "{source}=>",
        "--max-new-tokens",
        "12",
    ]
    for beams, layout in (([], "tensor"), (["--beams", "3"], "pipe")):
        file = tmp_path / f"written-{layout}.jsonl"
        arguments = [*base, *beams, "--write", str(file), f"megalite.parallel.{layout}=2"]
        line = json.loads(run_ranks(2, evaluated, arguments, init=False)[0])
        written = [json.loads(row) for row in file.read_text().splitlines()]
        texts = [row["translation"] for row in written]
        assert texts[:3] == [target for _, target in PAIRS]
        targets = [[target for _, target in unseen]]
        assert line["chrf"] == CHRF().corpus_score(texts, targets).score > 40
        assert line["bleu"] == BLEU().corpus_score(texts, targets).score
        assert (line["lines"], line["beams"]) == (4, 3 if beams else 1)
