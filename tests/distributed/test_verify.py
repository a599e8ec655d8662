"""tools/verify_layouts.py: sound layouts agree, and five planted faults are found, each by name."""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megalite.config import Config
from megalite.engine.norm import GlobalNorm
from megalite.engine.zero import ShardedOptimizer
from megalite.errors import ConfigError
from megalite.parallel import collectives
from megalite.pipeline.actions import Pipeline
from megalite.prove.layouts import Layout, comparable, config_of, micro_sizes
from megalite.prove.mutants import chosen, mutants
from megalite.prove.trace import Trace, no_plant, record
from megalite.prove.verify import Spread, Verdict, main
from tests.families import FAMILY_CONFIGS
from tests.programs import run_program
from tests.ranks import run_ranks
from tests.small_models import MODELS, VOCABULARY
from tests.traces import nothing, traces
from tests.unit.data.corpora import write_corpus

STEPS, BATCH = 3, 8
TIED = "embedding.tokens.weight"


@contextmanager
def norm_of_stage_0(rank: int) -> Iterator[None]:
    """Ranks 0 and 1 are the first stage."""
    whole = GlobalNorm.__call__

    def partial(self: GlobalNorm, pieces: Any, device: Any, replicated: bool) -> Any:
        return whole(self, pieces if rank < 2 else (), device, replicated)

    with mock.patch.object(GlobalNorm, "__call__", partial):
        yield


@contextmanager
def unreduced_tied_gradient(rank: int) -> Iterator[None]:
    with mock.patch.object(ShardedOptimizer, "sum_tied_gradients", lambda self: None):
        yield


@contextmanager
def scale_of_m(rank: int) -> Iterator[None]:
    whole = Pipeline.train_step

    def scaled(self: Pipeline, batches: Any, scale: float, before_update: Any = None) -> Any:
        return whole(self, batches, scale / len(batches), before_update)  # a mean of means

    with mock.patch.object(Pipeline, "train_step", scaled):
        yield


@contextmanager
def skipped_reduction(rank: int) -> Iterator[None]:
    with mock.patch.object(
        DeepSpeedZeroOptimizer, "allreduce_no_retain", lambda *args, **kwargs: None
    ):
        yield


@contextmanager
def dropped_tensor_all_reduce(rank: int) -> Iterator[None]:
    with mock.patch.object(
        collectives._Enter, "backward", staticmethod(lambda ctx, *grads: (grads[0], None))
    ):
        yield


GRID, SPLIT = Layout(pipe=2, data=2, zero=1, micro=1), Layout(tensor=2, zero=2, micro=2)
ON_GRID: list[Callable[..., Any]] = [
    nothing,
    norm_of_stage_0,
    unreduced_tied_gradient,
    scale_of_m,
    skipped_reduction,
]
ON_SPLIT: list[Callable[..., Any]] = [nothing, dropped_tensor_all_reduce]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train", documents=40, vocabulary=VOCABULARY)
    return {
        "train_batch_size": BATCH,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 1},
        "megalite": {
            "model": {**MODELS["llama"], "num_hidden_layers": 2, "tie_word_embeddings": True},
            "data": {"sequence_length": 12, "train": [str(folder / "train")]},
            "train": {"steps": 10, "run_dir": str(folder / "run")},
        },
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def verdicts(document: dict[str, Any], base: Path) -> dict[str, Verdict]:
    config = comparable(Config.from_dict(document))

    def recorded(world_size: int, runs: list[tuple[Layout, Callable[..., Any]]]) -> list[Trace]:
        folders = [base / f"{world_size}_{number}" for number in range(len(runs))]
        configs = [config_of(config, layout, BATCH).to_json() for layout, _ in runs]
        faults = [fault for _, fault in runs]
        return traces(world_size, STEPS, list(zip(configs, faults, folders, strict=True)))

    sizes = micro_sizes(BATCH, 2)
    reference, *others = recorded(1, [(Layout(zero=0, micro=size), nothing) for size in sizes])
    spread = Spread(reference, others)
    result = {}
    for layout, faults in ((GRID, ON_GRID), (SPLIT, ON_SPLIT)):
        for fault, trace in zip(
            faults, recorded(layout.world_size, [(layout, f) for f in faults]), strict=True
        ):
            result[f"{fault.__name__} {layout.world_size}"] = spread.judge(trace)
    return result


def test_sound_layouts_agree(verdicts: dict[str, Verdict]) -> None:
    for world_size in (4, 2):
        verdict = verdicts[f"nothing {world_size}"]
        assert verdict.first == [] and 0 < max(verdict.worst.values()) <= 1


@pytest.mark.parametrize(
    "fault, figure, tensors",
    [
        ("norm_of_stage_0 4", "norm", ""),
        ("unreduced_tied_gradient 4", "norm", TIED),
        ("scale_of_m 4", "norm", ""),
        ("skipped_reduction 4", "norm", ""),
        ("dropped_tensor_all_reduce 2", "norm", ""),
    ],
)
def test_a_planted_fault_is_found(
    verdicts: dict[str, Verdict], fault: str, figure: str, tensors: str
) -> None:
    first = verdicts[fault].first
    assert first, "not found"
    assert [d.step for d in first] == [1] * len(first)
    assert figure in [d.what for d in first]
    assert "/" in first[-1].what and tensors in first[-1].what
    print(fault, *map(str, first), sep="\n  ")


