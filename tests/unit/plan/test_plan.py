"""The planner: its clock, its memory, the result of its search, its output, and published runs."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megalite.config import Config, check_model
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.parallel.grid import Grid
from megalite.pipeline.lengths import Lengths
from megalite.pipeline.pipeline_plan import make_plan
from megalite.plan import published
from megalite.plan.candidates import (
    Candidate,
    Search,
    candidates,
    config_of,
    given_candidate,
    how_many,
)
from megalite.plan.device_figures import DEVICES, GIB, read_device, write_device
from megalite.plan.plan_program import LETTERS, main
from megalite.plan.played import Programs
from megalite.plan.rank_memory import MemoryTable, SizesByStage
from megalite.plan.search import PlannedLayout, Planner
from megalite.plan.states import parameter_sizes, predicted_activations, predicted_states
from megalite.programs.check import check
from megalite.programs.program import Program
from megalite.programs.schedules import SCHEDULES, make_program
from megalite.training.mfu import DATA_SHEET_TFLOPS
from megalite.training.pretraining import main as pretrain
from tests.small_models import MODELS
from tests.unit.data.corpora import write_corpus

H100 = DEVICES["H100"]


def document(**changes: Any) -> dict[str, Any]:
    """A config with a model whose layouts differ: six layers, 8 heads, bf16."""
    model = {
        **MODELS["llama"],
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "vocab_size": 32000,
        "max_position_embeddings": 1024,
    }
    return {
        "train_batch_size": 32,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "megalite": {
            "model": model,
            "data": {"sequence_length": 1024, "train": ["data/train"]},
            "train": {"steps": 1, "run_dir": "runs/x"},
        },
        **changes,
    }


def planner(world_size: int = 8, memory: float = 80 * GIB, **changes: Any) -> Planner:
    config = Config.from_dict(document(**changes))
    spec = read_spec(config.model)
    return Planner(Search(config, spec, world_size, 32), H100, memory)


def small_planner(family: str, world_size: int = 4, batch: int = 8, **changes: Any) -> Planner:
    """The planner of a model with odd sizes, on samples of 16 tokens."""
    keys = document(**changes)
    keys["megalite"]["model"] = MODELS[family]
    keys["megalite"]["data"]["sequence_length"] = 16
    config = Config.from_dict(keys)
    return Planner(Search(config, read_spec(config.model), world_size, batch), H100, 80 * GIB)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("p, m", [(2, 2), (3, 9), (4, 12)])
def test_the_fast_clock_equals_the_checks(schedule: str, p: int, m: int) -> None:
    program = make_program(schedule, p, m, 3)
    costs = {("F", 0): 1.0, ("B", 0): 2.5, ("I", 0): 1.5, ("W", 0): 0.7}

    def cost(kind: str, chunk: int) -> float:
        return costs[kind, 0] * (1 + 0.3 * (chunk % 3))

    for hop in (0.0, 0.4):
        assert Lengths(program).of(cost, hop) == pytest.approx(check(program, cost, hop).length)
    import numpy as np

    table = [[cost(kind, chunk) for chunk in range(len(program.home))] for kind in "FBIW"]
    many = np.stack([np.array(table), 2 * np.array(table)], axis=2)
    length = check(program, cost).length
    assert Lengths(program).of_many(many).tolist() == pytest.approx([length, 2 * length])


def test_a_program_that_cannot_run_is_an_error() -> None:
    program = make_program("1f1b", 2, 2, 1)
    turned = Program(program.home, 2, (program.actions[0][::-1], program.actions[1]))
    with pytest.raises(Exception, match="no rank can continue"):
        Lengths(turned)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_beyond_those_played_take_the_busiest_ranks_time(schedule: str) -> None:
    one = Candidate(
        pipe=2, schedule=schedule, chunks=2 if schedule in ("interleaved", "zb-v") else 1
    )
    found = planner(2, train_batch_size=64)
    plan_search = replace(found.search, world_size=2, batch=64)
    played = Planner(plan_search, H100, 80 * GIB).exact(one)
    config = config_of(plan_search, one)
    from megalite.plan import step_time

    table = MemoryTable(config, found.search.spec, H100, SizesByStage())
    work, sharing = found.work_of(one), found.sharing(one)
    before = step_time.PLAYED
    try:
        step_time.PLAYED = 1000
        whole = step_time.step_time(work, table.plan, sharing, 64, table.weights)
    finally:
        step_time.PLAYED = before
    assert played.micro_batches == 64
    assert played.time.seconds == pytest.approx(whole.seconds, rel=0.005)


def small_search(name: str) -> Planner:
    """Worlds of four ranks: very different layouts; experts, also with ZeRO-0; ranks that share cores, in fp32."""
    match name:
        case "dense":
            return planner(4)
        case "experts":
            return small_planner("mixtral", bf16=None)
    return replace(
        small_planner("gpt2", batch=4, bf16=None), device=replace(H100, cores=2, pipe_share=0.9)
    )


def ten_best(layouts: list[PlannedLayout], memory_bytes: float) -> list[float]:
    """Seconds of the ten best; of layouts that differ only in recompute and offload, the fastest that fits counts."""
    fastest: dict[Candidate, float] = {}
    for layout in layouts:
        if layout.memory.total <= memory_bytes:
            plain = layout.candidate._replace(recompute="none", offload="none")
            seconds = layout.time.seconds
            fastest[plain] = min(seconds, fastest.get(plain, seconds))
    return sorted(fastest.values())[:10]


@pytest.mark.parametrize("name", ["dense", "experts", "cores"])
def test_the_search_finds_the_ten_best(name: str) -> None:
    """The ten best of all layouts, whether memory is ample or short; and the bounds by which the search rules layouts
    out are never above a layout's time or memory."""
    search = small_search(name)
    layouts = [search.exact(one) for one in candidates(search.search)]
    programs = Programs(search)
    for layout in layouts:
        one = layout.candidate
        assert search.least_seconds(one) <= layout.time.seconds * (1 + 1e-9), one
        assert search.least_bytes(one) <= layout.memory.total, one
        if one.pipe > 1:
            assert programs.least_seconds(one) <= layout.time.seconds * (1 + 1e-9), one
            assert programs.least_bytes(one) <= layout.memory.total, one
    sizes = sorted(layout.memory.total for layout in layouts)
    # Among layouts with 1F1B; with ZeRO-2 in fp32 a zero-bubble schedule may take a little less.
    of_1f1b = [one for one in layouts if one.candidate.schedule in ("none", "1f1b")]
    assert search.smallest().memory.total == min(one.memory.total for one in of_1f1b)
    assert search.smallest().memory.total <= 1.001 * sizes[0]
    for memory_bytes in (80 * GIB, sizes[len(sizes) // 3], sizes[len(sizes) // 50]):
        found = replace(search, memory_bytes=memory_bytes).find()
        best = ten_best(layouts, memory_bytes)
        assert [layout.time.seconds for layout in found.layouts] == pytest.approx(best)
        assert found.accepted == len(layouts) and found.weighed < len(layouts) / 4


def every_combination(world_size: int) -> Iterator[Candidate]:
    """All combinations of a layout's settings, whether the rules accept them or not."""
    sizes = [(p, t, c) for p, t, c in product((1, 2, 4), repeat=3) if p * t * c <= world_size]
    orders = [("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("interleaved", 2), ("interleaved", 3)]
    for p, t, c in sizes:
        ways = product(
            ("gather", "heads") if c > 1 else ("gather",),
            (1, 2, 4),
            (False, True) if t > 1 else (False,),
            (1, 2, 3, 4),
            (0, 1, 2, 3),
            ("none", "cpu"),
            orders if p > 1 else orders[:1],
        )
        for attention, expert, sequence, micro, zero, offload, (schedule, chunks) in ways:
            yield Candidate(
                pipe=p, tensor=t, context=c, attention=attention, expert=expert, sequence=sequence,
                micro=micro, zero=zero, offload=offload, schedule=schedule, chunks=chunks,
            )  # fmt: skip


def test_candidates_are_what_the_rules_accept() -> None:
    search = small_planner("mixtral", 4, 4, bf16=None).search
    accepted = {one for one in candidates(search) if one.recompute == "none"}
    resolved = set()
    for one in every_combination(4):
        try:
            config = config_of(search, one)
            check_model(config, search.spec)
            resolved.add(one)
            assert given_candidate(config) == one
        except ConfigError:
            pass
    assert accepted == resolved and len(accepted) > 300
    assert how_many(search) == 3 * len(accepted)
    axes = {name for name in Candidate._fields if len({getattr(one, name) for one in accepted}) > 1}
    assert axes == set(Candidate._fields) - {"recompute"}


@pytest.mark.parametrize("one", [
    Candidate(pipe=2, tensor=2, zero=1, micro=2),
    Candidate(pipe=2, tensor=2, zero=2, micro=1, schedule="zb-v", chunks=2, sequence=True),
    Candidate(pipe=2, zero=1, schedule="interleaved", chunks=3, recompute="full"),
    Candidate(tensor=4, zero=3, micro=4),
])  # fmt: skip
@pytest.mark.parametrize("half", [True, False])
def test_memory_is_that_of_every_rank(one: Candidate, half: bool) -> None:
    """The states and activations of each rank; test_peaks.py tests their sum."""
    search = planner(8, bf16={"enabled": half}).search
    config, spec = config_of(search, one), search.spec
    ranks = MemoryTable(config, spec, None, SizesByStage()).ranks
    for rank in range(8):
        grid = Grid.at(rank, one.pipe, config.data_size, one.tensor)
        sizes = parameter_sizes(config, spec, grid)
        states = predicted_states(config, sizes, grid)
        kept = predicted_activations(config, spec, grid)
        held = ranks[grid.pipe.rank]
        assert states.weights <= held.weights and states.optimizer <= held.optimizer
        if rank == held.rank:
            assert (states.weights, states.optimizer) == (held.weights, held.optimizer)
        permanent = states.weights + states.optimizer
        # The peak is at least that of each alone, and at most that of both with temporaries.
        forwards = kept.bytes - max(kept.again, kept.logits)
        assert held.total >= permanent + max(states.gradients, forwards)
        own = held.weights + held.gradients + held.optimizer + held.activations
        assert own <= 1.1 * (permanent + 2 * states.gradients + kept.bytes)


def test_settings_that_save_memory_are_chosen_if_it_is_short() -> None:
    roomy = planner().find(1).layouts[0]
    short = roomy.memory.total - 2**20
    found = planner(memory=short).find(1)
    other = found.layouts[0]
    assert other.memory.total <= short and other.time.seconds >= roomy.time.seconds
    more = found.too_large[0]  # a faster layout that does not fit
    assert more.memory.total > short and more.time.seconds < other.time.seconds


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str, **changes: Any) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(document(**changes)))
    assert main(["--deepspeed_config", str(file), *arguments]) == 0
    return capsys.readouterr().out


def test_json_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, tmp_path, "--world-size", "8", "--json"))
    layouts = found["layouts"]
    assert len(layouts) == 10
    assert [row["step_seconds"] for row in layouts] == sorted(
        row["step_seconds"] for row in layouts
    )
    for row in layouts:
        assert {"keys", "bytes_by_rank", "bubble", "step_seconds"} <= set(row)
        assert sum(row["seconds"].values()) == pytest.approx(row["step_seconds"])
        assert sum(row["bytes"].values()) == row["bytes_by_rank"] < 80 * GIB
        assert 0 <= row["bubble"] + 1e-9 < 1
    assert found["given"]["keys"]["megalite.parallel.pipe"] == 1


