"""A dry run's third level: one real training step of every rank, one after another in this process, over groups that go
nowhere; every collective and message is written down and matched across ranks.

The engine, DeepSpeed's optimizer and the pipeline are the real ones; the model is shrunken to a layer or two a chunk,
the tensor and data axes to two ranks each. What ranks say to each other as objects cannot come over such groups, so
there are two passes: the first writes down what each rank says, the second hears it and is the one that is matched.

What is found: ranks of a group whose collectives differ in kind, type or size, or in their order; messages without
their other end or with another size; collectives of several groups in an order that no rank can leave.
"""

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
from megalite.parallel.grid import Grid
from megalite.pipeline.actions import Pipeline
from megalite.plan.places import DryRunError, fake_world
from megalite.training.batches import MicroBatch
from megalite.training.step import train_step

HEAD = 8
Plant = Callable[[int, Pipeline], Any]
"""Makes a rank wrong, for tests: called with its number before its step."""


@dataclass(frozen=True)
class Call:
    """A collective of a group, or one end of a message on it. peer: the other end's global rank."""

    kind: str
    group: str
    what: str
    peer: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} of {self.what}"


@dataclass
class RankCalls:
    """What a rank has called, in order; groups: the global ranks of each by its name."""

    calls: list[Call] = field(default_factory=list)
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)


