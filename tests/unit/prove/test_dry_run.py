"""The dry run: every shipped config passes, planted faults are named, and configs that do not fit are reported."""

import json
import re
import resource
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from megalite.config import Config, check_model, load_config
from megalite.model.compiled import compile_pieces
from megalite.model.families import read_spec
from megalite.parallel import exchange, rows
from megalite.pipeline.actions import Pipeline
from megalite.plan.device_figures import GIB
from megalite.plan.dry_run import DryRunError, dry_run
from megalite.prove.dry_run_program import main
from megalite.prove.messages import Call, Plant, RankCalls, calls_of_all, match, shrunken
from tests.families import FAMILY_CONFIGS
from tests.small_models import MODELS
from tests.unit.test_ds_configs import FOLDER, ROWS, shipped

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def small(**parallel: Any) -> Config:
    """A config with pipe 2 × data 2 × tensor 2."""
    config = load_config(FOLDER / "tiny_cpu.json").to_json()
    config["megalite"]["parallel"] |= {"pipe": 2, "tensor": 2, **parallel}
    return shrunken(Config.from_dict(config).resolve(8))


def routed(zero: int, **parallel: Any) -> Config:
    """A config with experts: expert 2 × 2 copies, no other axes."""
    config = load_config(FOLDER / "tiny_cpu.json").to_json()
    config["megalite"]["model"] = MODELS["mixtral"]
    config["megalite"]["parallel"] = {"expert": 2, **parallel}
    config["megalite"]["data"]["sequence_length"] = 64
    config["zero_optimization"]["stage"] = zero
    return shrunken(Config.from_dict(config).resolve(4))


@pytest.mark.parametrize("name", ROWS)
def test_shipped_configs_pass(name: str) -> None:
    config = shipped(name)
    found = dry_run(config, read_spec(config.model), None)
    assert len(found.stages) == config.parallel.pipe
    assert sum(stage.ranks for stage in found.stages) == config.world_size
    layers = [layer for stage in found.stages for own in stage.layers for layer in own]
    assert sorted(layers) == list(range(read_spec(config.model).num_layers))
    if name == "llama_8b_128k.json":  # selective recompute gathers keys twice: docs/layouts.md
        elements = 6 * 131_072 * 8 * 128 / 8 * 7 / 8
        assert found.stages[0].sent["context"] == 32 * 2 * elements


@pytest.mark.parametrize(
    "name",
    [
        "tiny_cpu.json",
        "data_parallel.json",
        "modernbert.json",
        "topics.json",
        "fp16.json",
        "t5.json",
        "finetune.json",
        "llama_7b_3d.json",
        "llama_13b_zero3_tensor.json",
    ],
)
def test_messages_of_shipped_configs_match(name: str) -> None:
    config = shipped(name)
    found = match(calls_of_all(shrunken(config)))
    assert found["collectives"] > 0 and (found["messages"] > 0) == (config.parallel.pipe > 1)


def test_messages_are_tried_on_the_cpu_of_a_machine_with_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus = CUDA_Accelerator()
    monkeypatch.setattr(real_accelerator, "ds_accelerator", gpus)
    assert match(calls_of_all(small()))["collectives"] > 0
    assert real_accelerator.get_accelerator() is gpus


@pytest.mark.parametrize("name", ROWS)
def test_shipped_configs_can_be_shrunken(name: str) -> None:
    config = shrunken(shipped(name))
    check_model(config, read_spec(config.model))


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_messages_of_all_shipped_configs_match(name: str) -> None:
    config = shipped(name)
    assert match(calls_of_all(shrunken(config)))["collectives"] > 0


@pytest.mark.parametrize("schedule, zero", [("zb-v", 2), ("interleaved", 1)])
def test_messages_of_other_schedules_match(schedule: str, zero: int) -> None:
    document = small(schedule=schedule, sequence=True).to_json()
    document["zero_optimization"]["stage"] = zero
    calls = calls_of_all(Config.from_dict(document).resolve(8))
    assert match(calls)["messages"] > 0
    # Nothing is sent over pipe × tensor, for which NCCL has no communicator (Grid.connect).
    used = {rank.groups[call.group] for rank in calls for call in rank.calls}
    assert (0, 1, 2, 3, 4, 5, 6, 7) in used and (0, 1, 4, 5) not in used


