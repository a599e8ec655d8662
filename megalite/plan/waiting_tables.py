"""What a chunk keeps of one micro-batch if a schedule splits its backward: between I, which computes the input's
gradient, and W, which computes those of the weights. Counts of elements as in activations.py.
"""

from megalite.model.spec import Mixture, TransformerSpec
from megalite.plan.activations import INT32, INT64, Forward, Table, total
from megalite.plan.chunk_tables import ChunkPart


def waiting_table(spec: TransformerSpec, part: ChunkPart, at: Forward) -> Table:
    """What a chunk keeps of one micro-batch between I and W, in bytes by layer or part: for each product with a weight
    its input and the gradient of its result, and the gradients of small weights, which I computes. The head's weights
    get their gradients in I."""
    table: Table = {}
    for layer in part.layers:
        table[f"layer {layer}"] = total(_waiting_layer(spec, layer, at))
    norm = at.width * spec.norm_parameters
    if part.first:
        row = at.width * spec.hidden_size
        table["embedding"] = INT64 * at.tokens + at.tokens * row
        table["positions, types"] = (spec.position_rows + spec.token_types) * row
        if spec.embedding_norm:
            table["embedding norm"] = norm
    if part.last:
        if spec.final_norm:
            table["final norm"] = norm
        if spec.head_transform and spec.classifier is None:
            table["dense: input, gradient"] = 2 * at.hidden(spec)
            table["norm of the dense layer"] = norm
    return table


def _waiting_layer(spec: TransformerSpec, layer: int, at: Forward) -> Table:
    """What one layer keeps. g, q, k and f: bytes of the elements that activations.py counts under these names."""
    h, e = spec.head_size, at.width
    g = e * at.tokens * spec.hidden_size
    q = e * at.part(spec.num_heads * h, h)
    k = e * at.part(spec.num_kv_heads * h, h)
    norms = 1 if spec.shared_norm else 2
    if layer == 0 and not spec.first_norm:
        norms -= 1
    biases = spec.attention_output_bias + spec.mlp_bias
    table = {
        "query, key, value: input, gradients": g + q + 2 * k,
        "output projection: input, gradient": q + g,
        "norms": e * spec.norm_parameters * norms,
        "biases of output, down": e * spec.hidden_size * biases,
    }
    mixture = spec.mixture_of(layer)
    if mixture is not None:
        return table | _waiting_experts(spec, mixture, at)
    f = e * at.part(spec.intermediate_size)
    table["gate, up: gradients"] = 2 * f if spec.gated else f
    table["down projection: input, gradient"] = f + g
    if not spec.shared_norm or at.split.divides:
        table["gate, up: input"] = g
    return table


def _waiting_experts(spec: TransformerSpec, mixture: Mixture, at: Forward) -> Table:
    """What a layer's router, experts and shared expert keep."""
    e, table = at.width, {}
    g = e * at.tokens * spec.hidden_size
    if mixture.shared_size:
        features = e * at.part(mixture.shared_size)
        weight = e * spec.hidden_size if mixture.shared_is_weighed else 0
        table["shared: input, gradients of gate, up"] = g + 2 * features
        table["shared: input, gradient of down projection"] = features + g
        table["shared: gradient of its weight"] = weight
    rows = mixture.chosen * g
    f = e * mixture.chosen * at.part(mixture.intermediate_size)
    table["router: gradient"] = e * mixture.count * spec.hidden_size
    table["experts: ends"] = INT32 * (mixture.count // at.experts)
    table["gate, up: input, gradients"] = rows + 2 * f
    table["down projection: input, gradient"] = f + rows
    return table
