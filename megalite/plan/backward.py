"""Memory that a backward allocates and frees, operation by operation: intermediate results, gradients of weights, and
activations kept by forward.

autograd runs the operations of a chunk in the reverse of the forward's order, and frees the activations kept for an
operation when it is done. With the counts r, g, q, k and f of activations.py, of e bytes each, a layer's operations
are:

    down projection             allocates f; frees its input, f
    gate's product              allocates 2·f, gradients of both factors; frees both and the product's gradient, 3·f
    activation                  allocates f; frees its input and its result's gradient, 2·f
    gate and up projections     allocate g each, the second added to the first; free their results' gradients, 2·f
    norm                        allocates r, frees g; then the sum with the residual's gradient: allocates r, frees 2·r
    output projection           allocates q
    core of attention           allocates q + 2·k; frees its result and its gradient, queries, keys and values
    rotary positions            allocate q, then k; free as much
    query, key, value           as gate and up, with q, k and k; norm and sum as above

Where the tensor axis splits them, one operation computes all gradients of the projections that read one input. Experts
replace an MLP and work on the rows routed to them. tests/distributed/test_peaks.py compares this with what torch
allocates. Next: memory_timeline.py.
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
    """An operation of a backward. made: bytes that it allocates, without gradients of weights. freed: bytes that are
    freed when it is done. weights: sizes, in elements, of the weights whose gradients it computes."""

    made: int
    freed: int
    weights: tuple[int, ...] = ()


def layer_ops(spec: TransformerSpec, layer: int, at: Forward) -> list[Op]:
    """The operations of one layer's backward, which free everything that the layer has kept. The gradient of its result
    exists before them, that of its input after them."""
    mixture, of_mlp = spec.mixture_of(layer), mlp_table(spec, layer, at)
    mlp = _mlp_ops(spec, of_mlp, at) if mixture is None else _experts_ops(spec, layer, at)
    attention, of_attention = _attention_ops(spec, layer, at), attention_table(spec, layer, at)
    closed_mlp = _closed(mlp, total(of_mlp), spec, at)
    return closed_mlp + _closed(attention, total(of_attention), spec, at)


def _closed(ops: list[Op], kept: int, spec: TransformerSpec, at: Forward) -> list[Op]:
    """Adds the norm, which frees what is left, and the sum of the gradients of the residual and of the norm's input."""
    left = kept - sum(op.freed - op.made for op in ops)  # includes what was made for the norm
    hidden = at.hidden(spec)
    wide = 3 * FP32 * at.rows * spec.hidden_size if at.width < FP32 and at.device == "cpu" else 0
    return [
        *ops,
        Op(hidden + wide, left + wide, (spec.norm_parameters,)),
        Op(hidden, 2 * hidden),
    ]


def _columns(spec: TransformerSpec, sizes: Sequence[int], at: Forward) -> list[Op]:
    """Operations of linears that read one input [tokens, D]; the input's gradient remains. sizes: of their results."""
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
    """The operation of a linear whose result is hidden states. size: of its input."""
    gathered = at.width * at.tokens * spec.hidden_size if at.split.divides else 0
    weight = size // at.tokens * spec.hidden_size
    return Op(at.width * size + gathered, freed + gathered, (weight,))


def _mlp_ops(spec: TransformerSpec, table: Table, at: Forward) -> list[Op]:
    """The operations of an MLP, up to the gradient of its input."""
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
    """The operations of a router and its experts, which get `chosen` rows per token."""
    mixture = spec.mixture_of(layer)
    assert mixture is not None
    rows = at.width * at.tokens * mixture.chosen * spec.hidden_size
    features = at.width * mixture.chosen * at.part(mixture.intermediate_size)
    own = mixture.count // at.experts
    weight = own * spec.hidden_size * at.part(mixture.intermediate_size) // at.tokens
    gathered = at.width * at.tokens * spec.hidden_size
    shared: list[Op] = []
    if mixture.shared_size:  # its input's gradient is added to that of the others
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
        Op(rows, 0),  # the rows that the router's weights multiply
        Op(rows, rows),  # back to the experts' order
        Op(features, features + rows, (weight,)),
        Op(2 * features, 3 * features),
        Op(features, 2 * features),
        Op(2 * rows, rows + 2 * features, (weight, weight)),
        Op(gathered, rows, (mixture.count * spec.hidden_size,)),
    ]


def _attention_ops(spec: TransformerSpec, layer: int, at: Forward) -> list[Op]:
    """The operations of attention, up to the gradient of its input."""
    h, e = spec.head_size, at.width
    queries, keys = at.part(spec.num_heads * h, h), at.part(spec.num_kv_heads * h, h)
    core, read_keys = core_table(spec, layer, at)
    q, k = e * queries, e * read_keys
    made = q + 2 * k
    # Fused kernels on devices sum the queries' gradients in fp32; without them, gradients of weights and scores exist.
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
