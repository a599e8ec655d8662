"""`launcher/pretrain.py`: from the command line to a run. Mistakes are reported before ranks start.

deepspeed --num_gpus 8 launcher/pretrain.py --deepspeed_config FILE [KEY=VALUE …]
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megalite.checkpoint.files import Checkpoint, checkpoints_of, read_state
from megalite.checkpoint.folder import write_durably
from megalite.config import Classified, Config, check_model, load_config
from megalite.config.reading import apply_overrides
from megalite.data.loader import TrainData, ValidData, check_data
from megalite.data.position import Position
from megalite.data.tokenizer import load_tokenizer
from megalite.engine.nvme import check_nvme, remove_swap_folders
from megalite.errors import CheckpointError, ConfigError
from megalite.hub.carried import carried_by_run
from megalite.hub.sources import Weights, open_weights, resolve_weights
from megalite.inputs import reading
from megalite.model.compiled import check_compiler
from megalite.model.families import model_dict, read_spec
from megalite.model.parameter_groups import check_parameter_groups
from megalite.model.spec import TransformerSpec
from megalite.pipeline.pipeline_plan import plan_of
from megalite.plan.balance import context_lines
from megalite.plan.device_figures import read_device
from megalite.plan.pipeline_lines import pipeline_lines
from megalite.plan.plan_program import epochs_line, plan_line, size_line
from megalite.plan.rank_memory import check_states
from megalite.plan.states import memory_lines
from megalite.ranks.arguments import ArgumentParser, at_least
from megalite.ranks.devices import be_deterministic, device_name, gpu_memory_bytes
from megalite.ranks.garbage import collect_garbage, hold_garbage
from megalite.ranks.launch import start_ranks, stop_ranks
from megalite.ranks.rank_info import MOST_RANKS, RankInfo, rank_info
from megalite.training.epochs import with_steps
from megalite.training.fingerprint import MADE_FOR, difference
from megalite.training.lock import take_lock
from megalite.training.sampler import encoded_prompts
from megalite.training.screen import Phases, say
from megalite.training.trackers import check_trackers

ONLY_WITH_CHECK = "only with --check; a run has as many ranks as its launcher starts"
_NEW_RUN = "another needs a new run, with megalite.train.load"


def main(arguments: list[str]) -> int:
    """Trains; returns the exit code. Raises UserError with one line."""
    if {"--check", "--help", "-h"} & set(arguments):
        options = _parse(arguments)
        prepared = prepare(
            options.deepspeed_config,
            options.overrides,
            options.world_size or rank_info().world_size,
        )
        with reading(options.deepspeed_config):
            check_data(prepared.config.data, prepared.spec.vocabulary_size)
        print(json.dumps(prepared.config.to_json(), indent=2, ensure_ascii=False), flush=True)
        print(_summary(prepared), file=sys.stderr, flush=True)
        print(epochs_line(prepared.config, prepared.spec), file=sys.stderr, flush=True)
        if prepared.spec.stacks is None:  # the planner cannot predict the times of two stacks
            print(plan_line(prepared.config), file=sys.stderr, flush=True)
        return 0

    def prepare_ranks(thorough: bool) -> PreparedRun:
        options = _parse(arguments)  # parsed here, where only one rank per node reports a mistake
        prepared = prepare(
            options.deepspeed_config, options.overrides, rank_info().world_size, thorough
        )
        if thorough and (memory := gpu_memory_bytes()) is not None:
            check_states(prepared.config, prepared.spec, memory)
        _make_run_dir(prepared.config)
        if rank_info().rank == 0:
            take_lock(Path(prepared.config.train.run_dir))
        return prepared

    here, prepared = start_ranks(
        prepare_ranks, lambda prepared: prepared.config.train.limits.collective_timeout, _differs
    )
    _remove_swap_folders(prepared.config, here)
    code = _train(prepared, here.rank)
    stop_ranks()
    return code


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(description="Train a model on any layout.")
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="FILE", help="the run's JSON config"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate config and data, print the resolved JSON and exit",
    )
    ranks = at_least(1, MOST_RANKS)
    parser.add_argument(
        "--world-size", type=ranks, metavar="N", help="with --check: number of ranks"
    )
    # Some launchers pass it; the environment has it too.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="a dotted path into the JSON and its value",
    )
    options = parser.parse_args(arguments)
    if options.world_size is not None and not options.check:
        raise ConfigError(f"--world-size: {options.world_size}: {ONLY_WITH_CHECK}")
    return options


@dataclass
class PreparedRun:
    """A validated config for this world. model: the Hugging Face config as a plain dict."""

    config: Config
    spec: TransformerSpec
    model: dict[str, Any]


def _differs(first: PreparedRun, own: PreparedRun) -> str | None:
    """The first difference between a node's config or model and rank 0's, as one line; None if they are equal."""
    was, now = ({**one.config.to_json(), "megalite.model": one.model} for one in (first, own))
    found = _first_difference(was, now, "")
    if found is None:
        return None
    key, theirs, ours = found
    return f"{key}: {ours}: must be {theirs}, as on the node of rank 0"


def _first_difference(was: Any, now: Any, key: str) -> tuple[str, str, str] | None:
    """(dotted key, value of `was`, value of `now`) as JSON; a missing key is null. None if they are equal."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted(was.keys() | now.keys()):
            inner = f"{key}.{name}" if key else name
            found = _first_difference(was.get(name), now.get(name), inner)
            if found is not None:
                return found
        return None
    return None if was == now else (key, json.dumps(was), json.dumps(now))


