"""What a backward makes and frees, operation by operation: results that wait for the next operation, gradients of
weights, and what forward has kept.

autograd runs the operations of a chunk in the reverse of the forward's order, and frees what forward kept for one when
it is done. With the numbers r, g, q, k and f of activations.py, of e bytes each, a layer's operations are:

    down projection             makes f; its input f goes
    gate's product              makes 2·f, gradients of both factors; the factors and the product's gradient go, 3·f
    activation                  makes f; its input and its result's gradient go, 2·f
    gate and up projections     make g each, the second added to the first; gradients of their results go, 2·f
    norm                        makes r; g goes; and the sum with what came past it: makes r, 2·r go
    output projection           makes q
    core of attention           makes q + 2·k; its result's gradient, queries, keys, values and result go
    rotary positions            make q, and k, in place of as much
    query, key, value           as gate and up, of q, k and k; norm and sum as above

Where the tensor axis splits them, one operation makes all gradients of the projections that read one input. Experts
take an MLP's place, with the rows that their tokens make.
tests/distributed/test_peaks.py holds it against what torch allocates. Next: timeline.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

from megalite.model.spec import TransformerSpec
from megalite.plan.activations import (
    FP32,
    Forward,
    Table,
    attention_table,
    core_table,
    mlp_table,
    total,
)


class Op(NamedTuple):
    """An operation of a backward. made: bytes that it writes beside what is there, without gradients of weights; freed:
    bytes that go when it is done, of what forward kept and of what was made; weights: numbers of each weight whose
    gradient it makes."""

    made: int
    freed: int
    weights: tuple[int, ...] = ()


def layer_ops(spec: TransformerSpec, layer: int, at: Forward) -> list[Op]:
    """Of one layer's backward, which frees all that the layer has kept. Before it there is the gradient of its result,
    after it that of its input."""
    mixture, of_mlp = spec.mixture_of(layer), mlp_table(spec, layer, at)
    mlp = _mlp_ops(spec, of_mlp, at) if mixture is None else _experts_ops(spec, layer, at)
    attention, of_attention = _attention_ops(spec, layer, at), attention_table(spec, layer, at)
    closed_mlp = _closed(mlp, total(of_mlp), spec, at)
    return closed_mlp + _closed(attention, total(of_attention), spec, at)


def _closed(ops: list[Op], kept: int, spec: TransformerSpec, at: Forward) -> list[Op]:
    """With the norm, which frees what is left, and the sum of the gradients that come past it and through it."""
    left = kept - sum(op.freed - op.made for op in ops)  # what was made for the norm is in it
    hidden = at.hidden(spec)
    wide = 3 * FP32 * at.rows * spec.hidden_size if at.width < FP32 and at.device == "cpu" else 0
    return [
        *ops,
        Op(hidden + wide, left + wide, (spec.norm_parameters,)),
        Op(hidden, 2 * hidden),
    ]


def _columns(spec: TransformerSpec, sizes: Sequence[int], at: Forward) -> list[Op]:
    """Of linears that read one input [tokens, D] and give so many numbers: the gradient of the input is left."""
    gathered = at.width * at.tokens * spec.hidden_size
    weights = [size // at.tokens * spec.hidden_size for size in sizes]
    slopes = at.width * sum(sizes)
    if at.split.axis.size > 1 and not at.split.divides:
        return [
            Op(gathered * min(2, len(sizes)), gathered * (len(sizes) > 1) + slopes, (*weights,))
        ]
    own = [at.width * size for size in sizes]
    first = Op(gathered, own[0], (weights[0],))
    others = [
        Op(gathered, gathered + size, (weight,))
        for size, weight in zip(own[1:], weights[1:], strict=True)
    ]
    return [first, *others]


def _row(spec: TransformerSpec, size: int, freed: int, at: Forward) -> Op:
    """Of a linear that reads so many numbers and gives hidden states."""
    gathered = at.width * at.tokens * spec.hidden_size if at.split.divides else 0
    weight = size // at.tokens * spec.hidden_size
    return Op(at.width * size + gathered, freed + gathered, (weight,))


def _mlp_ops(spec: TransformerSpec, table: Table, at: Forward) -> list[Op]:
    """Of an MLP, to the gradient of its input."""
    numbers = at.part(spec.intermediate_size)
    features = at.width * numbers
    ops = [_row(spec, numbers, table.get("input of down projection", 0), at)]
    if spec.gated and at.compiled:
        ops.append(Op(2 * features, 3 * features))
    elif spec.gated:
        ops += [Op(2 * features, 3 * features), Op(features, 2 * features)]
    else:
        ops.append(Op(features, 2 * features))
    return ops + _columns(spec, [numbers] * (1 + spec.gated), at)


def _experts_ops(spec: TransformerSpec, layer: int, at: Forward) -> list[Op]:
    """Of a router and experts that get as many rows as their tokens choose."""
    mixture = spec.mixture_of(layer)
    assert mixture is not None
    rows = at.width * at.tokens * mixture.chosen * spec.hidden_size
    features = at.width * mixture.chosen * at.part(mixture.intermediate_size)
    own = mixture.count // at.experts
    weight = own * spec.hidden_size * at.part(mixture.intermediate_size) // at.tokens
    gathered = at.width * at.tokens * spec.hidden_size
    shared: list[Op] = []
    if mixture.shared_size:  # whose input's gradient is added to that of the others
        numbers = at.part(mixture.shared_size)
        own_features = at.width * numbers
        shared = [
            _row(spec, numbers, own_features, at),
            Op(2 * own_features, 3 * own_features),
            Op(own_features, 2 * own_features),
            *_columns(spec, [numbers, numbers], at),
            Op(0, gathered),
        ]
    return [
        *shared,
        Op(rows, 0),  # what the weights of the choice multiply
        Op(rows, rows),  # back in the order of the experts
        Op(features, features + rows, (weight,)),
        Op(2 * features, 3 * features),
        Op(features, 2 * features),
        Op(2 * rows, rows + 2 * features, (weight, weight)),
        Op(gathered, rows, (mixture.count * spec.hidden_size,)),
    ]


def _attention_ops(spec: TransformerSpec, layer: int, at: Forward) -> list[Op]:
    """Of attention, to the gradient of its input."""
    h, e = spec.head_size, at.width
    queries, keys = at.part(spec.num_heads * h, h), at.part(spec.num_kv_heads * h, h)
    core, read_keys = core_table(spec, layer, at)
    q, k = e * queries, e * read_keys
    made = q + 2 * k
    # Kernels of devices sum the gradients of queries in fp32; by hand, gradients of weights and of scores are made.
    extra = FP32 * queries if at.device != "cpu" else 0
    extra += 2 * core.get("attention: weights", 0)
    ops = [_row(spec, queries, 0, at), Op(made + extra, extra + q + made + total(core) + q)]
    own_keys = e * keys
    if own_keys != k:  # gathered or repeated
        ops.append(Op(2 * own_keys, 2 * k))
    if spec.rotary_of(layer) is not None:
        ops += [Op(own_keys, own_keys), Op(q, q)]
    if spec.qk_norm != "none":
        ops += [Op(own_keys, own_keys), Op(q, q)]
    return ops + _columns(spec, [keys, keys, queries], at)
