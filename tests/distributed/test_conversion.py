"""Hugging Face import and export: for every family the same logits on a grid, and a bitwise equal round trip."""

import json
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import megalite
from megalite.checkpoint.files import Checkpoint, CheckpointWriter, find_checkpoint
from megalite.checkpoint.saved_bias import set_router_bias
from megalite.checkpoint.weights import load_module, load_shards_from
from megalite.errors import CheckpointError, ConversionError, MegaliteError
from megalite.hub import export_folder as export
from megalite.hub import same_logits as verify
from megalite.hub.export_folder import export_hf
from megalite.hub.hf_folder import HFFolder
from megalite.hub.import_folder import import_hf
from megalite.hub.names import hf_auto_class
from megalite.hub.sources import open_weights_together
from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from megalite.pipeline.forwards import Forwards
from megalite.pipeline.pipeline_plan import inference_cut
from megalite.training.loop import Position
from megalite.training.start import StartingPoint
from tests.families import FAMILY_CONFIGS, SOURCE, batch, hf_gradients, hf_model
from tests.ranks import run_ranks
from tests.small_models import MODELS, Layout, Task, build

TIED = {name: {**config, "tie_word_embeddings": True} for name, config in FAMILY_CONFIGS.items()}
_TIED_ALONE = ("bert", "roberta")
UNTIED = {
    name: {**config, "tie_word_embeddings": False}
    for name, config in FAMILY_CONFIGS.items()
    if config["model_type"] not in _TIED_ALONE
}
CONFIGS = {
    f"{name} tied": config
    for name, config in TIED.items()
    if config["model_type"] not in ("gptj", "phi")
} | {f"{name} untied": config for name, config in UNTIED.items()}


