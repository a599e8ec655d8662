"""Every layout that the config's rules accept for a number of ranks: the planner's search space.

`CHOICES` has an entry for each thing that a layout chooses: its key in the JSON and the values that are tried. A
new axis or option is one more entry, plus its effect on memory and time in rank_memory.py, work.py, sharing.py and
bounds.py. Next: least_time.py.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from megalite.config import Config
from megalite.config.batch_plan import BatchPlan
from megalite.config.context_rules import check_context_length
from megalite.config.data_rules import check_classifier
from megalite.config.document import Document
from megalite.config.expert_rules import check_expert_axis, check_zero_of_experts
from megalite.config.optimizer_rules import check_precision, check_zero
from megalite.config.parallel_keys import Parallel
from megalite.config.pipe_rules import check_micro_batches, check_schedule_of_pipe
from megalite.config.rules import check_dims, check_layout
from megalite.config.zero_keys import ZeroOptimization
from megalite.errors import ConfigError
from megalite.model.spec import TransformerSpec
from megalite.programs.schedules import SCHEDULES

MOST_CHUNKS = 8  # chunks per rank that are tried: more cost more in messages than they save
MOST_MICRO = 64  # largest micro-batch that is tried, in samples


class Candidate(NamedTuple):
    """A layout. attention: `megalite.parallel.context_attention`; recompute: `megalite.train.activation_checkpointing`;
    offload: the optimizer's device."""

    pipe: int = 1
    tensor: int = 1
    zero: int = 1
    micro: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: str = "none"
    sequence: bool = False
    offload: str = "none"
    context: int = 1
    attention: str = "gather"
    expert: int = 1

    @property
    def asked_chunks(self) -> int | None:
        """The chunks per rank, if the schedule lets the user choose them."""
        return self.chunks if SCHEDULES[self.schedule].chunks is None else None

    @property
    def keys(self) -> dict[str, Any]:
        """Dotted keys of the JSON with their values, defaults included."""
        return {choice.key: choice.written(self) for choice in CHOICES}

    def __str__(self) -> str:
        words = [f"pipe {self.pipe}", f"tensor {self.tensor}"]
        if self.context > 1:
            words.append(f"context {self.context}" + " by heads" * (self.attention == "heads"))
        words += [f"expert {self.expert}"] * (self.expert > 1)
        words.append(f"ZeRO-{self.zero}")
        words += [f"micro {self.micro}"]
        if self.pipe > 1:
            words.append(self.schedule + (f" {self.chunks}" * (self.asked_chunks is not None)))
        words += [f"recompute {self.recompute}"] * (self.recompute != "none")
        words += ["sequence"] * self.sequence
        words += ["offload"] * (self.offload != "none")
        return ", ".join(words)


PLAIN = Candidate()


@dataclass(frozen=True)
class Search:
    """The input of a search: a config that is not resolved yet, its model, and the number of ranks."""

    config: Config
    spec: TransformerSpec
    world_size: int
    batch: int
    """Samples of the global batch, the same for all layouts."""

    @property
    def unit(self) -> int:
        """A divisor of every global batch, also during a batch ramp."""
        ramp = self.config.train.batch_ramp
        return self.batch if ramp is None else math.gcd(self.batch, ramp.start, ramp.increment)

    def data(self, candidate: Candidate) -> int:
        """Ranks of the data axis."""
        return self.world_size // (candidate.pipe * candidate.tensor * candidate.context)


@dataclass(frozen=True)
class Choice:
    """field: of Candidate. key: of the JSON. values: those tried, given the choices so far. write: the value in the
    JSON, if it is not the field's."""

    field: str
    key: str
    values: Callable[[Search, Candidate], Iterator[Any] | list[Any]]
    write: Callable[[Candidate], Any] | None = None

    def written(self, candidate: Candidate) -> Any:
        return self.write(candidate) if self.write else getattr(candidate, self.field)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _pipes(search: Search, chosen: Candidate) -> list[int]:
    return [n for n in divisors(search.world_size) if n <= search.spec.num_layers + 1]