def prepare(path: str, overrides: list[str], world_size: int, thorough: bool = True) -> PreparedRun:
    """Reads and validates everything that a run needs. thorough: also its data, tokenizer and checkpoints."""
    with reading(path):
        loaded = with_steps(load_config(path, overrides), world_size, thorough)
        config = _in_the_order_begun(loaded, loaded.resolve(world_size), world_size)
        spec = read_spec(config.model)
        check_model(config, spec)
        check_parameter_groups(config, spec)
        prepared = PreparedRun(config, spec, model_dict(config.model))
        if thorough:
            _check_data(config, spec)
            with reading(f"megalite.train.run_dir: {config.train.run_dir}"):
                _check_run_dir(prepared)
            check_nvme(config, spec, rank_info().local_size)
        if thorough and config.train.compile:
            check_compiler()
    return prepared


def _in_the_order_begun(loaded: Config, config: Config, world_size: int) -> Config:
    """`config`, which is `loaded` resolved. A run in Megatron's order keeps the order of its first start, unless the
    config says for how many samples it is made."""
    if loaded.data.order != "megatron" or loaded.data.megatron_samples is not None:
        return config
    needed = config.data.megatron_samples or 0
    for folder in reversed(checkpoints_of(Path(config.train.run_dir))):
        try:
            made_for = read_state(folder).get("fingerprint", {}).get(MADE_FOR, needed)
        except CheckpointError:
            continue  # damaged: an older one has the same
        if made_for < needed:
            rule = f"the order of {folder} is made for {made_for} ({MADE_FOR}): {_NEW_RUN}"
            raise _Other(
                f"megalite.train.steps: {config.train.steps}: needs {needed} samples: {rule}"
            )
        return Config.from_dict(
            apply_overrides(loaded.to_json(), [f"{MADE_FOR}={made_for}"])
        ).resolve(world_size)
    return config


def _check_data(config: Config, spec: TransformerSpec) -> None:
    check_trackers(config.train.trackers)
    if config.train.calibration is not None:
        read_device(Path(config.train.calibration), "megalite.train.calibration")
    if config.train.sample_prompts:
        encoded_prompts(config, spec)
    TrainData(config.data, config.train.seed, spec.vocabulary_size)
    if config.data.valid:
        ValidData(config.data, spec.vocabulary_size)
    if config.data.tokenizer is not None:
        size = load_tokenizer(config.data.tokenizer).vocabulary_size
        if size > spec.vocabulary_size:
            raise ConfigError(
                f"megalite.data.tokenizer: {config.data.tokenizer}: has {size} ids: must be at most the model's "
                f"vocab_size {spec.vocabulary_size}"
            )