def test_table_picture_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, tmp_path, "--world-size", "8", "--device", "a100", "--memory-gib", "20")
    assert "8 ranks of A100 with 20.0 GiB" in out and "first: " in out
    assert "next with other axes: " in out and "the config's own: " in out
    letters = {*LETTERS.values()}
    bars = [line[4:] for line in out.splitlines() if line[4:] and set(line[4:]) <= letters]
    assert len(bars) >= 10 and bars[0][0] == "P"
    keys = out.splitlines()[-1].split()
    assert "megalite.parallel.pipe=" in keys[0]


def test_a_wrong_device_lists_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document()))
    arguments = ["--deepspeed_config", str(tmp_path / "config.json"), "--world-size", "8"]
    with pytest.raises(ConfigError, match="--device: V100: must be one of A100, H100, H200, B200"):
        main([*arguments, "--device", "V100"])
    (tmp_path / "device.json").write_text("{}")
    with pytest.raises(
        ConfigError, match="must be a file written by tools/benchmark_step.py --calibrate"
    ):
        main([*arguments, "--device", str(tmp_path / "device.json")])


def test_no_layout_that_fits_says_by_how_much(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document()))
    arguments = ["--deepspeed_config", str(tmp_path / "config.json"), "--world-size", "2"]
    message = r"no layout fits: the smallest \(.*\) takes 5\.\d GiB on rank \d, 2\.\d GiB more than the 3.0 GiB .* free"
    with pytest.raises(ConfigError, match=message):
        main([*arguments, "--memory-gib", "3"])


