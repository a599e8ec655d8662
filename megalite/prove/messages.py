"""A dry run's third level: one real training step of every rank, one after another in this process, over fake process
groups; every collective and message is recorded and matched across ranks.

The engine, DeepSpeed's optimizer and the pipeline are the real ones; the model is shrunk to a layer or two per chunk,
the tensor, context and data axes to two ranks each, an expert axis to two, with two copies of each expert if there are
several. Fake groups do not transfer data, but some is needed: objects at the start, and the numbers of rows for each
other's experts. So there are two passes: the first records what each rank sends, the second receives it and is the one
that is matched. The rows themselves arrive as zeros.

It finds: ranks of a group whose collectives differ in kind, dtype, size or order; messages without their other end or
with another size; unexpected numbers of rows for another rank's experts; collectives of several groups in an order that
deadlocks.
"""

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalite.config import Config
from megalite.config.objectives import Pairs
from megalite.engine.build import LearningRate, build_engine, build_pipeline
from megalite.engine.over_fakes import deepspeed_over_fakes
from megalite.model.context import Context
from megalite.model.dropout import Randomness
from megalite.model.families import model_dict, read_spec
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.parallel.loss import IGNORED
from megalite.pipeline.actions import Pipeline
from megalite.plan.dry_run import DryRunError, fake_world
from megalite.programs.schedules import SCHEDULES
from megalite.training.batches import MicroBatch, rows_of
from megalite.training.step import train_step

HEAD = 8
Plant = Callable[[int, Pipeline], Any]
"""Plants a fault in a rank, for tests: called with its number before its step."""


@dataclass(frozen=True)
class Call:
    """A collective of a group, or one end of a message. peer: the other end's global rank. given, taken: for an uneven
    all-to-all, the numbers of rows sent to and received from each rank, in the order of the group."""

    kind: str
    group: str
    what: str
    peer: int | None = None
    given: tuple[int, ...] = field(default=(), compare=False)
    taken: tuple[int, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.kind} of {self.what}"


@dataclass
class RankCalls:
    """The calls of a rank, in order. groups: the global ranks of each group by its name."""

    calls: list[Call] = field(default_factory=list)
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)