@pytest.mark.parametrize("attention", ["gather", "heads"])
def test_messages_of_a_context_axis_match(attention: str) -> None:
    config = small(pipe=1, tensor=1, context=2, context_attention=attention)
    assert config.world_size == 4
    ranks = calls_of_all(config)
    assert match(ranks)["collectives"] > 0
    kinds = {call.kind for call in ranks[0].calls if ranks[0].groups[call.group] == (0, 1)}
    heads = {"alltoall_base"} if attention == "heads" else {"allgather_base", "reduce_scatter_base"}
    assert heads <= kinds


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_model_of_every_family_is_shrunk_whole(family: str) -> None:
    """Also if a list has an entry per layer, and if the pipe axis has one rank more than the model has layers."""
    document = load_config(FOLDER / "tiny_cpu.json").to_json()
    model = document["megalite"]["model"] = FAMILY_CONFIGS[family]
    if family == "smollm3":
        model["no_rope_layers"] = [1, 0, 1]
    document["megalite"]["parallel"] |= {"pipe": 4, "tensor": 1}
    given = read_spec(model)
    objective: dict[str, Any] = {}
    if given.stacks is not None:
        document["megalite"]["parallel"]["pipe"] = 2
        objective = {"objective": {"source_length": 8}, "samples": "padded", "loss": "marked"}
        objective["reset_attention"] = True
    elif not given.causal:
        objective = {"objective": {"masked": 0.3, "mask_token_id": 4, "special_token_ids": [0]}}
    document["megalite"]["data"] |= {"sequence_length": 16, **objective}
    config = shrunken(Config.from_dict(document).resolve(4))
    spec = read_spec(config.model)
    assert spec.num_layers == config.parallel.pipe
    assert (spec.hidden_size, spec.num_heads, spec.head_size) == (32, 4, 8)
    assert spec.vocabulary_size == 33
    assert spec.intermediate_size == (4 * 32 if family == "gptj" else 16)  # n_inner is left out
    assert (spec.mixture is None) == (given.mixture is None)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_messages_of_an_expert_axis_match(zero: int) -> None:
    ranks = calls_of_all(routed(zero))
    assert len(ranks) == 4 and match(ranks)["collectives"] > 0
    rows = [call for call in ranks[3].calls if call.given]
    assert rows and {ranks[3].groups[call.group] for call in rows} == {(2, 3)}
    assert sum(sum(call.given) for call in rows) > 0


def test_messages_of_experts_with_zero_3_match() -> None:
    assert match(calls_of_all(routed(3, expert=1)))["collectives"] > 0


def named(plant: Plant, config: Config | None = None) -> str:
    with pytest.raises(DryRunError) as caught:
        match(calls_of_all(config or small(), plant))
    return str(caught.value)


def test_gradients_of_keys_that_are_not_summed_over_context_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scatter = rows._scatter

    def skips(whole: torch.Tensor, own: rows.Rows) -> torch.Tensor:
        return whole[..., : own.count, :] if dist.get_rank() == 3 else scatter(whole, own)

    monkeypatch.setattr(rows, "_scatter", skips)
    config = small(pipe=1, tensor=1, context=2)
    pattern = r"group \(2, 3\): ranks 2 and 3 differ at collective \d+: reduce_scatter_base of .* and allgather_base of"
    assert re.match(pattern, named(lambda rank, pipeline: None, config))


def test_rows_that_another_rank_does_not_expect_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = exchange._sent

    def loses_one(given: torch.Tensor, route: exchange.Route) -> torch.Tensor:
        if dist.get_rank() == 2 and route.given[1] > 0:
            first, second = route.given
            route = replace(route, given=(first, second - 1))
            given = given[:-1]
        return sent(given, route)

    monkeypatch.setattr(exchange, "_sent", loses_one)
    pattern = r"group \(2, 3\): collective \d+: rank 2 sends rank 3 \d+ rows, rank 3 expects \d+"
    assert re.match(pattern, named(lambda rank, pipeline: None, routed(1)))