def _check_run_dir(prepared: PreparedRun) -> None:
    """Raises unless the run folder can be created and written, and its checkpoints are of this model and seed. Creates
    nothing."""
    config = prepared.config
    run_dir = Path(config.train.run_dir)
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"megalite.train.run_dir: {run_dir}: {existing} must be a folder that can be written"
        )
    _check_names(run_dir)
    checkpoints = checkpoints_of(run_dir)
    for path in reversed(checkpoints):
        try:
            check_fits(Checkpoint.open(path), prepared, seed=config.train.seed)
        except _Other:
            raise
        except CheckpointError:
            continue  # damaged: the ranks will report it and use an older one
        return
    if not checkpoints and config.train.load is not None:
        weights = open_weights(resolve_weights(config.train.load), config.data.classes)
        check_fits(weights, prepared)


def _check_names(run_dir: Path) -> None:
    """Raises ConfigError if the run folder contains something else under a name that a run writes to."""
    where = f"megalite.train.run_dir: {run_dir}"
    if run_dir.is_symlink() and not run_dir.exists():
        raise ConfigError(f"{where}: is a link to {os.readlink(run_dir)}, which does not exist")
    for name, what in (
        ("checkpoints", "folder"),
        ("metrics.jsonl", "file"),
        ("config.json", "file"),
    ):
        path = run_dir / name
        is_right = path.is_dir() if what == "folder" else path.is_file()
        if path.exists() and not (is_right and os.access(path, os.W_OK)):
            raise ConfigError(f"{where}: {name} must be a {what} that can be written")