def _tensors(search: Search, chosen: Candidate) -> list[int]:
    return divisors(search.world_size // chosen.pipe)


def _contexts(search: Search, chosen: Candidate) -> list[int]:
    return divisors(search.world_size // (chosen.pipe * chosen.tensor))


def _attentions(search: Search, chosen: Candidate) -> list[str]:
    return ["gather", "heads"] if chosen.context > 1 else ["gather"]


def _experts(search: Search, chosen: Candidate) -> list[int]:
    return (
        divisors(math.gcd(search.data(chosen), search.spec.experts)) if search.spec.experts else [1]
    )


def _chunks(search: Search, chosen: Candidate) -> list[int]:
    fixed = SCHEDULES[chosen.schedule].chunks
    if fixed is not None:
        return [fixed]
    return list(range(2, min(MOST_CHUNKS, search.spec.num_layers // chosen.pipe) + 1))


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
    Choice("context", f"{PARALLEL}.context", _contexts),
    Choice("attention", f"{PARALLEL}.context_attention", _attentions),
    Choice("expert", f"{PARALLEL}.expert", _experts),
    Choice(
        "sequence",
        f"{PARALLEL}.sequence",
        lambda search, chosen: [False, True] if chosen.tensor > 1 else [False],
    ),
    Choice("micro", "train_micro_batch_size_per_gpu", _micros),
    Choice(
        "recompute",
        "megalite.train.activation_checkpointing",
        _recomputes,
        lambda chosen: int(chosen.recompute) if chosen.recompute.isdigit() else chosen.recompute,
    ),
    Choice("zero", "zero_optimization.stage", lambda search, chosen: [0, 1, 2, 3]),
    Choice("offload", "zero_optimization.offload_optimizer.device", _offloads),
    Choice(
        "schedule",
        f"{PARALLEL}.schedule",
        lambda search, chosen: list(SCHEDULES) if chosen.pipe > 1 else ["1f1b"],
    ),
    Choice(
        "chunks",
        f"{PARALLEL}.chunks",
        _chunks,
        lambda chosen: chosen.asked_chunks,
    ),
)

GRID = ("pipe", "tensor", "context", "attention", "expert", "sequence")
STATES = ("zero", "offload")
ORDER = ("schedule", "chunks")
"""Fields that the search chooses together."""


def candidates(search: Search) -> Iterator[Candidate]:
    """All accepted layouts. A choice that a rule refuses is dropped at once, with all layouts that contain it."""
    return Choices(search).of([choice.field for choice in CHOICES])


def how_many(search: Search) -> int:
    """The number of accepted layouts, as products of the numbers of independent choices."""
    choices, found = Choices(search), 0
    for grid in choices.of(GRID):
        recomputes, states = (
            sum(1 for _ in choices.of(fields, grid)) for fields in (("recompute",), STATES)
        )
        for sized in choices.of(("micro",), grid):
            found += recomputes * states * len(choices.orders(sized))
    return found


class Choices:
    """Applies the config's own rules (config/): each as soon as what it depends on is chosen, and once per such
    choice."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self._by_field = {choice.field: choice for choice in CHOICES}
        self._asked: dict[tuple[Any, ...], bool] = {}
        self._orders: dict[tuple[Any, ...], list[tuple[str, int]]] = {}

    def orders(self, chosen: Candidate) -> list[tuple[str, int]]:
        """Accepted values of ORDER, computed once for all layouts with the same axes and micro-batch."""
        key = chosen.pipe, chosen.tensor, chosen.context, chosen.micro
        if key not in self._orders:
            found = self.of(ORDER, chosen)
            self._orders[key] = [(one.schedule, one.chunks) for one in found]
        return self._orders[key]

    def of(self, fields: Sequence[str], chosen: Candidate = PLAIN) -> Iterator[Candidate]:
        """`chosen` with every accepted combination of values of `fields`."""
        if not fields:
            yield chosen
            return
        field, *others = fields
        for value in self._by_field[field].values(self.search, chosen):
            more = chosen._replace(**{field: value})
            if self._accept(field, more):
                yield from self.of(others, more)

    def _accept(self, field: str, chosen: Candidate) -> bool:
        """Whether the rules accept the choices so far, of which `field` is the last."""
        if field not in DEPENDS:
            return True
        key = field, _DEPENDS[field](chosen)
        if key not in self._asked:
            try:
                getattr(self, f"_{field}")(chosen)
                self._asked[key] = True
            except ConfigError:
                self._asked[key] = False
        return self._asked[key]

    def _parallel(self, chosen: Candidate) -> Parallel:
        return Parallel(
            tensor=chosen.tensor,
            pipe=chosen.pipe,
            context=chosen.context,
            context_attention=chosen.attention,  # type: ignore[arg-type]
            expert=chosen.expert,
            schedule=chosen.schedule,
            chunks=chosen.asked_chunks,
            sequence=chosen.sequence,
        )

    def _document(self, chosen: Candidate, **changes: Any) -> Document:
        document = self.search.config.document
        megalite = document.megalite.model_copy(update={"parallel": self._parallel(chosen)})
        return document.model_copy(update={"megalite": megalite, **changes})

    def _tensor(self, chosen: Candidate) -> None:
        check_layout(self._parallel(chosen), self.search.spec)

    def _context(self, chosen: Candidate) -> None:
        check_context_length(self._parallel(chosen), self.search.config.data.sequence_length)

    def _attention(self, chosen: Candidate) -> None:
        check_layout(self._parallel(chosen), self.search.spec)

    def _expert(self, chosen: Candidate) -> None:
        check_expert_axis(self._parallel(chosen), self.search.data(chosen))

    def _sequence(self, chosen: Candidate) -> None:
        document = self._document(chosen)
        check_dims(document, self.search.spec)
        check_classifier(document.megalite)

    def _offload(self, chosen: Candidate) -> None:
        zero = ZeroOptimization.model_validate(zero_keys(self.search, chosen))
        document = self._document(chosen, zero_optimization=zero)
        check_zero(zero, document.megalite.parallel)
        check_precision(document)
        check_zero_of_experts(document)

    def _chunks(self, chosen: Candidate) -> None:
        parallel = self._parallel(chosen)
        check_schedule_of_pipe(parallel)
        check_layout(parallel, self.search.spec)
        plan = BatchPlan(self.search.batch, self.search.config.train.batch_ramp)
        check_micro_batches(parallel, plan, chosen.micro, self.search.data(chosen))


DEPENDS = {
    "tensor": GRID,
    "context": GRID,
    "attention": GRID,
    "expert": GRID,
    "sequence": GRID,
    "offload": ("zero", "offload", "pipe", "expert"),
    "chunks": ("schedule", "chunks", "pipe", "tensor", "context", "micro"),
}
"""The fields that the rules of a choice depend on."""
_DEPENDS = {field: attrgetter(*names) for field, names in DEPENDS.items()}


def zero_keys(search: Search, candidate: Candidate) -> dict[str, Any]:
    """The `zero_optimization` section of a layout: the config's own with the layout's stage and offload device."""
    given = search.config.document.zero_optimization
    keys = {} if given is None else given.model_dump(exclude_none=True)
    offload = keys.pop("offload_optimizer", {})
    keys["stage"] = candidate.zero
    if candidate.offload == "none" or candidate.zero < 3:
        keys.pop("offload_param", None)
    if candidate.offload != "none":
        own = offload.get("device") == candidate.offload
        keys["offload_optimizer"] = offload if own else {"device": candidate.offload}
    return keys


def config_of(search: Search, candidate: Candidate) -> Config:
    """The resolved config of a layout. Raises ConfigError if a rule refuses it."""
    document: dict[str, Any] = copy.deepcopy(search.config.to_json())
    document.setdefault("megalite", {}).setdefault("parallel", {}).pop("cut", None)
    document.pop("gradient_accumulation_steps", None)
    document["train_batch_size"] = search.batch
    document["zero_optimization"] = zero_keys(search, candidate)
    if candidate.offload != "nvme":
        document.pop("aio", None)
    for key, value in candidate.keys.items():
        *path, last = key.split(".")
        if path[:1] == ["zero_optimization"]:
            continue
        node = document
        for part in path:
            node = node.setdefault(part, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
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
        context=parallel.context,
        attention=parallel.context_attention,
        expert=parallel.expert,
    )
