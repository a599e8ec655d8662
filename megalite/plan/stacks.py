"""What the forward of an encoder-decoder keeps for backward: activations.py's tables for chunks with the rows of two
stacks. With s source and u target tokens, and r, g, q, k, f of either stack as defined there, a layer keeps what a
decoder's layer keeps for its rows, plus:

    input                             e·(s + u)·b·h, once per chunk: rows of both stacks, which its first layers read
    table of distances                8·s·s or 8·u·u of indices, and a mask; on devices, and with recomputation, also
                                      the biases of the scores, e·s·s·a / t or e·u·u·a / t (times b with padding)
    core of self-attention            on a CPU, and with dropout, the weights: 4·b·s·s·a / t, in 16 bits 6; 1 (and in
                                      fp32 4) more with dropout; otherwise as there
    cross-attention                   its norm; the norm's result; e·(q + 2·k), k of the source; the core; e·q
    encoder's output                  e·s·b·h, once per chunk: the input of all keys and values of cross-attention
    dropout                           the features of the MLP f bytes, cross-attention's result and the output of the
                                      norm after a stack r bytes each

tests/distributed/test_activations.py compares this with what autograd saves.
"""

from dataclasses import replace

from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Recompute
from megalite.plan.activations import (
    FP32,
    INT64,
    Forward,
    Table,
    embedding_table,
    gate_bytes,
    head_table,
    norm_table,
    total,
)
from megalite.plan.chunk_tables import ChunkPart, groups


def rows_of(at: Forward, encoder: bool) -> Forward:
    """The forward of one stack's rows."""
    length = at.source if encoder else at.length - at.source
    return replace(at, length=length, source=0)


def _is_encoder(spec: TransformerSpec, layer: int) -> bool:
    return layer < spec.encoder_layers


def _attention(
    spec: TransformerSpec, queries: Forward, keys: Forward, biased: bool, selective: bool
) -> Table:
    """What attention keeps, from queries, keys and values to the output projection's input. biased: self-attention,
    whose relative position biases need gradients."""
    h, e = spec.head_size, queries.width
    q, k = queries.part(spec.num_heads * h, h), keys.part(spec.num_heads * h, h)
    heads, dropped = q // (queries.tokens * h), spec.attention_dropout > 0
    core = FP32 * queries.tokens * heads  # log-sum-exp
    if dropped or (biased and queries.device == "cpu"):
        each = FP32 + (e if dropped or e < FP32 else 0) + dropped
        core = each * queries.tokens * heads * keys.length
    table: Table = {"queries": e * q, "keys": e * k, "values": e * k}
    return table | ({} if selective else {"core": core}) | {"input of output projection": e * q}


def stack_layer_table(
    spec: TransformerSpec, layer: int, at: Forward, selective: bool = False, first: bool = False
) -> Table:
    """What one layer keeps. first: its input is the chunk's, which is counted there."""
    own = rows_of(at, _is_encoder(spec, layer))
    numbers, gathered = own.rows * spec.hidden_size, own.width * own.tokens * spec.hidden_size
    table = norm_table("rms", "attention norm", numbers, own.rows, own)
    if first:
        del table["attention norm: input"]
    table |= {"input of query, key, value": gathered} | _attention(spec, own, own, True, selective)
    drops = 2
    if spec.is_cross(layer):
        drops = 3
        table |= norm_table("rms", "cross norm", numbers, own.rows, own)
        table["input of cross query"] = gathered
        cross = _attention(spec, own, rows_of(at, True), False, selective)
        table |= {f"cross {name}": size for name, size in cross.items()}
    table |= norm_table("rms", "MLP norm", numbers, own.rows, own)
    table["input of gate, up"] = gathered
    table |= _fed(spec, own)
    if spec.hidden_dropout > 0:
        table["dropout of what is added"] = drops * numbers
    if layer + 1 == spec.encoder_layers:
        table |= _stack_norm(spec, own)
    return table


def _fed(spec: TransformerSpec, own: Forward) -> Table:
    """What the MLP keeps."""
    numbers = own.part(spec.intermediate_size)
    features = own.width * numbers
    table: Table = {"activation": gate_bytes(features, own) if spec.gated else features}
    if spec.activation != "relu" or spec.gated or spec.mlp_dropout > 0:
        table["input of down projection"] = features
    if spec.mlp_dropout > 0:
        table["dropout of features"] = numbers
    return table


def _stack_norm(spec: TransformerSpec, own: Forward) -> Table:
    numbers = own.rows * spec.hidden_size
    table = norm_table("rms", "norm of the stack", numbers, own.rows, own)
    if spec.final_dropout > 0:
        table["dropout after the stack"] = numbers
    return table


def stack_head_table(spec: TransformerSpec, at: Forward, first: bool = False) -> Table:
    """What norm and head keep of the target's rows. first: as for `stack_layer_table`."""
    own = rows_of(at, False)
    table = head_table(spec, own)
    if first:
        del table["final norm: input"]
    if spec.final_dropout > 0:
        table["dropout after the stack"] = own.rows * spec.hidden_size
    return table