def test_a_world_without_any_layout_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document()))
    arguments = ["--deepspeed_config", str(tmp_path / "config.json"), "--world-size", "11"]
    message = "--world-size: 11: the config's rules accept no layout for this many ranks with a global batch of 32"
    with pytest.raises(ConfigError, match=message):
        main(arguments)


def test_check_prints_the_plan_of_the_configs_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "corpus", 50, vocabulary=100)
    keys = document(bf16=None)
    keys["megalite"]["model"] = MODELS["mixtral"]
    keys["megalite"]["parallel"] = {"context": 2, "expert": 2}
    keys["megalite"]["data"] = {"train": [str(tmp_path / "corpus")], "sequence_length": 16}
    keys["megalite"]["train"] = {"steps": 10, "run_dir": str(tmp_path / "run")}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    check = ["--deepspeed_config", str(tmp_path / "config.json"), "--check", "--world-size", "4"]
    assert pretrain(check) == 0
    told = capsys.readouterr().err
    assert re.search(
        r"[\d,]+ parameters; 5,120 tokens in 10 steps, .* per parameter; .* FLOPs", told
    )
    assert re.search(r"epochs: [\d.]+ of .*corpus", told)
    assert re.search(r"plan: on H100 [\d.e-]+ s per step predicted", told)