def test_a_collective_of_one_rank_alone_is_named() -> None:
    def plant(rank: int, pipeline: Pipeline) -> None:
        if rank == 3:
            group, begin = pipeline.engine.grid.tensor.group, pipeline.engine.begin_step

            def begin_step() -> None:
                dist.all_reduce(torch.zeros(5), group=group)
                begin()

            pipeline.engine.begin_step = begin_step

    assert re.match(
        r"group \(2, 3\): ranks 2 and 3 differ at collective \d+: .* and allreduce of 5 float32",
        named(plant),
    )


def test_a_missing_send_is_named() -> None:
    def plant(rank: int, pipeline: Pipeline) -> None:
        if rank == 1:
            mailbox = pipeline.interpreter.mailbox
            send, left = mailbox.send, [True]

            def skips_one(*args: Any) -> None:
                if left:
                    left.clear()
                else:
                    send(*args)

            mailbox.send = skips_one  # type: ignore[method-assign]

    assert named(plant) == "messages from rank 1 to 5: sent 3, received 4"


def test_a_message_of_another_shape_is_named() -> None:
    def plant(rank: int, pipeline: Pipeline) -> None:
        if rank == 2:
            mailbox = pipeline.interpreter.mailbox
            send = mailbox.send
            mailbox.send = lambda key, tensor, target: send(key, tensor[:, :-1], target)  # type: ignore[method-assign]

    assert re.match(
        r"message 0 from rank 2 to 6: [\d,]+ \w+ sent, [\d,]+ \w+ received", named(plant)
    )


def test_a_stage_that_takes_another_shape_is_named() -> None:
    def plant(rank: int, pipeline: Pipeline) -> None:
        if rank == 5:
            pipeline.shape = (1, 3, pipeline.shape[2])

    rule = (
        r"group \(4, 5\): ranks 4 and 5 differ at collective \d+: allreduce of .* and allreduce of "
    )
    assert re.match(rule, named(plant))


def test_collectives_in_an_order_that_hangs_are_named() -> None:
    """Two groups of the same two ranks, called in opposite orders: each group's calls match, but together they hang."""
    groups = {"a": (0, 1), "b": (0, 1)}
    calls = [Call("allreduce", name, "1 float32") for name in "ab"]
    ranks = [RankCalls(calls, groups), RankCalls(calls[::-1], groups)]
    with pytest.raises(DryRunError, match="deadlock of 2 ranks: rank 0 at allreduce"):
        match(ranks)
    ranks = [RankCalls(calls, groups), RankCalls(list(calls), groups)]
    assert match(ranks) == {"ranks": 2, "collectives": 2, "messages": 0}


def test_what_does_not_fit_is_one_line() -> None:
    config = load_config(FOLDER / "llama_7b_3d.json").resolve(64)
    with pytest.raises(
        DryRunError, match=r"rank \d+: needs \d\.\d+ GiB, \d\.\d+ GiB more than --memory-gib 2; "
    ):
        dry_run(config, read_spec(config.model), 2 * GIB)


def test_program(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--deepspeed_config", str(FOLDER / "tiny_cpu.json"), "--world-size", "8"]
    assert main([*arguments, "--memory-gib", "1"]) == 0
    out = capsys.readouterr().out
    assert "ranks 0-3: layers 0-" in out and "every rank fits in 1 GiB" in out
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["ranks"] for stage in found["stages"]] == [4, 4]
    assert all(stage["sent_bytes_a_micro_batch"]["tensor"] > 0 for stage in found["stages"])


@pytest.mark.long
def test_a_thousand_ranks_in_a_minute_and_a_gibibyte() -> None:
    overrides = [
        "megalite.parallel.pipe=16",
        "megalite.parallel.schedule=zb-v",
        "zero_optimization.stage=2",
    ]
    overrides.append("megalite.parallel.chunks=null")
    config = load_config(FOLDER / "llama_70b_3d.json", overrides).resolve(1024)
    start = time.process_time()
    found = dry_run(config, read_spec(config.model), 80 * GIB)
    assert time.process_time() - start < 60 and len(found.stages) == 16
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 2**30


def test_messages_of_compiled_pieces_match() -> None:
    """The compiler does not work while messages are recorded, so that the functions run uncompiled."""
    document = small().to_json()
    document["megalite"]["train"]["compile"] = True
    try:
        assert match(calls_of_all(Config.from_dict(document).resolve(8)))["collectives"] > 0
    finally:
        compile_pieces(False)