def stored(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def _logits(stage: Stage, grid: Grid, tokens: Tensor) -> Tensor | None:
    """On the last rank of the pipe axis."""
    outputs: list[Tensor] = []

    def forward(number: int, hidden: Tensor | None) -> Tensor:
        context = Context(source=SOURCE if stage.spec.stacks is not None else 0)
        outputs.append(stage(tokens if hidden is None else hidden, context=context))
        return outputs[0]

    shape = (*tokens.shape, stage.spec.hidden_size)
    Forwards(grid.pipe, torch.float32, torch.device("cpu")).run([0], forward, lambda number: shape)
    return outputs[0] if grid.pipe.is_last else None


@torch.no_grad()
def logits_on_a_grid(
    rank: int, world_size: int, pipe: int, tensor: int, folders: list[Path]
) -> list[Tensor | None]:
    grid, results = Grid.build(pipe, tensor), []
    tokens, _ = batch()
    for folder in folders:
        checkpoint = Checkpoint.open(find_checkpoint(folder))
        spec = read_spec(checkpoint.model)
        stage = Stage(spec, grid, inference_cut(spec, pipe))
        load_module(checkpoint.read, stage)
        set_router_bias(stage, checkpoint.state, torch.device("cpu"))
        results.append(_logits(stage, grid, tokens))
    return results


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Hugging Face folders of every family in shards, and the checkpoints made of them."""
    result = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("family")
        hf_model(config).save_pretrained(folder / "hf", max_shard_size="60KB")
        assert import_hf(folder / "hf", folder / "checkpoint", verify=True) is not None
        result[name] = folder / "hf", folder / "checkpoint"
    return result


def test_logits_on_pipe_2_tensor_2_are_those_of_transformers(
    imported: dict[str, tuple[Path, Path]],
) -> None:
    results = run_ranks(
        4, logits_on_a_grid, 2, 2, [checkpoint for _, checkpoint in imported.values()]
    )
    for number, (name, config) in enumerate(CONFIGS.items()):
        ours = torch.cat([parts[number] for parts in results if parts[number] is not None], dim=-1)
        wanted = hf_gradients(config)[0]
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5, msg=name)


def start_from_folders(
    rank: int, world_size: int, layout: Layout, folders: list[tuple[Path, Task]]
) -> None:
    """As in `train.load`: every rank's weights are its slices of the folder's."""
    for path, task in folders:
        engine = build(layout, task)[0]
        folder = HFFolder(path)
        StartingPoint(Position(), "", folder).fill(engine)
        for value, place in placed(engine.module):
            assert torch.equal(
                value.detach(), folder.read(place.name, place.offsets, place.shape)
            ), place.name
        for shard in engine.shards():
            place = shard.placement
            own = folder.read(place.name, place.offsets, place.shape).flatten()
            assert torch.equal(
                shard.master, own[shard.start : shard.start + shard.master.numel()]
            ), place.name


def test_training_starts_from_a_folder_on_a_grid(tmp_path: Path) -> None:
    folders = []
    for task in (Task("llama", tied=False), Task("gpt2", tied=True)):
        hf_model(task.section).save_pretrained(tmp_path / task.model)
        folders.append((tmp_path / task.model, task))
    run_ranks(8, start_from_folders, Layout(pipe=2, tensor=2, data=2, stage=2), folders)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_goes_in_comes_out_to_the_bit(
    name: str,
    imported: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    caplog: Any,
    recwarn: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hf, checkpoint = imported[name]
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    export_hf(checkpoint, tmp_path / "out", verify=True)
    before, after = stored(hf), stored(tmp_path / "out")
    assert before.keys() == after.keys() and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert all(
        torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype
        for key in before
    )
    import_hf(tmp_path / "out", tmp_path / "again", verify=False)
    first, second = Checkpoint.open(checkpoint), Checkpoint.open(tmp_path / "again")
    assert read_spec(first.model) == read_spec(second.model) and first.names == second.names
    assert all(torch.equal(first.read(key), second.read(key)) for key in first.names)
    spec = read_spec(first.model)
    for folder in (hf, tmp_path / "out") if spec.causal else ():
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    caplog.clear()
    recwarn.clear()
    logging.getLogger("transformers").propagate = True
    model, info = hf_auto_class(spec).from_pretrained(tmp_path / "out", output_loading_info=True)
    logging.getLogger("transformers").propagate = False
    told = [record.getMessage() for record in caplog.records]
    if spec.stacks is not None and not spec.tied:  # a config of transformers 5 always ties
        assert told and all("we will NOT tie them" in line for line in told)
        told.clear()
    assert not any(info.values()) and not told and not recwarn.list
    wanted = hf_model(CONFIGS[name])
    assert model.config.architectures == [type(wanted).__name__]
    changed = {"_name_or_path", "dtype", "architectures", "transformers_version"}
    assert {k: v for k, v in model.config.to_dict().items() if k not in changed} == {
        k: v for k, v in wanted.config.to_dict().items() if k not in changed
    }


def test_dtypes_and_files_that_travel(
    imported: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, _ = imported["qwen2 untied"]
    (hf / "tokenizer_config.json").write_text('{"a": 1}')
    (hf / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.5}')
    import_hf(hf, tmp_path / "checkpoint")
    find_checkpoint(tmp_path / "checkpoint")
    compared = export_hf(tmp_path / "checkpoint", tmp_path / "half", dtype="bfloat16", verify=True)
    assert compared is not None and "maximum difference" in str(compared)
    tensors = stored(tmp_path / "half")
    assert all(torch.equal(value.bfloat16(), tensors[key]) for key, value in stored(hf).items())
    assert (tmp_path / "half" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert json.loads((tmp_path / "half" / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [2, 5]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@torch.no_grad()
def test_biases_of_routers_travel_in_fp32_and_are_used(
    imported: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, checkpoint = imported["ernie4_5_moe untied"]
    expected = hf_model(CONFIGS["ernie4_5_moe untied"])(batch()[0]).logits
    for folder in (hf, checkpoint):
        stage = megalite.load(folder).stage
        torch.testing.assert_close(stage(batch()[0]), expected, rtol=1e-5, atol=1e-5)
        for router in stage.routers.values():
            router.bias.zero_()
        assert (stage(batch()[0]) - expected).abs().max() > 1e-3
    export_hf(checkpoint, tmp_path / "half", dtype="bfloat16", verify=True)
    before, after = stored(hf), stored(tmp_path / "half")
    biases = [name for name in before if "e_score_correction_bias" in name]
    assert len(biases) == 2 and all(torch.equal(before[name], after[name]) for name in biases)
    assert {after[name].dtype for name in after if name not in biases} == {torch.bfloat16}


def test_biases_that_a_family_s_files_cannot_hold_are_not_left_out(
    imported: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source = Checkpoint.open(imported["mixtral untied"][1])
    state = {**source.state, "router_bias": [[0.5] * 5] * 3}
    del state["model"]
    with CheckpointWriter(tmp_path / "moved", source.model, state) as writer:
        for name in source.names:
            writer.add(name, source.read(name))
    with pytest.raises(
        CheckpointError, match="router_bias: the files of mixtral models cannot store the biases of"
    ):
        export_hf(tmp_path / "moved", tmp_path / "out")


def test_nothing_is_written_over_nor_left_half_done(
    imported: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, checkpoint = imported["gpt_neox untied"]
    (tmp_path / "stands").mkdir()
    for call in (lambda to: import_hf(hf, to), lambda to: export_hf(checkpoint, to)):
        with pytest.raises(CheckpointError, match="already exists"):
            call(tmp_path / "stands")

    true_logits = verify.our_logits
    monkeypatch.setattr(verify, "our_logits", lambda *a: true_logits(*a) * 1.001)
    for call in (lambda to: import_hf(hf, to), lambda to: export_hf(checkpoint, to, "float16")):
        with pytest.raises(ConversionError, match="logits differ from transformers' by"):
            call(tmp_path / "wrong")
    with pytest.raises(MegaliteError):
        import_hf(tmp_path / "nothing", tmp_path / "wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["stands"] and not list(
        (tmp_path / "stands").iterdir()
    )


def failing_on_rank_1(rank: int, world_size: int, source: Path) -> None:
    """Each step of loading a folder fails on one rank: opening it, and a read for a module, an engine or a run."""
    engine, _, grid = build(Layout(data=2, stage=1), Task("gpt2", tied=True))
    whole, path = HFFolder.read, source / "model.safetensors"
    folder = open_weights_together(source)
    assert isinstance(folder, HFFolder)

    def read(self: HFFolder, name: str, *args: Any) -> Tensor:
        if rank == 1 and name.startswith("final_norm"):
            raise CheckpointError(f"{path}: {name}: cannot be read: Input/output error")
        return whole(self, name, *args)

    def opened(self: HFFolder, *args: Any) -> None:
        raise CheckpointError(f"{path}: cannot be read: Input/output error")

    stage = Stage(folder.spec, grid)
    with mock.patch.object(HFFolder, "read", read):
        for load in (
            lambda: load_module(folder.read, stage),
            lambda: load_shards_from(folder.read, engine.shards()),
            lambda: StartingPoint(Position(), "", folder).fill(engine),
        ):
            with pytest.raises(
                CheckpointError, match="model.safetensors: final_norm.*Input/output error"
            ) as raised:
                load()
            assert raised.value.agreed
    said = "model.safetensors: cannot be read: Input/output error"
    planted = mock.patch.object(HFFolder, "__init__", opened if rank == 1 else HFFolder.__init__)
    with planted, pytest.raises(CheckpointError, match=said):
        open_weights_together(source)
    load_module(folder.read, stage)


def test_a_read_that_fails_on_one_rank_is_every_rank_s_error_at_once(tmp_path: Path) -> None:
    hf_model({**MODELS["gpt2"], "tie_word_embeddings": True}).save_pretrained(tmp_path)
    run_ranks(2, failing_on_rank_1, tmp_path, timeout_seconds=30)
