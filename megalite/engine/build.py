"""Builds a DeepSpeed engine around this rank's stage from a resolved config: the only place that starts DeepSpeed.

The settings that the engine really uses are read back and compared with the config. Next: loop.py.
"""

import copy
import shutil
import weakref
from dataclasses import replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig

from megalite.config import Config
from megalite.data.position import Position
from megalite.engine.engine import Engine
from megalite.engine.initial import make_shards, make_whole
from megalite.engine.nvme import load_op, make_swap_folder
from megalite.engine.router_bias import RouterBias
from megalite.errors import ConfigError
from megalite.model.compiled import compile_pieces
from megalite.model.parameter_groups import LR_RATIO, learning_rate_factor, parameter_groups
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import zero_buffers
from megalite.pipeline.actions import Pipeline
from megalite.pipeline.pipeline_plan import plan_of
from megalite.plan.states import DTYPES, recompute_of, routed_spec
from megalite.ranks.launch import quiet


def build_stage(config: Config, spec: TransformerSpec, grid: Grid) -> Stage:
    """This rank's stage with freshly initialised weights, in fp32 on the CPU."""
    return _empty_stage(config, spec, grid).initialise(config.train.seed)


def _empty_stage(config: Config, spec: TransformerSpec, grid: Grid) -> Stage:
    init = config.train.init
    spec = replace(
        routed_spec(config, spec),
        init_std=init.std or spec.init_std,
        fan_in_init=spec.fan_in_init and init.std is None,
        embedding_init_std=init.embedding_std,
        depth_scaled_init=spec.depth_scaled_init
        if init.depth_scaled is None
        else init.depth_scaled,
    )
    cut = plan_of(config, spec).cut
    return Stage(
        spec,
        grid,
        cut,
        recompute_of(config),
        config.parallel.sequence,
        config.train.z_loss,
        overlaps=config.zero_stage != 3,
    )


def build_engine(
    config: Config, spec: TransformerSpec, grid: Grid, draws_weights: bool = True
) -> Engine:
    """An engine with freshly initialised weights (collective over the world). draws_weights: False if they will come
    from a checkpoint: the matrices are then 0.

    Raises ConfigError if DeepSpeed runs with another value than the config's.
    """
    with torch.device("meta"):
        stage = _empty_stage(config, spec, grid).mark()
    decay = config.optimizer.params.weight_decay
    groups = parameter_groups(stage, decay, config.train.parameter_groups)
    keys, folder = copy.deepcopy(config.deepspeed), make_swap_folder(config)
    if folder is not None:
        load_op()
        keys["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(folder)
    accelerator: Any = get_accelerator()
    dtype, device = DTYPES[config.precision], torch.device(accelerator.current_device_name())
    seed = config.train.seed if draws_weights else None
    zero_buffers(stage, device)
    compile_pieces(config.train.compile)
    with quiet():
        if config.zero_stage == 3:
            make_shards(stage, grid, keys, dtype, device, seed)
        else:
            make_whole(stage, grid, dtype, device, seed)
        engine = Engine(
            stage,
            grid,
            args=None,
            model_parameters=groups,
            config=keys,
            config_class=DeepSpeedConfig(keys, grid),
        )
    if folder is not None:
        weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
    if spec.mixture is not None:
        device, router = torch.device(engine.device or "cpu"), config.train.router
        rate = router.step_of_bias if router is not None else 0.0
        engine.router_bias = RouterBias(stage, grid, device, rate)
    compare_with_asked(engine, config)
    return engine


def build_pipeline(engine: Engine, config: Config, spec: TransformerSpec) -> Pipeline:
    """The schedule of a step over this rank's engine."""
    stage: Any = engine.module
    shape = stage.hidden_shape(config.micro_batch_size, config.data.sequence_length)
    return Pipeline(
        engine, engine.grid.pipe, plan_of(config, spec), shape, DTYPES[config.precision]
    )


def compare_with_asked(engine: Any, config: Config) -> None:
    """Compares the engine's settings with the config. Raises ConfigError for the first difference."""
    accumulation = torch.float32
    model_dtype, gradient_dtype = engine.get_data_types()
    lr = engine.basic_optimizer.param_groups[0]["lr"]
    facts = [
        ("gradient_clipping", engine._config.gradient_clipping, config.gradient_clipping),
        ("train_batch_size", engine.train_batch_size(), config.train_batch_size),
        (
            "train_micro_batch_size_per_gpu",
            engine.train_micro_batch_size_per_gpu(),
            config.micro_batch_size,
        ),
        (
            "gradient_accumulation_steps",
            engine.gradient_accumulation_steps(),
            config.accumulation_steps,
        ),
        ("zero_optimization.stage", engine.zero_optimization_stage(), config.zero_stage),
        ("bf16.enabled and fp16.enabled", model_dtype, DTYPES[config.precision]),
        ("data_types.grad_accum_dtype", gradient_dtype, accumulation),
    ]
    if config.schedule is not None:
        facts.append(("optimizer.params.lr", lr, config.optimizer.params.lr))
    for key, used, asked in facts:
        if used != asked:
            raise ConfigError(f"{key}: {asked}: DeepSpeed runs with {used}: must be equal")


class LearningRate:
    """The learning rate of each step: megalite's schedule as a function of the position, or DeepSpeed's scheduler. The
    rate of a parameter group is a multiple of it."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self.engine, self.schedule = engine, config.schedule
        self.plan, self.length = config.batch_plan, config.data.sequence_length
        self.highest = config.optimizer.params.lr
        basic: Any = engine.basic_optimizer
        moved = ("lr", "betas")  # DeepSpeed's schedulers change these
        self.first = [
            {name: group[name] for name in moved if name in group} for group in basic.param_groups
        ]

    def start_at(self, step: int) -> None:
        """Sets DeepSpeed's scheduler, if there is one, to its state after `step` steps."""
        scheduler: Any = self.engine.lr_scheduler
        if self.schedule is None and scheduler.last_batch_iteration != step - 1:
            if step > 0:
                scheduler.step(step - 1)
            else:  # rewound to the start
                scheduler.last_batch_iteration = -1
                for group, first in zip(scheduler.optimizer.param_groups, self.first, strict=True):
                    group.update(first)

    def set(self, position: Position) -> float:
        """Sets and returns the learning rate of the optimizer step that starts at a position."""
        groups = self.engine.optimizer.param_groups  # type: ignore[union-attr]
        if self.schedule is None:
            return groups[0]["lr"]
        step_tokens = self.plan.size(position.consumed_samples) * self.length
        factor = learning_rate_factor(
            self.schedule, position.step, position.consumed_tokens, step_tokens
        )
        rate = self.highest * factor
        for group in groups:
            group["lr"] = rate * group[LR_RATIO]
        return rate
