"""`launcher/pretrain.py`: from the command line to a run. What can be wrong is said before ranks start.

    deepspeed --num_gpus 8 launcher/pretrain.py --deepspeed_config FILE [KEY=VALUE …]
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from megalite.checkpoint.files import Checkpoint, checkpoints_of
from megalite.checkpoint.folder import write_durably
from megalite.config import Config, check_model, load_config
from megalite.convert.weights import Weights, open_weights, resolve_weights
from megalite.data.loader import TrainData, ValidData, check_data
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import CheckpointError, ConfigError
from megalite.launch import ArgumentParser, at_least, place, start_ranks, stop_ranks
from megalite.model.families import model_dict, read_spec
from megalite.model.spec import TransformerSpec
from megalite.pipeline.plan import plan_of
from megalite.pipeline.told import pipeline_lines
from megalite.training.memory import told_lines
from megalite.training.nvme import check_nvme, remove_swap_folders
from megalite.training.optimizer import check_parameter_groups


def main(arguments: list[str]) -> int:
    """Trains; returns the exit code. Raises UserError with one line."""
    if {"--check", "--help", "-h"} & set(arguments):
        options = _parse(arguments)
        prepared = prepare(options.deepspeed_config, options.overrides, options.world_size or place().world_size)
        check_data(prepared.config.data, prepared.spec.vocabulary_size)
        print(json.dumps(prepared.config.to_json(), indent=2, ensure_ascii=False), flush=True)
        _tell_memory(prepared, sys.stderr)
        return 0

    def prepare_ranks(thorough: bool) -> Prepared:
        options = _parse(arguments)  # here, where one rank of a node tells of a mistake
        prepared = prepare(options.deepspeed_config, options.overrides, place().world_size, thorough)
        if thorough:
            _make_run_dir(prepared.config)
            remove_swap_folders(prepared.config)
        return prepared

    here, prepared = start_ranks(prepare_ranks)
    try:
        return _train(prepared, here.rank)
    finally:
        stop_ranks()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser("pretrain.py", description="Train a model on any layout.")
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the JSON that says what a run is")
    parser.add_argument("--check", action="store_true", help="validate config and data, print the JSON, start nothing")
    parser.add_argument("--world-size", type=at_least(1), metavar="N", help="with --check: for so many ranks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it; it is in the env
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a dotted path into the JSON and its value")
    options = parser.parse_args(arguments)
    if options.world_size is not None and not options.check:
        raise ConfigError("--world-size: goes with --check: a run has the ranks that its launcher starts")
    return options


@dataclass
class Prepared:
    """A config that has been checked, for this world. model: the Hugging Face config as a plain dict."""

    config: Config
    spec: TransformerSpec
    model: dict[str, Any]


def prepare(path: str, overrides: list[str], world_size: int, thorough: bool = True) -> Prepared:
    """Reads and checks all that a run needs. thorough: its data, tokenizer and checkpoints too."""
    config = load_config(path, overrides).resolve(world_size)
    spec = read_spec(config.model)
    check_model(config, spec)
    check_parameter_groups(config, spec)
    prepared = Prepared(config, spec, model_dict(config.model))
    if thorough:
        _check_data(config, spec)
        _check_run_dir(prepared)
        check_nvme(config, spec, place().local_size)
    return prepared


def _check_data(config: Config, spec: TransformerSpec) -> None:
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


def _check_run_dir(prepared: Prepared) -> None:
    """The run folder can be made and written, and what it holds is of this model and seed. Makes nothing."""
    config = prepared.config
    run_dir = Path(config.train.run_dir)
    standing_part = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not standing_part.is_dir() or not os.access(standing_part, os.W_OK):
        raise ConfigError(f"megalite.train.run_dir: {run_dir}: {standing_part} must be a folder that can be written")
    standing = checkpoints_of(run_dir)
    for path in reversed(standing):
        try:
            check_fits(Checkpoint.open(path), prepared, seed=config.train.seed)
        except _Other:
            raise
        except CheckpointError:
            continue  # damaged: the ranks will say so and take an older one
        return
    if not standing and config.train.load is not None:
        check_fits(open_weights(resolve_weights(config.train.load)), prepared)


def _make_run_dir(config: Config) -> None:
    """After all else has been found right."""
    try:
        Path(config.train.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        line = f"megalite.train.run_dir: {config.train.run_dir}: cannot be made: {error.strerror}"
        raise ConfigError(line) from error


class _Other(CheckpointError):
    """A checkpoint that is whole and does not fit."""


def check_fits(weights: Weights, prepared: Prepared, seed: int | None = None) -> None:
    """CheckpointError where a checkpoint is of another model, or a run's of another seed."""
    theirs = read_spec(weights.model)
    for field in fields(theirs):
        was, now = getattr(theirs, field.name), getattr(prepared.spec, field.name)
        if was != now and field.name != "init_std" and not field.name.endswith("dropout"):
            raise _Other(f"megalite.model: {field.name} {now}: must be {was}, as in {weights.folder}")
    if seed is None or not isinstance(weights, Checkpoint):
        return
    if weights.state["seed"] != seed:
        raise _Other(f"megalite.train.seed: {seed}: must be {weights.state['seed']}, as in {weights.folder}")
    optimizer = prepared.config.document.optimizer
    was, now = weights.state.get("optimizer", "AdamW"), optimizer and optimizer.type
    if was != now and {was, now} != {"AdamW", "Adam"}:  # these two keep the same of each weight
        rule = f"must be {was}, as in {weights.folder}: another needs a new run, with megalite.train.load"
        raise _Other(f"optimizer.type: {now}: {rule}")


def _tell_memory(prepared: Prepared, file: TextIO) -> None:
    """The table of what each rank will hold, and the pipeline's schedule."""
    config, spec = prepared.config, prepared.spec
    lines = told_lines(config, spec) + pipeline_lines(plan_of(config, spec), config.accumulation_steps)
    print("\n".join(lines), file=file, flush=True)


def _train(prepared: Prepared, rank: int) -> int:
    # Imported here: --check and mistakes need no DeepSpeed.
    from megalite.parallel.grid import Grid
    from megalite.parallel.placement import crossing_hosts
    from megalite.training.engine import build_engine
    from megalite.training.loop import Run
    from megalite.training.start import starting_point
    from megalite.training.watchdog import Watchdog

    config = prepared.config
    run_dir = Path(config.train.run_dir)
    with Watchdog(run_dir, config.train.limits) as watchdog:
        grid = Grid.build(config.parallel.pipe, config.parallel.tensor)
        if rank == 0 and (line := crossing_hosts(watchdog.hosts, grid.tensor.size)):
            print(line, file=sys.stderr, flush=True)
        start = starting_point(run_dir, config.train.load)
        if start.position.step >= config.train.steps:
            if rank == 0:
                print(f"{run_dir}: already at step {start.position.step} of {config.train.steps}", flush=True)
            return 0
        engine = build_engine(config, prepared.spec, grid)
        start.fill(engine)
        if rank == 0:
            write_durably(run_dir / "config.json", json.dumps(config.to_json(), indent=2, ensure_ascii=False) + "\n")
            print(f"{run_dir}: {start.told}", flush=True)
            _tell_memory(prepared, sys.stdout)
        return Run(config, prepared.spec, prepared.model, engine, start.position, watchdog).train()