def _make_run_dir(config: Config) -> None:
    """Creates the run folder, after everything else has been validated."""
    try:
        Path(config.train.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        line = (
            f"megalite.train.run_dir: {config.train.run_dir}: cannot be created: {error.strerror}"
        )
        raise ConfigError(line) from error


class _Other(CheckpointError):
    """An undamaged checkpoint that does not fit the config."""


def check_fits(weights: Weights, prepared: PreparedRun, seed: int | None = None) -> None:
    """Raises CheckpointError if a checkpoint is of another model, or a run's of another seed, optimizer or data."""
    theirs, ours = read_spec(weights.model), prepared.spec
    if ours.classifier is not None and theirs.classifier is None:
        # The head gets new initial weights.
        theirs = read_spec(Classified(weights.model, ours.labels))
    if theirs.labels != ours.labels:
        raise _Other(
            f"megalite.data.objective.classes: {json.dumps(ours.labels)}: must be "
            f"{json.dumps(theirs.labels)}, the labels of {weights.folder}"
        )
    for field in fields(theirs):
        was, now = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name == "classifier" and was is not None and now is not None:
            was, now = (replace(head, dropout=0.0, dense_dropout=0.0) for head in (was, now))
        if was != now and field.name != "init_std" and not field.name.endswith("dropout"):
            raise _Other(
                f"megalite.model: {field.name} {now}: must be {was}, as in {weights.folder}"
            )
    if seed is None or not isinstance(weights, Checkpoint):
        return
    rule = f"as in {weights.folder}: {_NEW_RUN}"
    if weights.state["seed"] != seed:
        raise _Other(f"megalite.train.seed: {seed}: must be {weights.state['seed']}, {rule}")
    was, now = weights.state.get("optimizer", "AdamW"), prepared.config.optimizer.type
    if was != now and {was, now} != {"AdamW", "Adam"}:  # these two keep the same moments
        raise _Other(f"optimizer.type: {now}: must be {was}, {rule}")
    trained = weights.state.get("fingerprint")  # older checkpoints have none
    if trained is not None and (found := difference(trained, prepared.config)) is not None:
        given, was = found
        raise _Other(f"{given}: must be {was}, {rule}")


def _remove_swap_folders(config: Config, here: RankInfo) -> None:
    """Removes the folders of a killed start, once the lock shows that no other start of this run is alive
    (collective)."""
    import torch.distributed as dist

    if config.swap_folder is not None:
        if here.local_rank == 0:
            remove_swap_folders(config)
        dist.barrier()


def _summary(prepared: PreparedRun) -> str:
    """The values of `auto` in the config, the run's size, the table of each rank's memory, the pipeline's schedule, and
    how evenly the context axis shares attention."""
    config, spec = prepared.config, prepared.spec
    plan = pipeline_lines(plan_of(config, spec), config.accumulation_steps)
    lines = [*config.notes, size_line(config, spec), *memory_lines(config, spec), *plan]
    return "\n".join([*lines, *context_lines(config, spec)])


def _write_config(config: Config) -> None:
    path = Path(config.train.run_dir) / "config.json"
    try:
        write_durably(path, json.dumps(config.to_json(), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        say(f"{path}: cannot be written: {error.strerror}; the run continues")


def _ended(config: Config, position: Position) -> str | None:
    """Why a run is over before a start's first step; None if it is not."""
    if position.owes_evaluation and config.evaluates:
        return None
    if position.step >= config.train.last_step:
        return (
            f"already at step {position.step} of {config.train.last_step}: to continue, raise "
            f"megalite.train.{'steps' if config.train.epochs is None else 'epochs'}"
        )
    if position.best.is_stopped(config.train.early_stop):
        return f"already at step {position.step}: {position.best.stop_line}"
    return None


def _train(prepared: PreparedRun, rank: int) -> int:
    hold_garbage()
    # Imported here: --check and mistakes need no DeepSpeed.
    from megalite.engine.build import build_engine
    from megalite.guard.watchdog import Watchdog
    from megalite.parallel.grid import Grid
    from megalite.topology.hosts import crossing_hosts
    from megalite.training.loop import Run
    from megalite.training.start import starting_point

    config = prepared.config
    run_dir = Path(config.train.run_dir)
    if config.train.deterministic:
        be_deterministic()
    with Watchdog(run_dir, config.train.limits) as watchdog:
        grid = Grid.build(
            config.parallel.pipe,
            config.parallel.tensor,
            config.parallel.context,
            config.parallel.expert,
            timeout=config.train.limits.collective_timeout,
            key_heads=prepared.spec.num_kv_heads,
        )
        phase = Phases(rank == 0)
        hosts = len(set(watchdog.hosts))
        ranks = f"{grid.world_size} rank{'s' if grid.world_size > 1 else ''}"
        phase(f"connected: {ranks} on {hosts} host{'s' if hosts > 1 else ''}, {device_name()}")
        if rank == 0 and (line := crossing_hosts(watchdog.hosts, grid.tensor.size)):
            print(line, file=sys.stderr, flush=True)
        start = starting_point(run_dir, config.train.load, config.data.classes)
        if (line := _ended(config, start.position)) is not None:
            if rank == 0:
                print(f"{run_dir}: {line}", flush=True)
            return 0
        phase(f"building a {prepared.spec.family} model and its optimizer")
        engine = build_engine(
            config, prepared.spec, grid, draws_weights=start.weights is None or start.partly
        )
        collect_garbage()
        if start.weights is not None:
            phase(f"reading {start.weights.folder}")
        start.fill(engine)
        if rank == 0:
            _write_config(config)
            say(f"{run_dir}: {start.line}")
            say(_summary(prepared))
        phase("opening data, measuring the rate of matrix products")
        run = Run(config, prepared.spec, prepared.model, engine, start.position, watchdog)
        run.saver.starts_from(start.position.step, start.damaged)
        if rank == 0:
            run.saver.carried = carried_by_run(config.data.tokenizer, start.weights)
        del start  # and with it the checkpoint's index
        phase("first step")
        return run.train()
