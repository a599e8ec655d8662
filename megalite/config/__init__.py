"""One JSON says what a run is: DeepSpeed's keys at the top, megalite's under `"megalite"`.

`load_config` reads a file and `KEY=VALUE` overrides and checks each key; `Config.resolve` adds the world
size, applies the rules between keys and writes every default that the result depends on; `check_model`
compares the model's sizes with the rest. Nothing here imports torch or deepspeed or starts anything.

Read on in `sections.py` (our keys), `deepspeed_keys.py` (DeepSpeed's), `rules.py` (what ties them).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from megalite.config.batches import BatchPlan
from megalite.config.deepspeed_keys import Optimizer, ZeroOptimization
from megalite.config.document import Document, ModelDims
from megalite.config.foreign import without_foreign
from megalite.config.objectives import Classified
from megalite.config.parallel_keys import Parallel
from megalite.config.rate_rules import check_schedule, decay_steps, warmup_steps, wrong_schedule
from megalite.config.reading import apply_overrides, check_values, read_json
from megalite.config.rules import check_dims, check_document, data_axis_size, resolved_keys
from megalite.config.schedules import DEEPSPEEDS, OURS, WSD, Constant, InverseSqrt, Linear, Schedule
from megalite.config.section import all_of, read, refuse
from megalite.config.sections import Data, Source, Train
from megalite.inputs import reading

__all__ = [
    "BatchPlan",
    "Classified",
    "Config",
    "Data",
    "ModelDims",
    "Optimizer",
    "Parallel",
    "Schedule",
    "Source",
    "Train",
    "ZeroOptimization",
    "check_model",
    "load_config",
    "resolved",
]


@dataclass(frozen=True)
class Config:
    """A whole configuration. `resolve` fills in what the JSON leaves out, such as the batch sizes."""

    document: Document
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Lines about values that were made for another trainer (foreign.py)."""

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Config":
        """Check a JSON object key by key. Raises ConfigError with a line for each that is wrong."""
        value, notes = without_foreign(Document, value)
        document, wrong = read(Document, value)
        refuse(wrong | wrong_schedule(value), value)
        assert document is not None
        check_schedule(document)
        return cls(document, tuple(notes))

    def resolve(self, world_size: int) -> "Config":
        """This config with every default filled in for a run of `world_size` ranks.

        Raises ConfigError with a line for each rule that is broken.
        """
        all_of(lambda: check_document(self.document), lambda: self.data_axis_size(world_size))
        resolved = Config.from_dict(resolved_keys(self.document, self.data_axis_size(world_size)))
        return replace(resolved, notes=self.notes)

    def data_axis_size(self, world_size: int) -> int:
        """Ranks of the data axis of `world_size` ranks. Raises ConfigError where the grid does not fit."""
        return data_axis_size(self.parallel, world_size)

    def to_json(self) -> dict[str, Any]:
        """The whole JSON, itself a valid input: `Config.from_dict(config.to_json()) == config`."""
        return self.document.model_dump(exclude_none=True)

    @cached_property
    def deepspeed(self) -> dict[str, Any]:
        """What `deepspeed.initialize` takes: no `megalite`, no scheduler of ours, totals of steps filled in."""
        keys = self.document.model_dump(exclude_none=True, exclude={"megalite"})
        # Left out, it is on, and waits for the device twice a micro-batch.
        keys.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
        scheduler = keys.get("scheduler", {})
        if scheduler.get("type") in OURS:
            del keys["scheduler"]
        elif scheduler.get("type") in DEEPSPEEDS:
            params, optimizer = scheduler["params"], self.document.optimizer
            fields = DEEPSPEEDS[scheduler["type"]].model_fields
            left_out = [name for name in fields if params.get(name) is None]
            if "total_num_steps" in left_out:
                params["total_num_steps"] = self.train.last_step
            if "warmup_max_lr" in left_out and optimizer is not None:
                params["warmup_max_lr"] = optimizer.params.lr
        return keys

    @property
    def schedule(self) -> Schedule | None:
        """The schedule that megalite runs itself; None where DeepSpeed's `scheduler` is in `deepspeed`; after
        `resolve`."""
        scheduler, params = self.document.scheduler, check_schedule(self.document)
        if scheduler is None:
            return Schedule("constant", self.train.last_step)
        if not isinstance(params, Constant):
            return None
        warmup = warmup_steps(self.document, params, self.batch_plan)
        total = (params.total_steps if isinstance(params, Linear) else None) or self.train.last_step
        schedule = Schedule(scheduler.type, total, warmup, params.warmup_tokens)
        match params:
            case WSD():
                steps, shape = decay_steps(params, total), params.decay_shape
                schedule = replace(schedule, decay_steps=steps, decay_shape=shape)
            case InverseSqrt():
                schedule = replace(schedule, timescale_steps=params.timescale_steps or warmup)
        if isinstance(params, Linear | InverseSqrt):
            schedule = replace(schedule, min_ratio=params.min_ratio)
        return schedule

    @property
    def model(self) -> dict[str, Any] | str | Classified:
        """An inline Hugging Face config, or the folder of one; with the labels where it is to be a classifier."""
        section = self.document.megalite.model
        return Classified(section, self.data.classes) if self.data.classes else section

    @property
    def parallel(self) -> Parallel:
        """The section `megalite.parallel`."""
        return self.document.megalite.parallel

    @property
    def data(self) -> Data:
        """The section `megalite.data`."""
        return self.document.megalite.data

    @property
    def train(self) -> Train:
        """The section `megalite.train`."""
        return self.document.megalite.train

    @property
    def train_batch_size(self) -> int:
        """Samples of an optimizer step, over all ranks, once a ramp is over; after `resolve`."""
        return resolved(self.document.train_batch_size)

    @property
    def batch_plan(self) -> BatchPlan:
        """Samples of each optimizer step; after `resolve`."""
        return BatchPlan(self.train_batch_size, self.train.batch_ramp)

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch on one data rank; after `resolve`."""
        return resolved(self.document.train_micro_batch_size_per_gpu)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a step on one data rank; after `resolve`."""
        return resolved(self.document.gradient_accumulation_steps)

    @property
    def data_size(self) -> int:
        """Ranks of the data axis; after `resolve`."""
        return self.train_batch_size // (self.micro_batch_size * self.accumulation_steps)

    @property
    def world_size(self) -> int:
        """Ranks of the run, pipe × data × context × tensor; after `resolve`."""
        parallel = self.parallel
        return self.data_size * parallel.pipe * parallel.context * parallel.tensor

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """The type of weights and activations."""
        if self.document.fp16 is not None and self.document.fp16.enabled:
            return "fp16"
        return "bf16" if self.document.bf16 is not None and self.document.bf16.enabled else "fp32"

    @property
    def optimizer(self) -> Optimizer:
        """The section `optimizer`; after `resolve`, whose rules ask for one."""
        return resolved(self.document.optimizer)

    @property
    def zero(self) -> ZeroOptimization:
        """The section `zero_optimization`; left out: stage 0."""
        return self.document.zero_optimization or ZeroOptimization.model_validate({})

    @property
    def zero_stage(self) -> int:
        """ZeRO's stage, 0 to 3."""
        return self.zero.stage

    @property
    def evaluates(self) -> bool:
        """Whether a run makes evaluations: of validation data, or of prompts that are continued."""
        shown = bool(self.data.valid or self.train.sample_prompts)
        return shown and self.train.eval_interval > 0

    @property
    def swap_folder(self) -> str | None:
        """Where masters and moments lie in files between steps; None where they stay in memory."""
        offload = self.zero.offload_optimizer
        return offload.nvme_path if offload is not None and offload.device == "nvme" else None

    @property
    def gradient_clipping(self) -> float:
        """Highest global norm of the gradients; 0: no clipping."""
        return self.document.gradient_clipping


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON file and set each `KEY=VALUE` in it; not resolved yet.

    Raises ConfigError with one line that names the file or the key, its value and the rule.
    """
    with reading(path):
        document = apply_overrides(read_json(path), overrides)
        check_values(document)
        return Config.from_dict(document)


def check_model(config: Config, dims: ModelDims) -> None:
    """Compare the sizes of the model with the grid and the samples. Raises ConfigError with one line."""
    check_dims(config.document, dims)


Value = TypeVar("Value")


def resolved(value: Value | None) -> Value:
    """What `resolve` fills in where the JSON leaves it out."""
    assert value is not None, "resolve(world_size) comes first"
    return value