def config_file(document: dict[str, Any], folder: Path) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(document))
    return str(file)


@pytest.mark.parametrize("fault, code", [(nothing, 0), (unreduced_tied_gradient, 1)])
def test_the_exit_code_and_the_table(
    verdicts: dict[str, Verdict],
    document: dict[str, Any],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[..., Any],
    code: int,
) -> None:
    """Uses the files of the ranks above instead of starting ranks."""

    def replay(world_size: int, module: str, arguments: list[str]) -> None:
        for number, run in enumerate(json.loads(Path(arguments[0]).read_text())["runs"]):
            recorded = number if world_size == 1 else ON_GRID.index(fault)
            shutil.copytree(base / f"{world_size}_{recorded}", run["folder"], dirs_exist_ok=True)

    arguments = [
        "--deepspeed_config",
        config_file(document, tmp_path),
        "--layouts",
        str(GRID),
        "--steps",
        str(STEPS),
    ]
    with mock.patch("megalite.prove.verify.run_local_ranks", replay):
        assert main(arguments) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(str(GRID)) and lines[-1].endswith("differs" if code else "agrees")
    assert (TIED in lines[1]) == bool(code)


def _recorded(rank: int, world_size: int, request: dict[str, Any]) -> None:
    deepspeed.init_distributed("gloo")
    for run in request["runs"]:
        config = Config.from_dict(run["config"])
        plant = mutants(config)[run["mutant"]] if "mutant" in run else no_plant
        record(config, request["steps"], Path(run["folder"]), plant)


def on_forked_ranks(world_size: int, module: str, arguments: list[str]) -> None:
    """Replaces run_local_ranks by ranks that start quickly."""
    run_ranks(
        world_size, _recorded, json.loads(Path(arguments[0]).read_text()), timeout_seconds=280
    )


@pytest.mark.parametrize("layout", ["pipe=2,zero=1", "tensor=2,zero=2", "data=2,zero=1"])
def test_mutants_are_found(
    layout: str, document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least one by each function that plants faults."""
    config, arguments = config_file(document, tmp_path), ["--steps", "2", "--mutants", "16"]
    arguments += ["--deepspeed_config", config, "--layouts", f"{layout},micro=2"]
    with mock.patch("megalite.prove.verify.run_local_ranks", on_forked_ranks):
        assert main(arguments) == 0
    out = capsys.readouterr().out
    ((changing, found),) = re.findall(
        r"16 mutants: (\d+) change a number beyond rounding, (\d+) of these", out
    )
    assert int(changing) >= 13 and changing == found, out


@pytest.mark.long
def test_layers_of_a_stage_that_turn_as_others_are_found(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = copy.deepcopy(document)
    made["megalite"]["model"] = FAMILY_CONFIGS["smollm3"]
    arguments = ["--deepspeed_config", config_file(made, tmp_path), "--steps", "2"]
    arguments += ["--layouts", "pipe=2,zero=1,micro=2", "--mutants", "1"]

    def only(plants: Mapping[str, Any], count: int) -> list[str]:
        return [name for name in plants if "rotary" in name]

    with (
        mock.patch("megalite.prove.verify.run_local_ranks", on_forked_ranks),
        mock.patch("megalite.prove.verify.chosen", only),
    ):
        assert main(arguments) == 0
    assert "1 mutants: 1 change a number beyond rounding, 1 of these" in capsys.readouterr().out


def test_mutants_have_one_list_of_names(document: dict[str, Any]) -> None:
    config = config_of(
        comparable(Config.from_dict(document)),
        Layout(pipe=2, tensor=2, data=2, zero=2, micro=1),
        BATCH,
    )
    names = list(mutants(config))
    assert len(names) > 60 and names == list(mutants(config))
    for words in (
        "counted twice in the norm",
        "weight decay dropped",
        "gradients are not summed",
        "shifted by one",
    ):
        assert any(words in name for name in names), words
    functions = {plant.__qualname__ for plant in mutants(config).values()}
    some = chosen(mutants(config), len(functions))
    assert len(some) == len(functions) == len({mutants(config)[name].__qualname__ for name in some})


def test_the_program_agrees_and_refuses(document: dict[str, Any], tmp_path: Path) -> None:
    config = config_file(document, tmp_path)

    def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_program("tools/verify_layouts.py", "--deepspeed_config", config, *arguments)

    done = verify("--steps", "1", "--layouts", "pipe=2,zero=2,micro=1")
    assert done.returncode == 0 and done.stdout.endswith("agrees\n"), done.stdout + done.stderr
    wrong = verify("--layouts", "pipe=2,zero=3")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
    assert "zero_optimization.stage: 3" in wrong.stderr


@pytest.mark.parametrize("text", ["", "pipe", "pipe=0", "pipe=2,pipe=2", "depth=2", "data=-1"])
def test_a_wrong_layout_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--layouts: "):
        Layout.parse(text)
