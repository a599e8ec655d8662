"""Every layout that the config's rules accept for so many ranks: what the planner searches.

`CHOICES` has an entry for each thing that a layout chooses: its key in the JSON and the values that are tried. A
new axis or lever is one more entry, and what it does to memory and time in rank_memory.py and step_time.py.
Next: search.py.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megalite.config import Config
from megalite.config.batches import BatchPlan
from megalite.config.deepspeed_keys import ZeroOptimization
from megalite.config.optimizer_rules import check_precision, check_zero
from megalite.config.parallel_keys import Parallel
from megalite.config.pipe_rules import check_micro_batches, check_schedule_of_pipe
from megalite.config.rules import check_layout
from megalite.errors import ConfigError
from megalite.model.spec import TransformerSpec
from megalite.pipeline.schedules import SCHEDULES

MOST_CHUNKS = 8  # chunks a rank that are tried: more send more messages than they save
MOST_MICRO = 64  # samples of a micro-batch that are tried


@dataclass(frozen=True)
class Candidate:
    """A layout. recompute: `megalite.train.activation_checkpointing`; offload: the optimizer's device."""

    pipe: int = 1
    tensor: int = 1
    zero: int = 1
    micro: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: str = "none"
    sequence: bool = False
    offload: str = "none"

    @property
    def keys(self) -> dict[str, Any]:
        """Dotted keys of the JSON with their values; those of a default are there too."""
        return {choice.key: choice.written(self) for choice in CHOICES}

    def __str__(self) -> str:
        words = [f"pipe {self.pipe}", f"tensor {self.tensor}", f"ZeRO-{self.zero}"]
        words += [f"micro {self.micro}"]
        if self.pipe > 1:
            words.append(self.schedule + (f" {self.chunks}" * (self.schedule == "interleaved")))
        words += [f"recompute {self.recompute}"] * (self.recompute != "none")
        words += ["sequence"] * self.sequence
        words += ["offload"] * (self.offload != "none")
        return ", ".join(words)


@dataclass(frozen=True)
class Search:
    """What is searched: a config that is not resolved yet, its model, and the ranks."""

    config: Config
    spec: TransformerSpec
    world_size: int
    batch: int
    """Samples of the global batch, the same for all layouts."""

    @property
    def unit(self) -> int:
        """What every global batch is a multiple of, during a ramp too."""
        ramp = self.config.train.batch_ramp
        return self.batch if ramp is None else math.gcd(self.batch, ramp.start, ramp.increment)

    def data(self, candidate: Candidate) -> int:
        """Ranks of the data axis."""
        return self.world_size // (candidate.pipe * candidate.tensor)


@dataclass(frozen=True)
class Choice:
    """field: of Candidate; key: of the JSON; values: that are tried beside what is chosen before; written: the value in
    the JSON."""

    field: str
    key: str
    values: Callable[[Search, Candidate], Iterator[Any] | list[Any]]
    write: Callable[[Candidate], Any] | None = None

    def written(self, candidate: Candidate) -> Any:
        return self.write(candidate) if self.write else getattr(candidate, self.field)


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _pipes(search: Search, chosen: Candidate) -> list[int]:
    return [n for n in divisors(search.world_size) if n <= search.spec.num_layers + 1]


