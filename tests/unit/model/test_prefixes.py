"""Prompts with bidirectional attention: which tokens are a prompt; attention compared with transformers' under the same
mask; likelihoods and generation attend as in training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite.config import Config, load_config
from megalite.data.indexed import marks_prefix
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import UNCOUNTED, ValidData
from megalite.errors import ConfigError
from megalite.inference.generate import Generator
from megalite.inference.likelihood import likelihoods
from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import ALONE, Grid
from megalite.parallel.layers import placed
from megalite.training.batches import LazyMicroBatches, MicroBatch
from tests.families import FAMILY_CONFIGS, VOCABULARY, file_reader, hf_model, load_hf
from tests.hf_tensors import from_hf
from tests.unit.data.corpora import data_section

LENGTH, CPU = 15, torch.device("cpu")
MARKS = [[0, 0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1], [0] * 6 + [1] * 5, [0, 0, 1], [0] * 4 + [1, 0]]
PREFIXED = {"objective": "prefix", "loss": "marked", "reset_attention": True}
NAMES = ("llama", "mistral", "qwen3", "gpt2", "gpt_neox")


def write_marked(prefix: Path, marks: list[list[int]], seed: int = 0) -> list[list[int]]:
    """Writes a corpus of random documents with these marks; returns their tokens."""
    random = np.random.default_rng(seed)
    documents = [random.integers(0, VOCABULARY, len(some)) for some in marks]
    for path, rows, kind in (
        (prefix, documents, np.uint16),
        (Path(marks_prefix(prefix)), marks, np.uint8),
    ):
        with IndexedWriter(path, kind) as writer:
            for row in rows:
                writer.add_document(np.array(row))
    return [document.tolist() for document in documents]


def reader(folder: Path, **keys: Any) -> ValidData:
    keys = {"valid": [str(folder / "c")], "samples": "packed", **PREFIXED} | keys
    return ValidData(data_section([folder / "c"], LENGTH, **keys), VOCABULARY)


def micro_batch(folder: Path) -> MicroBatch:
    data = reader(folder)
    (batch,) = LazyMicroBatches(data, 0, data.num_samples, data.num_samples, ALONE, CPU).read()
    return batch


def test_a_prompt_is_what_comes_before_a_document_s_first_marked_token(tmp_path: Path) -> None:
    documents = write_marked(tmp_path / "c", MARKS)
    for samples in ("packed", "padded"):
        data = reader(tmp_path, samples=samples)
        tokens, labels, numbers, prefixes = data.batch(range(data.num_samples))
        assert prefixes is not None and numbers is not None
        found = []
        for row in range(len(tokens)):
            for number in np.unique(numbers[row]):
                here = numbers[row] == number
                if (ids := tokens[row, here].tolist()) in [some[:-1] for some in documents]:
                    found.append((ids, prefixes[row, here].tolist()))
                else:  # filling
                    assert not prefixes[row, here].any()
                    assert (labels[row, here] == UNCOUNTED).all()
        lengths = {
            tuple(ids[:-1]): marks.index(1) for ids, marks in zip(documents, MARKS, strict=True)
        }
        assert len(found) == len(MARKS)
        for ids, prefix in found:
            wanted = lengths[tuple(ids)]
            assert prefix == [place < wanted for place in range(len(ids))]
    assert reader(tmp_path, objective="causal").batch([0]).prefixes is None


def seen(context: Context, window: int | None) -> Tensor:
    """The mask that transformers adds to the scores [B, 1, S, S]: 0 where a token attends to another."""
    documents, prefixes = context.documents, context.prefixes
    assert documents is not None and prefixes is not None
    s = documents.shape[1]
    distance = torch.arange(s).unsqueeze(-1) - torch.arange(s)
    mask = (distance >= 0) | prefixes.unsqueeze(1)
    mask = mask & (documents.unsqueeze(1) == documents.unsqueeze(-1))
    mask = mask & (distance.abs() < (window or s))
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min).unsqueeze(1)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_transformers_with_such_a_mask(name: str, tmp_path: Path) -> None:
    write_marked(tmp_path / "c", MARKS)
    tokens, labels, context = micro_batch(tmp_path)
    config = FAMILY_CONFIGS[name]
    model, spec = hf_model(config), read_spec(config)
    windows = {spec.window(layer) for layer in range(spec.num_layers)}
    masks = {
        "full_attention" if w is None else "sliding_attention": seen(context, w) for w in windows
    }
    mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
    logits = model(tokens, attention_mask=mask, position_ids=context.places(LENGTH, CPU)).logits
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    wanted.backward()
    stage = load_hf(Stage(spec, Grid()), model).eval()
    loss = stage(tokens, labels, context)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    read = file_reader({key: value.grad for key, value in model.named_parameters()})
    for value, place in placed(stage):
        theirs = from_hf(spec, place.name, read)
        assert value.grad is not None
        torch.testing.assert_close(value.grad, theirs, rtol=1e-3, atol=1e-5 * loss.item())
    with torch.no_grad():
        causal = stage(tokens, labels, Context(documents=context.documents)).item()
    assert abs(causal - loss.item()) > 1e-2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_likelihoods_and_generation_attend_as_in_training(name: str, tmp_path: Path) -> None:
    documents = write_marked(tmp_path / "c", MARKS)
    config = {
        **FAMILY_CONFIGS[name],
        "tie_word_embeddings": False,
    }  # with tied embeddings, generated texts repeat one token
    stage = load_hf(Stage(read_spec(config), Grid()), hf_model(config)).eval()
    loss = stage(*micro_batch(tmp_path)).item()
    rows = list(zip(documents, MARKS, strict=True))
    # A document's first token has no token before it.
    found = likelihoods(stage, Grid(), rows, batch_size=4, prefixed=True)
    assert -sum(each.log_probability for each in found) == pytest.approx(loss, rel=1e-5)
    apart = likelihoods(stage, Grid(), rows, batch_size=4)
    assert abs(sum(each.log_probability for each in apart) + loss) > 1e-2
    prompts = [document[: marks.index(1)] for document, marks in rows if marks[0] == 0]
    texts = Generator(stage, Grid(), batch_size=3, prefixed=True).generate(prompts, 5)
    causal = Generator(stage, Grid(), batch_size=3).generate(prompts, 5)
    assert [text.tokens for text in texts] != [text.tokens for text in causal]
    for text in texts:
        for place, token in enumerate(text.tokens):
            ids = torch.tensor([text.prompt + text.tokens[:place]])
            prefixes = torch.arange(ids.shape[1]).unsqueeze(0) < len(text.prompt)
            assert int(stage(ids, context=Context(prefixes=prefixes))[0, -1].argmax()) == token


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["megalite.data.loss=all"], 'megalite.data.loss: "all": must be "marked" with'),
        (
            ["megalite.data.samples=windows"],
            'megalite.data.samples: "windows": must be "packed" or',
        ),
        (
            ["megalite.data.samples=padded", "megalite.data.reset_attention=false"],
            "megalite.data.reset_attention: false: must be true with",
        ),
        (
            ["megalite.data.eod_mask_loss=true", "megalite.data.tokenizer=x"],
            "megalite.data.eod_mask_loss: true: must be false with",
        ),
        (
            ["megalite.parallel.context=2"],
            'megalite.parallel.context: 2: must be 1 with megalite.data.objective "prefix"',
        ),
        (["megalite.data.objective=prefixes"], 'must be "causal", "prefix" or an object such as'),
    ],
)
def test_a_mistake_is_one_line(overrides: list[str], line: str) -> None:
    keys = ["objective=prefix", "samples=packed", "reset_attention=true", "loss=marked"]
    given = [f"megalite.data.{key}" for key in keys]
    assert load("megalite.data.tokenizer=null", *given).data.objective == "prefix"
    with pytest.raises(ConfigError) as raised:
        load("megalite.data.tokenizer=null", *given, *overrides)
    assert line in str(raised.value) and "\n" not in str(raised.value)


def load(*overrides: str) -> Config:
    return load_config("ds_configs/tiny_cpu.json", list(overrides)).resolve(8)
