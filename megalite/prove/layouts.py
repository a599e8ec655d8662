"""Layouts as a user writes them, `pipe=2,tensor=2,data=2,context=2,zero=2,schedule=zb-v`, and the config of each.

All of them train the same global batch from one JSON. Used by verify.py and benchmark.py.
"""

import copy
import math
from dataclasses import dataclass, fields
from typing import Any

from megalite.config import Config, check_model
from megalite.config.optimizer_keys import OPTIMIZERS
from megalite.config.sections import BatchRamp
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.model.parameter_groups import check_parameter_groups
from megalite.programs.schedules import SCHEDULES
from megalite.ranks.arguments import ArgumentParser, at_least

LEAST_EPSILON = 1e-4


def layouts_parser(
    name: str, description: str, layout_help: str, steps_help: str
) -> ArgumentParser:
    """A parser for programs that compare several layouts of one config."""
    parser = ArgumentParser(name, description=description)
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="FILE", help="the JSON of the run"
    )
    parser.add_argument("--layouts", nargs="+", required=True, metavar="LAYOUT", help=layout_help)
    parser.add_argument("--steps", type=at_least(1), default=5, metavar="N", help=steps_help)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="a dotted path into the JSON"
    )
    return parser


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes (expert is a part of the data axis), ZeRO stage, micro-batch size, the schedule of the pipe
    axis, its chunks per rank, and sequence parallelism. None: as in the JSON."""

    pipe: int = 1
    tensor: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    zero: int | None = None
    micro: int | None = None
    schedule: str | None = None
    chunks: int | None = None
    sequence: bool | None = None

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Parses the form above. Raises ConfigError."""
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in names or name in values:
                raise ConfigError(
                    f"--layouts: {text}: must be NAME=VALUE, each of {', '.join(names)} at most once"
                )
            values[name] = _value(name, value, text)
        return cls(**values)

    @property
    def world_size(self) -> int:
        return self.pipe * self.tensor * self.data * self.context

    @property
    def parallel(self) -> dict[str, Any]:
        """The layout's keys of `megalite.parallel`."""
        keys = ("pipe", "tensor", "context", "expert", "schedule", "chunks", "sequence")
        found = {key: value for key in keys if (value := getattr(self, key)) is not None}
        if self.pipe == 1 and self.schedule is None:
            found["schedule"] = "1f1b"  # the only one for a single rank
        if self.context == 1:
            found["context_attention"] = "gather"  # likewise
        return found

    def __str__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("context", "expert"):
            if given[name] == 1:
                del given[name]
        words = {True: "true", False: "false"}
        return ",".join(
            f"{name}={words[value] if isinstance(value, bool) else value}"
            for name, value in given.items()
            if value is not None
        )


def _value(name: str, value: str, text: str) -> Any:
    """The value of a part of a layout. Raises ConfigError."""
    if name == "schedule":
        if value not in SCHEDULES:
            raise ConfigError(f"--layouts: {text}: schedule: must be one of {', '.join(SCHEDULES)}")
        return value
    if name == "sequence":
        if value not in ("true", "false"):
            raise ConfigError(f"--layouts: {text}: sequence: must be true or false")
        return value == "true"
    good = value.isascii() and value.isdecimal() and len(value) < 10
    if not good or (name != "zero" and int(value) < 1):
        raise ConfigError(f"--layouts: {text}: {name}: must be a number, as in pipe=2,data=2")
    return int(value)


def comparable(config: Config) -> Config:
    """The config in fp32, at a constant learning rate, and with Adam's epsilon at 1e-4 or more. With a smaller epsilon,
    an element whose gradient is only rounding moves by a whole step in a random direction, which hides faults; at the
    start of a warm-up they would hide in the rounding of the weights."""
    document = copy.deepcopy(config.to_json())
    for key in ("bf16", "fp16", "communication_data_type", "scheduler"):
        document.pop(key, None)
    optimizer = document.get("optimizer", {})
    if "eps" in OPTIMIZERS.get(optimizer.get("type"), {}):
        optimizer["params"]["eps"] = max(optimizer["params"].get("eps", 0.0), LEAST_EPSILON)
    return Config.from_dict(document)


def base_batch(config: Config, first: Layout) -> int:
    """Global batch size of all layouts: the JSON's, or if it does not fix the total, that of the first layout."""
    keys = config.document
    if keys.train_batch_size is not None:
        return keys.train_batch_size
    if keys.train_micro_batch_size_per_gpu is None:
        raise ConfigError("train_batch_size: missing: give it or train_micro_batch_size_per_gpu")
    return (
        keys.train_micro_batch_size_per_gpu * (keys.gradient_accumulation_steps or 1) * first.data
    )


def config_of(config: Config, layout: Layout, batch: int, offload: bool = True) -> Config:
    """The resolved config of a layout. Raises ConfigError as a run would, and if the config gives epochs."""
    _ = config.train.last_step
    document: dict[str, Any] = copy.deepcopy(config.to_json())
    keys = config.document
    given = keys.train_micro_batch_size_per_gpu or max(
        1, batch // (keys.gradient_accumulation_steps or 1)
    )
    if batch % layout.data:
        raise ConfigError(
            f"train_batch_size: {batch}: must be a multiple of the data axis of {layout}"
        )
    document["train_batch_size"] = batch
    every = _common(batch, config.train.batch_ramp)
    document["train_micro_batch_size_per_gpu"] = layout.micro or math.gcd(
        given, max(1, every // layout.data)
    )
    document.pop("gradient_accumulation_steps", None)
    zero = document.setdefault("zero_optimization", {})
    if layout.zero is not None:
        zero["stage"] = layout.zero
    if not offload:
        zero.pop("offload_optimizer", None)
        zero.pop("offload_param", None)
        document.pop("aio", None)
    parallel = document["megalite"].setdefault("parallel", {})
    if (layout.pipe, layout.schedule) != (config.parallel.pipe, None):
        for key in ("chunks", "cut"):  # belong to another pipe axis or schedule
            parallel.pop(key, None)
    parallel.update(layout.parallel)
    resolved = Config.from_dict(document).resolve(layout.world_size)
    spec = read_spec(resolved.model)
    check_model(resolved, spec)
    check_parameter_groups(resolved, spec)
    return resolved


def common_batch(config: Config) -> int:
    """A common divisor of all global batch sizes of a resolved config, also during a ramp."""
    return _common(config.train_batch_size, config.train.batch_ramp)


def _common(batch: int, ramp: BatchRamp | None) -> int:
    return batch if ramp is None else math.gcd(batch, ramp.start, ramp.increment)


def micro_sizes(batch: int, given: int) -> list[int]:
    """Up to four micro-batch sizes for one process: `given`, then 1, half and twice of it (not more, for memory)."""
    return [
        given,
        *sorted(
            {size for size in (1, given // 2, 2 * given) if size and batch % size == 0} - {given}
        ),
    ]
