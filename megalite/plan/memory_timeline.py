"""Peak memory of a rank's device in a step: its program is simulated action by action, with what each allocates and
frees.

    F       the chunk's activations (activations.py) stay; in the head, a chunk of logits and its input are temporary
    B       the operations of backward.py; recomputation comes before those that need it
    I, W    I leaves what W needs of each layer; W computes all gradients of its chunk, and frees that, before it
            hands them over
    end     reduction and update (gradients.py)

Next: rank_memory.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Recompute
from megalite.parallel.layers import share
from megalite.parallel.loss import IN_CACHE
from megalite.plan.activations import (
    FP32,
    Forward,
    Table,
    head_table,
    layer_table,
    logits_bytes,
    total,
)
from megalite.plan.backward import Op, layer_ops
from megalite.plan.chunk_tables import ChunkPart, chunk_table, groups
from megalite.plan.gradients import GradientMemory, Moment, Reduction
from megalite.plan.stacks import (
    rows_of,
    stack_chunk_table,
    stack_head_table,
    stack_layer_table,
    stack_waiting_table,
)
from megalite.plan.waiting_tables import waiting_table
from megalite.programs.program import Program

OF_WEIGHT = "loss: gradient of its weight"
HEAD = -1  # stands for the head, whose gradients come with I, instead of a chunk's number


@dataclass(frozen=True)
class ChunkMemory:
    """Memory of a micro-batch in a chunk of a rank.

    recompute: as in Stage. in_flight: bytes that exist only during a forward (ZeRO-3's gathers). has_head: whether the
    rank has the head, in this chunk or another.
    """

    spec: TransformerSpec
    part: ChunkPart
    recompute: Recompute
    at: Forward
    in_flight: int = 0
    has_head: bool = False

    @cached_property
    def kept(self) -> int:
        """Bytes between F and its backward."""
        table = chunk_table if self.spec.stacks is None else stack_chunk_table
        return total(table(self.spec, self.part, self.recompute, self.at))

    @cached_property
    def rise(self) -> int:
        """Temporary bytes of F: in the last layer the MLP's result and the sum with it, in the head a chunk of logits
        and their input."""
        of_layers = 2 * self.at.hidden(self.spec) + self.in_flight
        if not self.part.last:
            return of_layers
        rows = self.at if self.spec.stacks is None else rows_of(self.at, encoder=False)
        entered = rows.width * rows.tokens * self.spec.hidden_size
        of_head = logits_bytes(self.spec, rows) + entered
        if rows.device == "cpu" and rows.dtype == torch.bfloat16 and rows.split.axis.size == 1:
            of_head += FP32 * min(IN_CACHE, logits_bytes(self.spec, rows) // rows.width)
        return max(of_head, of_layers - total(self._loss_table))

    @cached_property
    def waiting(self) -> int:
        """Bytes between I and W."""
        table = waiting_table if self.spec.stacks is None else stack_waiting_table
        return total(table(self.spec, self.part, self.at))

    @cached_property
    def backward(self) -> list[Op]:
        """The operations of B, which free everything that is kept."""
        ops = [*self._first_ops(), *self._layer_ops()]
        ops.append(self._last_op())
        left = self.kept - sum(op.freed - op.made for op in ops)
        return [*ops, Op(0, left)]

    @cached_property
    def inner(self) -> list[Op]:
        """The operations of I, which leave what W needs; without those of the head's weights, which follow it."""
        spec, at = self.spec, self.at
        ops = self._first_ops()[self.part.last :]
        for layers, own in self._by_layer():
            ops += own
            if layers:
                table = waiting_table if spec.stacks is None else stack_waiting_table
                ops.append(Op(total(table(spec, ChunkPart(layers, False, False), at)), 0))
        left = self.kept - self.waiting - sum(op.freed - op.made for op in ops)
        if self.part.last:
            left -= self._loss_table.get(OF_WEIGHT, 0)
        return [*(op._replace(weights=()) for op in ops), Op(0, left)]

    @cached_property
    def weights(self) -> list[Op]:
        """The operations of W: each layer's gradients are computed and their inputs freed, then all are handed over."""
        spec, at, ops, numbers = self.spec, self.at, list[Op](), list[int]()
        table = waiting_table if spec.stacks is None else stack_waiting_table
        for layers, own in self._by_layer():
            made = [count for op in own for count in op.weights]
            numbers += made
            if layers:
                waited = total(table(spec, ChunkPart(layers, False, False), at))
                ops.append(Op(at.width * sum(made), waited))
        last = self._last_op().weights
        ops.append(Op(at.width * sum(last), self.waiting - sum(op.freed for op in ops)))
        numbers += last
        return [*ops, Op(-at.width * sum(numbers), 0, tuple(numbers))]

    @property
    def head_op(self) -> Op:
        """Gives the head's weights their gradient, which forward has computed. With tied embeddings it is kept until
        the embedding's part is added."""
        spec, axis, width = self.spec, self.at.split.axis, self.at.width
        start, stop = share(spec.vocabulary_size, axis)
        numbers = (len(spec.labels) or stop - start) * spec.hidden_size
        held = self._loss_table.get(OF_WEIGHT, 0)
        given = held == width * numbers  # it is the gradient itself, in the weights' dtype
        if self._waits_for_embedding:
            return Op(0, 0) if given else Op(width * numbers, held)
        return Op(-held, 0, (numbers,)) if given else Op(0, held, (numbers,))

    @property
    def _waits_for_embedding(self) -> bool:
        return self.spec.tied and self.part.first and self.part.last

    @property
    def _loss_table(self) -> Table:
        table = head_table if self.spec.stacks is None else stack_head_table
        return table(self.spec, self.at)

    def _first_ops(self) -> list[Op]:
        """The operations before the layers: the head's, or the receipt of another chunk's gradient."""
        spec, table = self.spec, self._loss_table
        hidden = self.at.hidden(spec)
        if not self.part.last:
            return [Op(hidden, 0)]
        ops = [self.head_op, Op(hidden, total(table) - table.get(OF_WEIGHT, 0))]
        if spec.head_transform and spec.classifier is None:
            ops += [Op(hidden, hidden), Op(hidden, hidden, (spec.hidden_size**2,))]
        return ops

    def _last_op(self) -> Op:
        """The embedding's operation, or the sending of the input's gradient."""
        spec, at = self.spec, self.at
        if not self.part.first:
            return Op(0, at.hidden(spec))
        start, stop = share(spec.vocabulary_size, at.split.axis)
        table = (stop - start) * spec.hidden_size
        others = (spec.position_rows + spec.token_types) * spec.hidden_size
        if self._waits_for_embedding:  # the head's gradient is added
            return Op(0, at.hidden(spec) + at.width * table, (table + others,))
        if spec.tied and self.has_head:  # the head is another chunk, whose gradient exists
            return Op(at.width * table, at.hidden(spec) + at.width * table, (others,))
        return Op(0, at.hidden(spec), (table + others,))

    def _layer_ops(self) -> list[Op]:
        return [op for _, ops in self._by_layer() for op in ops]

    def _by_layer(self) -> Iterable[tuple[range, list[Op]]]:
        """The operations of each layer, last layer first; a group of layers is recomputed before its own operations."""
        spec, at, layers = self.spec, self.at, self.part.layers
        every = 0 if self.recompute == "selective" else int(self.recompute)
        for group in reversed(groups(layers, every) or [layers]):
            if every:
                again = sum(total(self._table(layer)) for layer in group)
                yield range(0), [Op(again, 0)]
            for layer in reversed(group):
                ops = self._ops_of(layer)
                if self.recompute == "selective":
                    again = total(self._table(layer)) - total(self._table(layer, selective=True))
                    ops = [Op(again, 0), *ops]
                yield range(layer, layer + 1), ops
            if every:
                yield range(0), [Op(0, at.hidden(spec))]

    def _table(self, layer: int, selective: bool = False) -> Table:
        if self.spec.stacks is None:
            return layer_table(self.spec, layer, self.at, selective)
        return stack_layer_table(self.spec, layer, self.at, selective)

    def _ops_of(self, layer: int) -> list[Op]:
        if self.spec.stacks is None:
            return layer_ops(self.spec, layer, self.at)
        # With two stacks, one operation that allocates the most of any part of a layer.
        kept, spec, at = total(self._table(layer)), self.spec, self.at
        made = 3 * at.width * at.part(spec.intermediate_size)
        weights = spec.layer_parameters(layer) // at.split.axis.size
        return [Op(made, made + kept, (weights,))]


@dataclass(frozen=True)
class Passage:
    """The effect of an action. most: its peak. after: its end. `kept` is relative to what there was before, in both."""

    most: Moment
    after: Moment


def most_memory(
    program: Program, rank: int, chunks: dict[int, ChunkMemory], rules: Reduction
) -> Moment:
    """The moment of a rank's step at which activations, gradients and buckets take the most. Sent messages stay until
    they are waited for (pipeline/steps.py): gloo does not report a send as complete before that, and on a GPU the host,
    which would release it, is ahead of the device."""
    one = next(iter(chunks.values()))
    message = one.at.hidden(one.spec)
    gradients, known = GradientMemory.begin(rules), dict[object, Passage]()
    now, begun = gradients.now, gradients.begun
    # Plain ints, for speed: a step has thousands of actions, and the search simulates hundreds of ranks.
    kept, most = 0, gradients.most.total
    for action in program.actions[rank]:
        kind, number, _ = action
        given = HEAD if kind == "I" else number
        key = kind, number, given in begun, now.gradients, now.buckets
        passage = known.get(key)
        if passage is None:
            passage = known[key] = _passage(kind, number, chunks[number], gradients)
        if kept + passage.most.total > most:
            highest = passage.most
            most = kept + highest.total
            gradients.most = Moment(kept + highest.kept, highest.gradients, highest.buckets)
        kept += passage.after.kept + message * program.crosses(program.gives(action))
        kept -= message * len(program.receipts.get(action, ()))
        now = gradients.now = passage.after
        if kind != "F":
            begun.add(given)
    gradients.now = Moment(kept, now.gradients, now.buckets)
    gradients.end()
    return gradients.most


def _passage(kind: str, number: int, chunk: ChunkMemory, before: GradientMemory) -> Passage:
    """The effect of an action, given the state before it."""
    now = before.now
    own = GradientMemory(
        before.rules,
        Moment(0, now.gradients, now.buckets),
        Moment(0, now.gradients, now.buckets),
        set(before.begun),
    )
    match kind:
        case "F":
            own.now.kept = chunk.kept
            own.look(chunk.rise)
        case "B":
            own.backward(number, chunk.backward)
        case "W":
            own.backward(number, chunk.weights)
        case _:
            own.backward(number, chunk.inner, closes=False)
            if chunk.part.last:
                own.backward(HEAD, [chunk.head_op])
    return Passage(own.most, own.now)