def _biases(spec: TransformerSpec, part: ChunkPart, at: Forward) -> tuple[Table, Table]:
    """What autograd keeps of the biases that a chunk's layers add to scores, and the biases themselves."""
    s, u = at.source, at.length - at.source
    share = at.part(spec.num_heads) // at.tokens
    kept: Table = {}
    numbers: Table = {}
    filling = at.batch if at.documents else 1
    if any(_is_encoder(spec, layer) for layer in part.layers):
        kept["distances in the source"] = INT64 * s * s + (at.batch * s if at.documents else 0)
        numbers["numbers for distances in the source"] = at.width * share * filling * s * s
    if any(spec.is_cross(layer) for layer in part.layers):
        kept["distances in the target"] = (INT64 + 1) * u * u
        numbers["numbers for distances in the target"] = at.width * share * u * u
        if at.documents:
            kept["filling of the source"] = at.width * at.batch * s
    return kept, numbers


def stack_chunk_table(
    spec: TransformerSpec, part: ChunkPart, recompute: Recompute, at: Forward
) -> Table:
    """Like `chunk_table` (chunk_tables.py)."""
    selective = recompute == "selective"
    every = 0 if selective else int(recompute)
    encoders = [layer for layer in part.layers if _is_encoder(spec, layer)]
    decoders = [layer for layer in part.layers if not _is_encoder(spec, layer)]
    table: Table = {"embedding": total(embedding_table(spec, at))} if part.first else {}
    table["rows of both stacks"] = at.hidden(spec)
    if decoders:
        size = at.width * at.batch * at.source * spec.hidden_size
        # The rows of a single sample are already contiguous.
        table["what the encoder gives"] = size if encoders or at.batch > 1 else 0
    firsts = {*encoders[:1], *decoders[:1]}
    kept, numbers = _biases(spec, part, at)
    table |= kept
    if not every:
        for layer in part.layers:
            own = stack_layer_table(spec, layer, at, selective, layer in firsts)
            table[f"layer {layer}"] = total(own)
    if every or selective or at.device != "cpu":
        table["angles"] = total(numbers)
    for group in groups(part.layers, every)[:-1]:
        table[f"what layers {group[0]} to {group[-1]} give"] = _given(spec, group, at, encoders)
    if part.last:
        table["final norm, head, loss"] = total(stack_head_table(spec, at, not decoders)) + FP32
    return table


def _given(spec: TransformerSpec, group: range, at: Forward, encoders: list[int]) -> int:
    """Bytes that a group of recomputed layers passes to the next, without the encoder's output, which is counted."""
    size = at.width * at.batch * spec.hidden_size
    source = group[0] in encoders and group[-1] + 1 < spec.encoder_layers
    target = group[-1] >= spec.encoder_layers
    return size * (source * at.source + target * (at.length - at.source))


def stack_recomputed_bytes(
    spec: TransformerSpec, layers: range, recompute: Recompute, at: Forward
) -> int:
    """As recomputed_bytes."""
    whole = {layer: total(stack_layer_table(spec, layer, at)) for layer in layers}
    if recompute == "selective":
        kept = {layer: total(stack_layer_table(spec, layer, at, True)) for layer in layers}
        return max((whole[layer] - kept[layer] for layer in layers), default=0)
    sums = (sum(whole[layer] for layer in group) for group in groups(layers, int(recompute)))
    return max(sums, default=0)


def stack_waiting_table(spec: TransformerSpec, part: ChunkPart, at: Forward) -> Table:
    """As waiting_table."""
    table: Table = {}
    for layer in part.layers:
        table[f"layer {layer}"] = total(_waiting_layer(spec, layer, at))
    size, e = spec.hidden_size, at.width
    has_decoders = any(spec.is_cross(layer) for layer in part.layers)
    if has_decoders:
        table["what the encoder gives"] = e * at.batch * at.source * size
    if part.layers and not part.last and at.batch == 1:
        # The last layer's gradient is a view of that of both stacks; with more than one sample it is a copy.
        others = at.source if has_decoders else at.length - at.source
        table["the other stack's gradient"] = e * at.batch * others * size
    tables = 2 * spec.stacks.buckets * (at.part(spec.num_heads) // at.tokens) if spec.stacks else 0
    table["tables of distances"] = e * tables
    if part.first:
        table["embedding"] = INT64 * at.tokens + e * at.tokens * size
    if part.last:
        table["final norm"] = e * spec.norm_parameters
    return table


def _waiting_layer(spec: TransformerSpec, layer: int, at: Forward) -> Table:
    h, e, is_cross = spec.head_size, at.width, spec.is_cross(layer)
    own = rows_of(at, not is_cross)
    g, q = e * own.tokens * spec.hidden_size, e * own.part(spec.num_heads * h, h)
    f = e * own.part(spec.intermediate_size)
    norms = 2 + is_cross + (layer + 1 == spec.encoder_layers)
    table = {
        "query, key, value: input, gradients": g + 3 * q,
        "output projection: input, gradient": q + g,
        "norms": e * spec.norm_parameters * norms,
        "gate, up: input, gradients": g + f * (2 if spec.gated else 1),
        "down projection: input, gradient": f + g,
    }
    if is_cross:
        k = e * rows_of(at, True).part(spec.num_heads * h, h)
        table["cross query, key, value: input, gradients"] = g + q + 2 * k
        table["cross output projection: input, gradient"] = q + g
    return table
