"""Activations that a forward pass keeps for backward, in bytes, operation by operation: a prediction that needs no
model.

arXiv 2205.05198 (section 4.1) counts s·b·h·(34 + 5·a·s/h) bytes per layer in 16 bits. These tables differ: SDPA keeps
no scores, and without dropout there are no masks. An element has e bytes. Counts of elements: r = b·s·h hidden states
between the split products (/ t with sequence parallelism); g = b·s·h hidden states that a split product reads; q, k and
f, the rank's queries, keys and intermediate features. A layer keeps the following; each storage is counted once:

    LayerNorm                         its input e·r; mean and deviation
    RMSNorm                           its input e·r; a root mean square per token
    input of query, key and value     e·g: the norm's result, gathered with sequence parallelism
    router of E experts               its input 4·b·s·h; probabilities 4·b·s·E; choices 8·b·s·k and their weights
                                      e·b·s·k; 4·b·s·(k + 1) more if these are normalised, and 4·b·s if their sum has
                                      a lower bound; the logits with z-loss
    experts, k of them per token      k times what an MLP keeps for its activation and down projection; their input and
                                      output rows, 2·e·b·s·k·h; two permutations of 8·b·s·k, four with an expert axis
    shared expert                     what an MLP keeps for its activation and down projection; if it has a gate, its
                                      result e·b·s·h and the gate's e·b·s; in 16 bits its input e·b·s·h, which in fp32
                                      is the router's
    norms of queries and keys         as norms, over q and k; if the tensor axis splits them, the input in fp32 and
                                      the factor of their weight
    queries, keys, values             e·(q + 2·k), as attention reads them
    core of attention                 log-sum-exps 4·b·s·a / t; a mask e·s·s if a window or documents need one;
                                      with dropout, instead of both, the weights (4 + e + 1)·b·a·s·s / t; on a GPU
                                      prefixes need twice the log-sum-exps and 2·e·q more
    input of the output projection    e·q: attention's result
    with c ranks of the context axis  s is a rank's tokens; keys and values are those of whole samples, c·k, masks and
                                      weights s by c·s; if heads are exchanged for tokens, c·s by c·s for a / c heads,
                                      and attention's result twice
    input of gate and up              e·g, as above (none if they read attention's input, without sequence parallelism)
    activation                        its input e·f; if gated, also both factors, 3·e·f in all, compiled 2·e·f
    input of the down projection      e·f (for ReLU the activation's result, counted once)
    dropout before each residual sum  r bytes, twice

    dense layer before the head       its input and its activation's, e·r each; the norm after it as above
    head of a classifier              a few rows of h elements per text, which are not counted

If a norm follows the residual sum, the layer's input is that of query, key and value. `selective` keeps nothing of the
core. tests/distributed/test_activations.py compares each table with what autograd saves. Next: chunk_tables.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megalite.model.spec import Mixture, TransformerSpec
from megalite.model.varlen import kernel_takes
from megalite.parallel.collectives import Split
from megalite.parallel.layers import share
from megalite.parallel.loss import block_rows, chunk_rows, gradient_type, row_length

FP32, INT32, INT64 = 4, 4, 8
Table = dict[str, int]
"""Bytes by operation."""


@dataclass(frozen=True)
class Forward:
    """The forward of one training micro-batch on one rank, which has `length` tokens of each of `batch` samples.

    context: ranks of the context axis, which divide the samples; by_heads: whether they exchange heads for tokens
    (parallel/rows.py); experts: ranks of the expert axis; compiled: `megalite.train.compile`; source: tokens of an
    encoder-decoder's source (stacks.py); prefixes: whether documents have prefixes with bidirectional attention.
    """

    batch: int
    length: int
    dtype: torch.dtype
    split: Split
    documents: bool = False
    device: str = "cpu"
    context: int = 1
    by_heads: bool = False
    experts: int = 1
    compiled: bool = False
    source: int = 0
    prefixes: bool = False

    @property
    def whole(self) -> int:
        """Tokens of a sample over all ranks of the context axis."""
        return self.length * self.context

    @property
    def width(self) -> int:
        """Bytes per element."""
        return self.dtype.itemsize

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def rows(self) -> int:
        """Tokens that a rank holds between the split products."""
        return self.batch * len(self.split.rows(self.length))

    def hidden(self, spec: TransformerSpec) -> int:
        """Bytes of hidden states between the split products."""
        return self.width * self.rows * spec.hidden_size

    def part(self, features: int, unit: int = 1) -> int:
        """Elements of this rank's part of `features`, which the tensor axis splits in multiples of `unit`."""
        start, stop = share(features, self.split.axis, unit)
        return self.tokens * (stop - start)