def test_times_and_bytes_of_the_context_and_expert_axes() -> None:
    """Compared with the formulas in docs/layouts.md for what a layer's forward and backward send."""
    search = small_planner("mixtral", 8, 32)
    plain = Candidate(pipe=1, micro=2)
    gather = plain._replace(context=4)
    heads = gather._replace(attention="heads")
    routed = plain._replace(context=2, expert=2)
    of = {one: search.exact(one) for one in (plain, gather, heads, routed)}
    b, s, d, layers, k, kv, n, h = 2, 16, 32, 4, 2, 2, 4, 8
    assert of[plain].sent["context"] == of[plain].time.parts["context"] == 0
    m = of[gather].micro_batches
    assert of[gather].sent["context"] == m * layers * 2 * 4 * b * s * kv * h * 3 / 4
    m = of[heads].micro_batches
    assert of[heads].sent["context"] == m * layers * 2 * 4 * b * s * (n + max(kv, 4)) * h * 3 / 16
    m = of[routed].micro_batches
    assert of[routed].sent["expert"] == m * layers * 2 * 4 * (b * s / 2) * k * d / 2
    for one, part in ((gather, "context"), (heads, "context"), (routed, "expert")):
        assert of[one].time.parts[part] > 0
    # A rank's work is that of its own tokens; ZeRO shards over data × context.
    tokens = search.work_of(gather).tokens, search.work_of(plain).tokens
    assert tokens == (b * s / 4, b * s)
    assert search.sharing(gather).ranks == search.sharing(plain).ranks == 8
    # The expert axis divides experts, and ZeRO shards them over data × context / expert.
    whole, split = search.exact(routed._replace(expert=1)), of[routed]
    experts = search.search.spec.expert_parameters
    assert whole.memory.weights - split.memory.weights == pytest.approx(2 * experts / 2, rel=0.01)
    rest = whole.memory.optimizer - split.memory.optimizer
    assert rest == pytest.approx(0, abs=0.01 * whole.memory.optimizer)


def test_a_measured_device_is_read_back(tmp_path: Path) -> None:
    measured = replace(H100, name="mine", cores=2)
    write_device(measured, tmp_path / "device.json")
    assert read_device(tmp_path / "device.json") == measured


def test_data_sheets_agree_with_those_of_mfu() -> None:
    known = {name: (half, single) for name, half, single in DATA_SHEET_TFLOPS}
    for name, device in DEVICES.items():
        half, single = known[name]
        assert device.half_flops / 1e12 == pytest.approx(half, rel=0.001)
        assert single is not None and device.single_flops / 1e12 == pytest.approx(single, rel=0.01)


@pytest.mark.parametrize("run", published.RUNS, ids=lambda run: f"{run.name} on {run.ranks}")
def test_published_runs(run: published.PublishedRun) -> None:
    """Within 10 %, with one constant for each kind of device (device_figures.py)."""
    assert published.predicted(run)[0] == pytest.approx(run.tflops, rel=0.1)


@pytest.mark.long
def test_a_thousand_ranks_take_seconds() -> None:
    from megalite.config import load_config

    config = load_config("ds_configs/llama_70b_3d.json")
    start = time.process_time()
    found = Planner(
        Search(config, read_spec(config.model), 1024, 1024), H100, H100.memory_bytes
    ).find()
    assert time.process_time() - start < 10
    assert found.accepted > 30_000 and len(found.layouts) == 10


def test_the_plan_of_a_cut_is_the_same_for_all_ranks() -> None:
    spec = read_spec(document()["megalite"]["model"])
    from megalite.pipeline.cut import ModelCosts

    costs = ModelCosts.of(spec, 1024, False)
    plans = [make_plan.__wrapped__("zb-v", 2, 2, None, costs) for _ in range(2)]
    assert plans[0] == plans[1]