class _Writer(TorchDispatchMode):
    """Writes down every call of torch.distributed. What would be received is zeros: memory as it was may hold NaN,
    for which an update is left out with its collectives."""

    def __init__(self, rank: RankCalls) -> None:
        super().__init__()
        self.rank = rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._write(func._schema.name.removeprefix("c10d::").strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _write(self, kind: str, args: tuple[Any, ...]) -> None:
        group = next((found for arg in args if (found := _group_of(arg)) is not None), None)
        if group is None:
            return
        members = tuple(dist.get_process_group_ranks(group))
        self.rank.groups[group.group_name] = members
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        sizes = sorted({(str(t.dtype).removeprefix("torch."), t.numel()) for t in tensors})
        what = " and ".join(f"{count:,} {dtype}" for dtype, count in sizes)
        peer = None
        if kind in ("send", "recv"):
            peer = members[next(arg for arg in args if isinstance(arg, int))]
            if kind == "recv":
                for tensor in tensors:
                    tensor.zero_()
        self.rank.calls.append(Call(kind, group.group_name, what, peer))


def _group_of(arg: Any) -> Any:
    if not isinstance(arg, torch.ScriptObject):
        return None
    if not arg._type().qualified_name().endswith("ProcessGroup"):
        return None
    return dist.ProcessGroup.unbox(arg)


class _Objects:
    """What ranks say with `all_gather_object`, over two passes. said[group members][rank]: in order."""

    def __init__(self) -> None:
        self.said: dict[tuple[int, ...], dict[int, list[Any]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.heard: dict[tuple[int, ...], dict[int, list[Any]]] = {}

    def next_pass(self) -> None:
        """Lets the next pass hear what this one has said."""
        self.heard = {members: dict(own) for members, own in self.said.items()}
        self.said.clear()

    def gather(self, rank: RankCalls, result: list[Any], value: Any, group: Any = None) -> None:
        """In place of torch's."""
        group = group or dist.group.WORLD
        members = tuple(dist.get_process_group_ranks(group))
        own = self.said[members][dist.get_rank()]
        own.append(copy.deepcopy(value))
        rank.groups[group.group_name] = members
        rank.calls.append(Call("all_gather_object", group.group_name, "objects"))
        number = len(own) - 1
        for place, member in enumerate(members):
            said = self.heard.get(members, {}).get(member, [])
            result[place] = said[number] if number < len(said) else value


def shrunken(config: Config) -> Config:
    """A resolved config with a small model and short axes, alike in schedule, ZeRO, recompute and sharing of heads."""
    parallel, document = config.parallel, copy.deepcopy(config.to_json())
    tensor, data = min(2, parallel.tensor), min(2, config.data_size)
    spec, chunks = read_spec(config.model), parallel.pipe * parallel.chunks_a_rank
    heads, groups = 4 * tensor, 4 * tensor
    if spec.num_kv_heads < spec.num_heads:
        groups = tensor if spec.num_kv_heads >= parallel.tensor else 1
    layers, hidden = max(chunks, 2), 4 * tensor * HEAD
    sizes = {
        "hidden_size": hidden, "n_embd": hidden, "d_model": hidden, "intermediate_size": 16 * tensor,
        "n_inner": 16 * tensor, "d_ff": 16 * tensor, "num_hidden_layers": layers, "n_layer": layers,
        "num_layers": layers // 2, "num_decoder_layers": layers - layers // 2, "num_attention_heads": heads,
        "n_head": heads, "num_heads": heads, "num_key_value_heads": groups, "head_dim": HEAD, "d_kv": HEAD,
        "rotary_dim": HEAD, "vocab_size": 32 * tensor + 1,
    }  # fmt: skip
    model = {**model_dict(config.model)}
    for key, value in sizes.items():
        if model.get(key) is not None:
            model[key] = value
    for key in ("layer_types", "pad_token_id", "mlp_only_layers", "decoder_start_token_id"):
        model.pop(key, None)
    length = 8 * tensor
    micro_batches = min(config.accumulation_steps, 2 * parallel.pipe)
    if parallel.schedule == "interleaved":
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
    megalite = document["megalite"]
    megalite["model"] = model
    megalite["parallel"] |= {"tensor": tensor}
    megalite["parallel"].pop("cut", None)
    megalite["data"]["sequence_length"] = length
    if isinstance(config.data.objective, Pairs):
        megalite["data"]["objective"]["source_length"] = length // 2
    megalite["train"].pop("batch_ramp", None)
    megalite["train"].pop("parameter_groups", None)
    return Config.from_dict(document).resolve(parallel.pipe * tensor * data)


def calls_of_all(config: Config, plant: Plant | None = None) -> list[RankCalls]:
    """What every rank of a shrunken config calls from its start to the end of a step, in the order of ranks."""
    objects, ranks = _Objects(), []
    for _ in range(2):
        ranks = [_calls_of(config, rank, objects, plant) for rank in range(config.world_size)]
        objects.next_pass()
    return ranks


def _calls_of(config: Config, rank: int, objects: _Objects, plant: Plant | None) -> RankCalls:
    spec, written = read_spec(config.model), RankCalls()

    def gather(result: list[Any], value: Any, group: Any = None) -> None:
        objects.gather(written, result, value, group)

    with ExitStack() as stack:
        stack.enter_context(fake_world(config.world_size, rank))
        stack.enter_context(deepspeed_over_fakes())
        stack.enter_context(patch.object(dist, "all_gather_object", gather))
        stack.enter_context(_zeroed_memory())
        axes = config.parallel
        grid = Grid.build(axes.pipe, axes.tensor, axes.context, axes.expert)
        stack.enter_context(_Writer(written))
        engine = build_engine(config, spec, grid)
        pipeline = build_pipeline(engine, config, spec)
        LearningRate(engine, config)
        if plant is not None:
            plant(rank, pipeline)
        try:
            train_step(pipeline, grid.data, _batches(config, spec.vocabulary_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            doing = pipeline.instruction or "its step"
            raise DryRunError(f"rank {rank}: {doing}: {type(error).__name__}: {said}") from error
    return written


def _batches(config: Config, vocabulary: int) -> list[MicroBatch]:
    """Any tokens: the same on every rank, since what is sent does not depend on them."""
    draw, length = random.Random(0), config.data.sequence_length
    draws, result = Randomness(0, 0, torch.arange(config.micro_batch_size)), []
    for _ in range(config.accumulation_steps):
        rows = [[draw.randrange(vocabulary) for _ in range(length)]]
        tokens = torch.tensor(rows * config.micro_batch_size)
        context = Context(randomness=draws, source=config.data.source_length)
        result.append(MicroBatch(tokens, tokens.clone(), context))
    return result


@contextmanager
def _zeroed_memory() -> Iterator[None]:
    """Makes `torch.empty` zeros, since nothing is ever received into it."""
    made = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        tensor = made(*size, **options)
        return tensor if tensor.is_meta else tensor.zero_()

    with patch.object(torch, "empty", empty):
        yield


def match(ranks: Sequence[RankCalls]) -> dict[str, int]:
    """How many collectives and messages there are. DryRunError names the first that does not match."""
    groups: dict[str, tuple[int, ...]] = {}
    for calls in ranks:
        groups |= calls.groups
    collectives = sum(_match_group(ranks, name, groups[name]) for name in sorted(groups))
    messages = _match_messages(ranks)
    _play(ranks, groups)
    return {"ranks": len(ranks), "collectives": collectives, "messages": messages}


def _match_group(ranks: Sequence[RankCalls], name: str, members: tuple[int, ...]) -> int:
    """Every member calls the same collectives in the same order."""
    lists = {
        rank: [call for call in ranks[rank].calls if call.group == name and call.peer is None]
        for rank in members
    }
    first = members[0]
    for rank in members[1:]:
        for number in range(max(len(lists[first]), len(lists[rank]))):
            a, b = (
                lists[member][number] if number < len(lists[member]) else None
                for member in (first, rank)
            )
            if a != b:
                shown = members if len(members) <= 8 else f"{members[:3]} … of {len(members)}"
                raise DryRunError(
                    f"group {shown}: rank {first} and {rank} differ at collective {number}: {a or 'none'} and "
                    f"{b or 'none'}"
                )
    return len(lists[first])


def _match_messages(ranks: Sequence[RankCalls]) -> int:
    """Each send has its receive, of the same size, in the same order on each group and way."""
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
                f"messages of rank {source} to {target}: sent {len(sent)}, received {len(received)}"
            )
        for number, (a, b) in enumerate(zip(sent, received, strict=True)):
            if a.what != b.what:
                raise DryRunError(
                    f"message {number} of rank {source} to {target}: {a.what} sent, {b.what} received"
                )
    return sum(len(sent) for sent, _ in ways.values())


def _play(ranks: Sequence[RankCalls], groups: dict[str, tuple[int, ...]]) -> None:
    """A collective completes when all members of its group are at it; raises DryRunError where no rank can continue."""
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
        told = [
            f"rank {rank} at {lists[rank][at[rank]]} of group {groups[lists[rank][at[rank]].group]}"
            for rank in stuck[:3]
        ]
        raise DryRunError(f"{len(stuck)} ranks wait for each other for ever: {'; '.join(told)}")