def norm_table(kind: str, name: str, elements: int, groups: int, at: Forward) -> Table:
    """What a norm of `elements` elements keeps; each of their `groups` groups has its own statistics. kind: `layer`,
    `rms`, or `split`, over features that the tensor axis splits."""
    if kind == "layer":
        return {
            f"{name}: input": at.width * elements,
            f"{name}: mean, deviation": 2 * at.width * groups,
        }
    if kind == "rms":
        return {f"{name}: input": at.width * elements, f"{name}: root mean square": FP32 * groups}
    return {
        f"{name}: input in fp32": FP32 * elements,
        f"{name}: root mean square": FP32 * groups,
        f"{name}: factor of its weight": at.width * elements,
    }


def layer_table(spec: TransformerSpec, layer: int, at: Forward, selective: bool = False) -> Table:
    """What one layer keeps. selective: whether the core of attention is recomputed."""
    return attention_table(spec, layer, at, selective) | mlp_table(spec, layer, at)


def attention_table(
    spec: TransformerSpec, layer: int, at: Forward, selective: bool = False
) -> Table:
    """What a layer's attention keeps, with its norm and the dropout of its result."""
    elements, table = at.rows * spec.hidden_size, {}
    if spec.kind(layer).has_attention_norm:
        table |= norm_table(spec.norm, "attention norm", elements, at.rows, at)
    table["input of query, key, value"] = at.width * at.tokens * spec.hidden_size
    table |= _attention(spec, layer, at, selective)
    if spec.hidden_dropout > 0:
        table["dropout of attention's result"] = elements
    return table


def mlp_table(spec: TransformerSpec, layer: int, at: Forward) -> Table:
    """What a layer's MLP or experts keep, with their norm and the dropout of their result."""
    elements, table = at.rows * spec.hidden_size, {}
    if not spec.shared_norm:
        table |= norm_table(spec.norm, "MLP norm", elements, at.rows, at)
    if spec.parallel:  # attention's norm keeps the same input
        table.pop("MLP norm: input", None)
    mixture = spec.mixture_of(layer)
    if mixture is not None:
        table |= _routed(spec, mixture, at)
    else:
        if not spec.shared_norm or at.split.divides:
            table["input of gate, up"] = at.width * at.tokens * spec.hidden_size
        features = at.width * at.part(spec.intermediate_size)
        table["activation"] = gate_bytes(features, at) if spec.gated else features
        if spec.activation != "relu" or spec.gated:
            table["input of down projection"] = features
    if spec.hidden_dropout > 0 and spec.drops_mlp:
        table["dropout of the MLP's result"] = elements
    return table


def gate_bytes(features: int, at: Forward) -> int:
    """Bytes that a gate keeps: its two inputs, and its activation unless that is recomputed (`megalite.train.compile`).
    features: bytes of one of them."""
    return (2 if at.compiled else 3) * features


