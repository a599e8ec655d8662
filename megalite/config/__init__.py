"""One JSON file configures a run: DeepSpeed's keys at the top level, megalite's under `"megalite"`.

`load_config` reads a file and `KEY=VALUE` overrides and checks each key; `Config.resolve` adds the world
size, applies the rules between keys and fills in every default that the result depends on; `check_model`
checks the model's sizes against the config. Nothing here imports torch or deepspeed or starts anything.

Next: `sections.py` (our keys), `deepspeed_keys.py` (DeepSpeed's), `rules.py` (the rules between keys).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from megalite.config.batch_plan import BatchPlan
from megalite.config.document import Document, ModelDims
from megalite.config.foreign import without_foreign
from megalite.config.objectives import Classified
from megalite.config.optimizer_keys import Optimizer
from megalite.config.parallel_keys import Parallel
from megalite.config.rate_rules import check_schedule, decay_steps, warmup_steps, wrong_schedule
from megalite.config.rate_schedules import (
    DEEPSPEEDS,
    OURS,
    WSD,
    Constant,
    InverseSqrt,
    Linear,
    RateSchedule,
)
from megalite.config.reading import apply_overrides, check_values, read_json
from megalite.config.rules import check_dims, check_document, data_axis_size, resolved_keys
from megalite.config.section import all_of, read, refuse
from megalite.config.sections import Data, Source, Train
from megalite.config.zero_keys import ZeroOptimization
from megalite.inputs import reading

__all__ = [
    "BatchPlan",
    "Classified",
    "Config",
    "Data",
    "ModelDims",
    "Optimizer",
    "Parallel",
    "RateSchedule",
    "Source",
    "Train",
    "ZeroOptimization",
    "check_model",
    "load_config",
    "resolved",
]


@dataclass(frozen=True)
class Config:
    """A whole configuration. `resolve` fills in values that the JSON leaves out, such as batch sizes."""

    document: Document
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Lines about values that were written for another trainer (foreign.py)."""

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Config":
        """Checks a JSON object key by key. Raises ConfigError with a line for each wrong key."""
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
        """Size of the data axis in a world of `world_size` ranks. Raises ConfigError if the grid does not fit."""
        return data_axis_size(self.parallel, world_size)

    def to_json(self) -> dict[str, Any]:
        """The whole JSON object, a valid input again: `Config.from_dict(config.to_json()) == config`."""
        return self.document.model_dump(exclude_none=True)

    @cached_property
    def deepspeed(self) -> dict[str, Any]:
        """The config for `deepspeed.initialize`: without `megalite` and our schedulers, with step totals filled in."""
        keys = self.document.model_dump(exclude_none=True, exclude={"megalite"})
        # On by default in DeepSpeed, this timer synchronizes with the device twice per micro-batch.
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
    def schedule(self) -> RateSchedule | None:
        """The schedule that megalite runs itself; None if the scheduler is DeepSpeed's, which is in `deepspeed`. Call
        `resolve` first."""
        scheduler, params = self.document.scheduler, check_schedule(self.document)
        if scheduler is None:
            return RateSchedule("constant", self.train.last_step)
        if not isinstance(params, Constant):
            return None
        warmup = warmup_steps(self.document, params, self.batch_plan)
        total = (params.total_steps if isinstance(params, Linear) else None) or self.train.last_step
        schedule = RateSchedule(scheduler.type, total, warmup, params.warmup_tokens)
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
        """An inline Hugging Face config or the folder of one, along with the labels if the model is a classifier."""
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
        """Samples per optimizer step over all ranks, after the batch ramp if there is one. Call `resolve` first."""
        return resolved(self.document.train_batch_size)

    @property
    def batch_plan(self) -> BatchPlan:
        """Samples of each optimizer step. Call `resolve` first."""
        return BatchPlan(self.train_batch_size, self.train.batch_ramp)

    @property
    def micro_batch_size(self) -> int:
        """Samples per micro-batch on one data rank. Call `resolve` first."""
        return resolved(self.document.train_micro_batch_size_per_gpu)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per step on one data rank. Call `resolve` first."""
        return resolved(self.document.gradient_accumulation_steps)

    @property
    def data_size(self) -> int:
        """Size of the data axis. Call `resolve` first."""
        return self.train_batch_size // (self.micro_batch_size * self.accumulation_steps)

    @property
    def world_size(self) -> int:
        """Ranks of the run, pipe × data × context × tensor. Call `resolve` first."""
        parallel = self.parallel
        return self.data_size * parallel.pipe * parallel.context * parallel.tensor

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """The dtype of weights and activations."""
        if self.document.fp16 is not None and self.document.fp16.enabled:
            return "fp16"
        return "bf16" if self.document.bf16 is not None and self.document.bf16.enabled else "fp32"

    @property
    def optimizer(self) -> Optimizer:
        """The section `optimizer`. Call `resolve` first: its rules require this section."""
        return resolved(self.document.optimizer)

    @property
    def zero(self) -> ZeroOptimization:
        """The section `zero_optimization`; stage 0 if it is left out."""
        return self.document.zero_optimization or ZeroOptimization.model_validate({})

    @property
    def zero_stage(self) -> int:
        """ZeRO's stage, 0 to 3."""
        return self.zero.stage

    @property
    def evaluates(self) -> bool:
        """Whether a run evaluates: on validation data, or by continuing sample prompts."""
        has_input = bool(self.data.valid or self.train.sample_prompts)
        return has_input and self.train.eval_interval > 0

    @property
    def swap_folder(self) -> str | None:
        """Folder of the files that hold master weights and moments between steps; None if they stay in memory."""
        offload = self.zero.offload_optimizer
        return offload.nvme_path if offload is not None and offload.device == "nvme" else None

    @property
    def gradient_clipping(self) -> float:
        """Maximum global norm of the gradients; 0: no clipping."""
        return self.document.gradient_clipping


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a JSON file and sets each `KEY=VALUE` in it; the result is not resolved yet.

    Raises ConfigError with one line that names the file or the key, its value and the rule.
    """
    with reading(path):
        document = apply_overrides(read_json(path), overrides)
        check_values(document)
        return Config.from_dict(document)


def check_model(config: Config, dims: ModelDims) -> None:
    """Checks the sizes of the model against the grid and the samples. Raises ConfigError with one line."""
    check_dims(config.document, dims)


Value = TypeVar("Value")


def resolved(value: Value | None) -> Value:
    """A value that `resolve` fills in if the JSON leaves it out."""
    assert value is not None, "resolve(world_size) comes first"
    return value