class _Exchanged:
    """Values that ranks send to each other, over two passes. exchanged[group members][rank]: in order."""

    def __init__(self) -> None:
        self.sent: dict[tuple[int, ...], dict[int, list[Any]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.received: dict[tuple[int, ...], dict[int, list[Any]]] = {}

    def next_pass(self) -> None:
        """Makes the values of this pass available to the next one."""
        self.received = {members: dict(own) for members, own in self.sent.items()}
        self.sent.clear()

    def exchange(self, members: tuple[int, ...], value: Any) -> list[Any]:
        """Records a value; returns each member's value of the previous pass, in the first pass the value itself."""
        own = self.sent[members][dist.get_rank()]
        own.append(value)
        number, result = len(own) - 1, []
        for member in members:
            exchanged = self.received.get(members, {}).get(member, [])
            result.append(exchanged[number] if number < len(exchanged) else value)
        return result


class _Writer(TorchDispatchMode):
    """Records every call of torch.distributed. Received data is zeros: uninitialised memory may hold NaN, for which the
    update and its collectives are skipped."""

    def __init__(self, rank: RankCalls, exchanged: _Exchanged) -> None:
        super().__init__()
        self.rank, self.sent = rank, exchanged

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        kind = func._schema.name.removeprefix("c10d::").strip("_")
        called = args
        if kind == "alltoall_base":  # the fake refuses a rank that sends no rows and receives some
            equal = torch.zeros(dist.ProcessGroup.unbox(args[2]).size())
            called = (equal, equal.clone(), args[2], [], [], *args[5:])
        result = func(*called, **(kwargs or {}))
        self._write(kind, args)
        return result

    def _write(self, kind: str, args: tuple[Any, ...]) -> None:
        group = next((found for arg in args if (found := _group_of(arg)) is not None), None)
        if group is None:
            return
        members = tuple(dist.get_process_group_ranks(group))
        self.rank.groups[group.group_name] = members
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        sizes = sorted({(str(t.dtype).removeprefix("torch."), t.numel()) for t in tensors})
        what = " and ".join(f"{count:,} {dtype}" for dtype, count in sizes)
        call = Call(kind, group.group_name, what)
        if kind in ("send", "recv"):
            peer = members[next(arg for arg in args if isinstance(arg, int))]
            call = replace(call, peer=peer)
        elif kind == "alltoall_base" and args[3]:
            taken, given = tuple(args[3]), tuple(args[4])
            width = math.prod(args[0].shape[1:])
            dtype = sizes[0][0]
            call = replace(call, what=f"rows of {width:,} {dtype}", given=given, taken=taken)
        self.rank.calls.append(call)
        self._receive(kind, members, args)

    def _receive(self, kind: str, members: tuple[int, ...], args: tuple[Any, ...]) -> None:
        if kind == "alltoall_base" and not args[3]:  # each rank gets an equal part
            if args[1].is_floating_point():
                args[0].copy_(args[1])
                return
            whole, own = args[1].clone(), members.index(dist.get_rank())
            parts = self.sent.exchange(members, whole)
            args[0].copy_(torch.cat([part.chunk(len(members))[own] for part in parts]))
        elif kind in ("recv", "alltoall_base", "reduce_scatter_base"):
            for received in tree_leaves(args[0]):
                received.zero_()


def _group_of(arg: Any) -> Any:
    if not isinstance(arg, torch.ScriptObject):
        return None
    if not arg._type().qualified_name().endswith("ProcessGroup"):
        return None
    return dist.ProcessGroup.unbox(arg)


def shrunken(config: Config) -> Config:
    """A resolved config with a small model and short axes, but the same schedule, ZeRO stage, recompute and head
    sharing."""
    parallel, document = config.parallel, copy.deepcopy(config.to_json())
    tensor, context, expert = (
        min(2, size) for size in (parallel.tensor, parallel.context, parallel.expert)
    )
    data = expert * min(2, config.data_size // parallel.expert)
    length = 8 * tensor * context
    micro_batches = min(config.accumulation_steps, 2 * parallel.pipe)
    if SCHEDULES[parallel.schedule].whole_groups:
        micro_batches = max(parallel.pipe, micro_batches // parallel.pipe * parallel.pipe)
    document |= {
        "train_batch_size": micro_batches * data,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
    }
    zero = document.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param", "sub_group_size"):
        zero.pop(key, None)
    zero["reduce_bucket_size"] = 100_000
    document.pop("aio", None)
    document.pop("scheduler", None)  # sends nothing, and may depend on the full batch
    megalite = document["megalite"]
    megalite["model"] = _small_model(config, tensor)
    megalite["parallel"] |= {"tensor": tensor, "context": context, "expert": expert}
    megalite["parallel"].pop("cut", None)
    megalite["data"]["sequence_length"] = length
    if isinstance(config.data.objective, Pairs):
        megalite["data"]["objective"]["source_length"] = length // 2
    megalite["train"].pop("batch_ramp", None)
    megalite["train"].pop("parameter_groups", None)
    if megalite["train"].pop("epochs", None) is not None:  # of a corpus that is not read
        megalite["train"]["steps"] = 1
    return Config.from_dict(document).resolve(parallel.pipe * tensor * context * data)


def _small_model(config: Config, tensor: int) -> dict[str, Any]:
    """The config's model with few and narrow layers, for a tensor axis of the given size."""
    parallel, spec = config.parallel, read_spec(config.model)
    chunks = parallel.pipe * parallel.chunks_a_rank
    heads, groups = 4 * tensor, 4 * tensor
    if spec.num_kv_heads < spec.num_heads:
        groups = tensor if spec.num_kv_heads >= parallel.tensor else 1
    layers, hidden, narrow = max(chunks, 2), 4 * tensor * HEAD, 16 * tensor
    sizes = {
        "hidden_size": hidden, "n_embd": hidden, "d_model": hidden, "intermediate_size": narrow,
        "n_inner": narrow, "d_ff": narrow, "moe_intermediate_size": narrow, "num_local_experts": 4,
        "num_experts": 4, "num_experts_per_tok": min(2, spec.mixture.chosen) if spec.mixture else None,
        "num_hidden_layers": layers, "n_layer": layers, "num_layers": layers // 2,
        "num_decoder_layers": layers - layers // 2, "num_attention_heads": heads, "n_head": heads,
        "num_heads": heads, "num_key_value_heads": groups, "head_dim": HEAD, "d_kv": HEAD,
        "rotary_dim": HEAD, "vocab_size": 32 * tensor + 1,
    }  # fmt: skip
    model = {**model_dict(config.model)}
    for key, value in sizes.items():
        if model.get(key) is not None:
            model[key] = value
    rotary = model.get("rope_parameters") or {}
    # A part of a smaller head may be an odd number of features.
    if rotary.get("partial_rotary_factor", 1) != 1:
        model["rope_parameters"] = {**rotary, "partial_rotary_factor": 0.5}
    by_layer = ("layer_types", "mlp_only_layers", "no_rope_layers")
    for key in (*by_layer, "pad_token_id", "decoder_start_token_id"):
        model.pop(key, None)
    if spec.padding_id is not None:  # the family's default exceeds the small vocabulary
        model["pad_token_id"] = 0
    return model


def calls_of_all(config: Config, plant: Plant | None = None) -> list[RankCalls]:
    """The calls of every rank of a shrunken config from its start to the end of a step, in the order of ranks."""
    exchanged, ranks = _Exchanged(), range(config.world_size)
    # Objects are exchanged only at the start, rows for experts in the steps.
    for rank in ranks:
        _calls_of(config, rank, exchanged, plant, steps=config.parallel.expert > 1)
    exchanged.next_pass()
    return [_calls_of(config, rank, exchanged, plant) for rank in ranks]


def _calls_of(
    config: Config, rank: int, exchanged: _Exchanged, plant: Plant | None, steps: bool = True
) -> RankCalls:
    """The calls of one rank. steps: whether to run a step after the start."""
    spec, written = read_spec(config.model), RankCalls()

    def gather(result: list[Any], value: Any, group: Any = None) -> None:
        group = group or dist.group.WORLD
        members = tuple(dist.get_process_group_ranks(group))
        result[:] = exchanged.exchange(members, copy.deepcopy(value))
        written.groups[group.group_name] = members
        written.calls.append(Call("all_gather_object", group.group_name, "objects"))

    with ExitStack() as stack:
        stack.enter_context(fake_world(config.world_size, rank))
        stack.enter_context(deepspeed_over_fakes(on_cpu=True))
        stack.enter_context(patch.object(dist, "all_gather_object", gather))
        stack.enter_context(_zeroed_memory())
        axes = config.parallel
        grid = Grid.build(axes.pipe, axes.tensor, axes.context, axes.expert)
        stack.enter_context(_Writer(written, exchanged))
        engine = build_engine(config, spec, grid)
        _fill(engine.stage)
        pipeline = build_pipeline(engine, config, spec)
        LearningRate(engine, config)
        if not steps:
            return written
        if plant is not None:
            plant(rank, pipeline)
        try:
            train_step(pipeline, grid.replica, _batches(config, spec, grid))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            doing = pipeline.instruction or "its step"
            raise DryRunError(f"rank {rank}: {doing}: {type(error).__name__}: {reason}") from error
    return written


@torch.no_grad()
def _fill(stage: Any) -> None:
    """Fills matrices that another rank would have drawn and sent with arbitrary values, equal on all ranks that would
    have received them, so that tokens go to different experts."""
    for value in stage.parameters():
        if value.dim() > 1 and not value.any():
            numbers = torch.arange(value.numel(), dtype=torch.float32, device=value.device)
            value.copy_(torch.sin(1.7 * numbers).mul_(0.1).view_as(value))


def _batches(config: Config, spec: TransformerSpec, grid: Grid) -> list[MicroBatch]:
    """Arbitrary tokens, the same samples on every rank, since messages do not depend on them. For a classifier each
    sample is one text."""
    draw, length, rows = random.Random(0), config.data.sequence_length, rows_of(config, grid)
    draws, result = Randomness(0, 0, torch.arange(config.micro_batch_size)), []
    for _ in range(config.accumulation_steps):
        sample = [draw.randrange(spec.vocabulary_size) for _ in range(length)]
        tokens = torch.tensor([sample] * config.micro_batch_size)
        tokens = tokens if rows is None else rows.cut(tokens, 1)
        labels = tokens.clone()
        if spec.classifier is not None:
            labels = torch.full_like(tokens, IGNORED)
            labels[:, 0] = len(spec.labels) - 1
        context = Context(randomness=draws, rows=rows, source=config.data.source_length)
        result.append(MicroBatch(tokens, labels, context))
    return result


@contextmanager
def _zeroed_memory() -> Iterator[None]:
    """Makes `torch.empty` return zeros, since nothing is ever received into it."""
    made = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        tensor = made(*size, **options)
        return tensor if tensor.is_meta else tensor.zero_()

    with patch.object(torch, "empty", empty):
        yield


def match(ranks: Sequence[RankCalls]) -> dict[str, int]:
    """The numbers of collectives and messages. Raises DryRunError for the first one that does not match."""
    groups: dict[str, tuple[int, ...]] = {}
    for calls in ranks:
        groups |= calls.groups
    collectives = sum(_match_group(ranks, name, groups[name]) for name in sorted(groups))
    for name, members in sorted(groups.items()):
        _match_rows(ranks, name, members)
    messages = _match_messages(ranks)
    _play(ranks, groups)
    return {"ranks": len(ranks), "collectives": collectives, "messages": messages}


def _match_group(ranks: Sequence[RankCalls], name: str, members: tuple[int, ...]) -> int:
    """Raises unless every member calls the same collectives in the same order; returns their number."""
    lists = {
        rank: [call for call in ranks[rank].calls if call.group == name and call.peer is None]
        for rank in members
    }
    first, shown = members[0], _shown(members)
    for rank in members[1:]:
        for number in range(max(len(lists[first]), len(lists[rank]))):
            a, b = (
                lists[member][number] if number < len(lists[member]) else None
                for member in (first, rank)
            )
            if a != b:
                raise DryRunError(
                    f"group {shown}: ranks {first} and {rank} differ at collective {number}: {a or 'none'} and "
                    f"{b or 'none'}"
                )
    return len(lists[first])


def _shown(members: tuple[int, ...]) -> str:
    return str(members) if len(members) <= 8 else f"{members[:3]} … of {len(members)}"


def _match_rows(ranks: Sequence[RankCalls], name: str, members: tuple[int, ...]) -> None:
    """Raises unless, in each all-to-all, every rank expects as many rows from another as that one sends."""
    lists = [
        [call for call in ranks[rank].calls if call.group == name and call.peer is None]
        for rank in members
    ]
    for number, calls in enumerate(zip(*lists, strict=True)):
        for i, giving in enumerate(calls):
            for j, taking in enumerate(calls):
                if giving.given and giving.given[j] != taking.taken[i]:
                    raise DryRunError(
                        f"group {_shown(members)}: collective {number}: rank {members[i]} sends rank {members[j]} "
                        f"{giving.given[j]} rows, rank {members[j]} expects {taking.taken[i]}"
                    )


def _match_messages(ranks: Sequence[RankCalls]) -> int:
    """Raises unless each send has its receive, of the same size and in the same order, for each group and direction;
    returns their number."""
    ways: dict[tuple[str, int, int], tuple[list[Call], list[Call]]] = defaultdict(lambda: ([], []))
    for rank, calls in enumerate(ranks):
        for call in calls.calls:
            if call.peer is not None:
                sends = call.kind == "send"
                way = (rank, call.peer) if sends else (call.peer, rank)
                ways[call.group, *way][0 if sends else 1].append(call)
    for (_, source, target), (sent, received) in sorted(ways.items()):
        if len(sent) != len(received):
            raise DryRunError(
                f"messages from rank {source} to {target}: sent {len(sent)}, received {len(received)}"
            )
        for number, (a, b) in enumerate(zip(sent, received, strict=True)):
            if a.what != b.what:
                raise DryRunError(
                    f"message {number} from rank {source} to {target}: {a.what} sent, {b.what} received"
                )
    return sum(len(sent) for sent, _ in ways.values())


def _play(ranks: Sequence[RankCalls], groups: dict[str, tuple[int, ...]]) -> None:
    """Simulates the collectives: each completes when all members of its group have reached it. Raises DryRunError for a
    deadlock."""
    lists = [[call for call in rank.calls if call.peer is None] for rank in ranks]
    at = [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank, calls in enumerate(lists):
            while at[rank] < len(calls):
                members = groups[calls[at[rank]].group]
                nexts = [lists[m][at[m]] if at[m] < len(lists[m]) else None for m in members]
                if any(call is None or call.group != calls[at[rank]].group for call in nexts):
                    break
                for member in members:
                    at[member] += 1
                moved = True
    stuck = [rank for rank, calls in enumerate(lists) if at[rank] < len(calls)]
    if stuck:
        where = [
            f"rank {rank} at {lists[rank][at[rank]]} of group {groups[lists[rank][at[rank]].group]}"
            for rank in stuck[:3]
        ]
        raise DryRunError(f"deadlock of {len(stuck)} ranks: {'; '.join(where)}")