def _routed(spec: TransformerSpec, mixture: Mixture, at: Forward) -> Table:
    """What a layer's router and experts keep, if a rank's experts get as many rows as its tokens choose experts."""
    t, k, d, count = at.tokens, mixture.chosen, spec.hidden_size, mixture.count
    rows, features = at.width * t * k * d, at.width * k * at.part(mixture.intermediate_size)
    table = {
        "router: input in fp32": FP32 * t * d,
        "router: probabilities": FP32 * t * count,
        "router: choice": INT64 * t * k,
        "router: weights": at.width * t * k,
        "router: tally": INT64 * count,
        "experts: order": 2 * INT64 * t * k,
        "experts: ends": INT32 * (count // at.experts),
        "input of gate, up": rows,
        "activation": gate_bytes(features, at),
        "input of down projection": features,
        "factors of the weights": rows,
    }
    if mixture.normalised:
        table["router: weights, their sums"] = FP32 * (t * k + t)
        table["router: sums before their lower bound"] = FP32 * t if mixture.least_sum > 0 else 0
    if at.width < FP32:
        table["router: weight in fp32"] = FP32 * count * d
    if mixture.balance == "sample" and mixture.balance_coefficient > 0:
        table["router: shares of the samples"] = FP32 * at.batch * count
    if mixture.z_loss > 0:
        table["router: logits, log-sum-exps"] = FP32 * t * (count + 1)
    if at.experts > 1:
        table["experts: order of arrived rows"] = 2 * INT64 * t * k
    return table | (_shared(spec, mixture, at) if mixture.shared_size else {})


def _shared(spec: TransformerSpec, mixture: Mixture, at: Forward) -> Table:
    """What the shared expert keeps."""
    hidden = at.width * at.tokens * spec.hidden_size
    features = at.width * at.part(mixture.shared_size)
    table = {
        "shared: input": hidden
        if at.width < FP32
        else 0,  # in fp32 the router keeps the same tensor
        "shared: activation": gate_bytes(features, at),
        "shared: input of down projection": features,
    }
    if mixture.shared_is_weighed:
        table["shared: factor of its weight"] = hidden
        table["shared: weight"] = at.width * at.tokens
    return table


def _attention(spec: TransformerSpec, layer: int, at: Forward, selective: bool) -> Table:
    """What attention keeps between the input of query, key and value and the output projection's product."""
    h, e = spec.head_size, at.width
    queries = at.part(spec.num_heads * h, h)
    keys = at.part(spec.num_kv_heads * h, h)
    table: Table = {}
    if spec.qk_norm != "none":
        by_head = spec.qk_norm == "head"
        kind = spec.norm if by_head or at.split.axis.size == 1 else "split"
        for name, elements in (("query norm", queries), ("key norm", keys)):
            table |= norm_table(kind, name, elements, elements // h if by_head else at.tokens, at)
    core: Table = {}
    if not selective:  # selective keeps only the rank's own keys, not those of whole samples
        core, keys = core_table(spec, layer, at)
    table |= {"queries": e * queries, "keys": e * keys, "values": e * keys}
    return table | core | {"input of output projection": e * queries}


def core_table(spec: TransformerSpec, layer: int, at: Forward) -> tuple[Table, int]:
    """What the core of attention keeps besides its inputs, and the number of elements of the keys that it reads; the
    values have as many."""
    h, e = spec.head_size, at.width
    queries = at.part(spec.num_heads * h, h)
    own_heads = queries // (at.tokens * h)
    heads, key_heads = own_heads, at.part(spec.num_kv_heads * h, h) // (at.tokens * h)
    # Each of s tokens attends to t. The context axis divides either the heads or the tokens of the queries.
    s, t = at.length, at.whole
    by_heads = at.by_heads and at.context > 1
    by_run = at.context > 1 and not by_heads
    if by_heads:
        s = at.whole
        heads, key_heads = heads // at.context, max(1, key_heads // at.context)
    window = spec.window(layer)
    masked = at.documents or (window is not None and window < t)
    masks = at.batch if at.documents else 1
    if spec.attention_dropout > 0:
        core = {"attention: weights": (FP32 + e + 1) * at.batch * heads * s * t}
        if masked or spec.causal:
            core["attention: mask"] = s * t * masks
        return core, at.batch * t * heads * h  # keys are repeated for each query head
    core = {"attention: log-sum-exps": FP32 * at.tokens * own_heads}
    in_pieces = masked and kernel_takes(at.device, at.dtype, h) and (spec.causal or not by_run)
    with_mask = masked and not in_pieces
    if with_mask:
        core["attention: mask"] = e * s * t * masks
    if in_pieces and at.prefixes:  # three results: causal, bidirectional, and their combination
        core["attention: results in halves"] = 2 * e * queries
        core["attention: log-sum-exps"] *= 2
    if in_pieces and by_run:
        t += at.length // 2  # keys before both runs are copied twice
    in_runs = by_run and spec.causal and at.device != "cpu" and not with_mask
    if by_heads or in_runs:  # concatenated for the output projection
        core["attention: result in parts"] = e * queries
    return core, at.batch * t * key_heads * h


def embedding_table(spec: TransformerSpec, at: Forward) -> Table:
    """What the embedding keeps: indices, since the backward of a look-up needs no values."""
    split = at.split.axis.size > 1
    table = {"ids": INT64 * at.tokens}
    if split:
        table["ids of other ranks"] = at.tokens
    if spec.position_rows:
        own = at.documents or spec.position_offset  # each sample has its own positions
        table["positions"] = INT64 * (at.tokens if own else at.length)
    if spec.embedding_norm:
        table |= norm_table(spec.norm, "embedding norm", at.rows * spec.hidden_size, at.rows, at)
    if spec.embedding_dropout > 0:
        table["dropout of embeddings"] = at.rows * spec.hidden_size
    return table


def head_table(spec: TransformerSpec, at: Forward) -> Table:
    """What the final norm and the head with its loss keep: no logits, but the gradients, which forward computes."""
    elements, table = at.rows * spec.hidden_size, {}
    if spec.final_norm:
        table |= norm_table(spec.norm, "final norm", elements, at.rows, at)
    if spec.classifier is not None:  # a few rows per text, which are not counted
        return table
    if spec.head_transform:
        table["dense: input"] = at.width * elements
        if spec.head_transform != "relu":  # ReLU keeps its result, the norm's input
            table["dense: input of its activation"] = at.width * elements
        table |= norm_table(spec.norm, "norm of the dense layer", elements, at.rows, at)
    start, stop = share(spec.vocabulary_size, at.split.axis)
    wide = gradient_type(at.dtype).itemsize
    sums = wide if _loss_rows(spec, at) >= at.tokens else FP32
    table["loss: gradient of its input"] = wide * at.tokens * spec.hidden_size
    table["loss: gradient of its weight"] = sums * (stop - start) * spec.hidden_size
    if spec.head_bias:
        table["loss: gradient of its bias"] = FP32 * (stop - start)
    return table


def logits_bytes(spec: TransformerSpec, at: Forward) -> int:
    """Bytes of a chunk's logits in the loss: the logits, and in 16 bits a copy in fp32: with fp16 of all of them, with
    bf16 of one block, which on a CPU is a few rows."""
    if spec.classifier is not None:
        return 0
    start, stop = share(spec.vocabulary_size, at.split.axis)
    rows, ranks, columns = _loss_rows(spec, at), at.split.axis.size, stop - start
    held = at.width * rows * row_length(columns, at.width, at.device)
    if at.dtype == torch.float16:  # its gradients are computed in fp32
        held += FP32 * rows * row_length(columns, FP32, at.device)
    elif at.width < FP32 and (ranks > 1 or at.device != "cpu"):
        largest = -(-spec.vocabulary_size // ranks)
        held += FP32 * block_rows(rows, largest, ranks, at.device) * columns
    return held


def _loss_rows(spec: TransformerSpec, at: Forward) -> int:
    """Number of tokens in a chunk of the loss."""
    columns = -(-spec.vocabulary_size // at.split.axis.size)
    return chunk_rows(
        at.tokens, spec.hidden_size, columns, gradient_type(at.dtype).itemsize, at.device
    )


def angles_table(spec: TransformerSpec, layers: Iterable[int], at: Forward) -> Table:
    """The rotary tables that a chunk's layers share."""
    kinds = {spec.rotary_of(layer) for layer in layers}
    pairs = sum((rotary.size + 1) // 2 for rotary in kinds if rotary is not None)
    positions = at.tokens if at.documents else at.length
    return {"cosines twice, sines": 3 * at.width * pairs * positions}


def total(table: Table) -> int:
    """Bytes of all operations."""
    return sum(table.values())