def _tensors(search: Search, chosen: Candidate) -> list[int]:
    return divisors(search.world_size // chosen.pipe)


def _chunks(search: Search, chosen: Candidate) -> list[int]:
    if chosen.schedule == "interleaved":
        return list(range(2, min(MOST_CHUNKS, search.spec.num_layers // chosen.pipe) + 1))
    return [2 if chosen.schedule == "zb-v" else 1]


def _micros(search: Search, chosen: Candidate) -> list[int]:
    share, rest = divmod(search.unit, search.data(chosen))
    return [] if rest else [n for n in divisors(share) if n <= MOST_MICRO]


def _recomputes(search: Search, chosen: Candidate) -> list[str]:
    given = str(search.config.train.activation_checkpointing)
    return list(dict.fromkeys(("none", "selective", "full", given)))


def _offloads(search: Search, chosen: Candidate) -> list[str]:
    zero = search.config.document.zero_optimization
    given = zero and zero.offload_optimizer and zero.offload_optimizer.device
    devices = ["none", "cpu"] + ["nvme"] * (given == "nvme")
    return [device for device in devices if device == "none" or chosen.zero > 0]


PARALLEL = "megalite.parallel"
CHOICES = (
    Choice("pipe", f"{PARALLEL}.pipe", _pipes),
    Choice("tensor", f"{PARALLEL}.tensor", _tensors),
    Choice(
        "sequence",
        f"{PARALLEL}.sequence",
        lambda search, chosen: [False, True] if chosen.tensor > 1 else [False],
    ),
    Choice(
        "schedule",
        f"{PARALLEL}.schedule",
        lambda search, chosen: list(SCHEDULES) if chosen.pipe > 1 else ["1f1b"],
    ),
    Choice(
        "chunks",
        f"{PARALLEL}.chunks",
        _chunks,
        lambda chosen: chosen.chunks if chosen.schedule == "interleaved" else None,
    ),
    Choice("zero", "zero_optimization.stage", lambda search, chosen: [0, 1, 2, 3]),
    Choice("offload", "zero_optimization.offload_optimizer.device", _offloads),
    Choice("micro", "train_micro_batch_size_per_gpu", _micros),
    Choice(
        "recompute",
        "megalite.train.activation_checkpointing",
        _recomputes,
        lambda chosen: int(chosen.recompute) if chosen.recompute.isdigit() else chosen.recompute,
    ),
)


def candidates(search: Search) -> Iterator[Candidate]:
    """All of them; a choice that a rule refuses is left at once, with all that would follow."""
    rules = _Rules(search)

    def chosen_from(number: int, chosen: Candidate) -> Iterator[Candidate]:
        if number == len(CHOICES):
            yield chosen
            return
        choice = CHOICES[number]
        for value in choice.values(search, chosen):
            more = replace(chosen, **{choice.field: value})
            if rules.accept(choice.field, more):
                yield from chosen_from(number + 1, more)

    yield from chosen_from(0, Candidate())


class _Rules:
    """The config's own rules (config/), each asked as soon as what it needs is chosen."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def accept(self, field: str, chosen: Candidate) -> bool:
        """Whether the rules accept what is chosen so far, `field` last."""
        asked = getattr(self, f"_{field}", None)
        if asked is None:
            return True
        try:
            asked(chosen)
        except ConfigError:
            return False
        return True

    def _parallel(self, chosen: Candidate) -> Parallel:
        chunks = chosen.chunks if chosen.schedule == "interleaved" else None
        return Parallel(
            tensor=chosen.tensor,
            pipe=chosen.pipe,
            schedule=chosen.schedule,  # type: ignore[arg-type]
            chunks=chunks,
            sequence=chosen.sequence,
        )

    def _tensor(self, chosen: Candidate) -> None:
        check_layout(self._parallel(chosen), self.search.spec)

    def _sequence(self, chosen: Candidate) -> None:
        if chosen.sequence and self.search.config.data.sequence_length % chosen.tensor:
            raise ConfigError(f"{PARALLEL}.sequence")

    def _chunks(self, chosen: Candidate) -> None:
        parallel = self._parallel(chosen)
        check_schedule_of_pipe(parallel)
        check_layout(parallel, self.search.spec)

    def _offload(self, chosen: Candidate) -> None:
        given = {"stage": chosen.zero, "offload_optimizer": {"device": chosen.offload}}
        zero = ZeroOptimization.model_validate(given)
        check_zero(zero, self._parallel(chosen))
        document = self.search.config.document.model_copy(update={"zero_optimization": zero})
        check_precision(document)

    def _micro(self, chosen: Candidate) -> None:
        plan = BatchPlan(self.search.batch, self.search.config.train.batch_ramp)
        if chosen.schedule == "interleaved":
            parallel = self._parallel(chosen)
            check_micro_batches(parallel, plan, chosen.micro, self.search.data(chosen))


def config_of(search: Search, candidate: Candidate) -> Config:
    """The resolved config of a layout. Raises ConfigError where a rule refuses it."""
    document: dict[str, Any] = copy.deepcopy(search.config.to_json())
    document.setdefault("megalite", {}).setdefault("parallel", {}).pop("cut", None)
    document.pop("gradient_accumulation_steps", None)
    document["train_batch_size"] = search.batch
    if candidate.offload == "none":
        zero = document.get("zero_optimization", {})
        for key in ("offload_optimizer", "offload_param"):
            zero.pop(key, None)
        document.pop("aio", None)
    for key, value in candidate.keys.items():
        *path, last = key.split(".")
        node = document
        for part in path:
            node = node.setdefault(part, {})
        if value is None or (key.endswith("offload_optimizer.device") and value == "none"):
            node.pop(last, None)
        else:
            node[last] = value
    zero = document["zero_optimization"]
    if not zero.get("offload_optimizer"):
        zero.pop("offload_optimizer", None)
    if candidate.zero < 3:
        zero.pop("offload_param", None)
    return Config.from_dict(document).resolve(search.world_size)


def given_candidate(config: Config) -> Candidate:
    """The layout of a resolved config."""
    parallel, zero = config.parallel, config.document.zero_optimization
    offload = zero.offload_optimizer.device if zero and zero.offload_optimizer else "none"
    return Candidate(
        pipe=parallel.pipe,
        tensor=parallel.tensor,
        zero=config.zero_stage,
        micro=config.micro_batch_size,
        schedule=parallel.schedule,
        chunks=parallel.chunks_a_rank,
        recompute=str(config.train.activation_checkpointing),
        sequence=parallel.sequence and parallel.tensor > 1,
        offload=offload,
    )
