"""What a forward pass keeps for backward, in bytes, operation by operation: a prediction that needs no model.

arXiv 2205.05198 (section 4.1) counts s·b·h·(34 + 5·a·s/h) bytes a layer in 16 bits. Ours differ, since SDPA keeps no
scores, and dropout that is off has no masks. With e bytes a number, r = b·s·h numbers between the split products
(/ t with sequence parallelism), g = b·s·h numbers that a split product reads, q, k and f numbers of the rank's queries,
keys and intermediate features, a layer keeps, each storage counted once:

    norm, LayerNorm                   its input e·r; mean and deviation
    norm, RMSNorm                     its input e·r; a root mean square a token
    input of query, key and value     e·g: the norm's result, or with sequence parallelism what is gathered of it
    router of E experts               its input 4·b·s·h; probabilities 4·b·s·E; 8·b·s·k of the choice and e·b·s·k
                                      weights, 4·b·s·(k + 1) more where they are normalised, and 4·b·s where the sum
                                      has a least; with z-loss the logits
    experts, k of them a token        k times what an MLP keeps of its activation and down projection; twice e·b·s·k·h,
                                      the rows that they read and give; two orders of 8·b·s·k, four with an expert axis
    shared expert                     what an MLP keeps of its activation and down projection; where it is weighed its
                                      result e·b·s·h and weight e·b·s; in 16 bits its input e·b·s·h, which in fp32 is
                                      the router's
    norms of queries and keys         as norms, over q and k; where the tensor axis splits them, the input in fp32 and
                                      what the weight multiplies
    queries, keys, values             e·(q + 2·k), as attention reads them
    core of attention                 the logarithms 4·b·s·a / t; a mask e·s·s where a window or documents need one;
                                      with dropout instead of both the weights (4 + e + 1)·b·a·s·s / t; on a GPU
                                      prefixes take the logarithms twice and 2·e·q more
    input of the output projection    e·q: what attention gives
    with c ranks of the context axis  s is a rank's tokens; keys and values are those of whole samples, c·k, and masks
                                      and weights s by c·s; where heads are exchanged for tokens, c·s by c·s for a / c
                                      heads, and what attention gives twice
    input of gate and up              e·g, as above (none where the attention's is read, without sequence parallelism)
    activation                        its input e·f; gated, both factors too 3·e·f, compiled 2·e·f
    input of the down projection      e·f (ReLU's is its own result)
    dropout of what is added          r bytes, twice

    dense layer before the head       its input e·r and its activation's; the norm after it as above
    head of a classifier              of each text a few rows of h numbers, which are left out

Where a norm reads a sum, the layer's own input is that of query, key and value. `selective` leaves out the core.
tests/distributed/test_activations.py holds each table against what autograd saves. Next: chunk_tables.py.
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
    """A training pass of one micro-batch of `batch` samples on a rank of the tensor axis, which has `length` tokens of
    each sample.

    context: ranks of the context axis, which divide the samples; by_heads: whether they exchange heads for tokens
    (parallel/rows.py); experts: ranks of the expert axis; compiled: `megalite.train.compile`; source: tokens of an
    encoder-decoder's source (stacks.py); prefixes: whether documents have some that are seen both ways.
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
        """Tokens of a sample, on all ranks of the context axis."""
        return self.length * self.context

    @property
    def width(self) -> int:
        """Bytes of a number."""
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
        """This rank's numbers of features that the tensor axis splits."""
        start, stop = share(features, self.split.axis, unit)
        return self.tokens * (stop - start)


def norm_table(kind: str, name: str, numbers: int, groups: int, at: Forward) -> Table:
    """What a norm of so many numbers keeps, each of `groups` of them with statistics of its own. kind: `layer`, `rms`,
    or `split`: of features that the tensor axis splits."""
    if kind == "layer":
        return {
            f"{name}: input": at.width * numbers,
            f"{name}: mean, deviation": 2 * at.width * groups,
        }
    if kind == "rms":
        return {f"{name}: input": at.width * numbers, f"{name}: root mean square": FP32 * groups}
    return {
        f"{name}: input in fp32": FP32 * numbers,
        f"{name}: root mean square": FP32 * groups,
        f"{name}: what its weight multiplies": at.width * numbers,
    }


def layer_table(spec: TransformerSpec, layer: int, at: Forward, selective: bool = False) -> Table:
    """What one layer keeps; `selective`: the core of attention is recomputed."""
    return attention_table(spec, layer, at, selective) | mlp_table(spec, layer, at)


def attention_table(
    spec: TransformerSpec, layer: int, at: Forward, selective: bool = False
) -> Table:
    """What a layer's attention keeps, with its norm and the dropout of its result."""
    numbers, table = at.rows * spec.hidden_size, {}
    if spec.kind(layer).has_attention_norm:
        table |= norm_table(spec.norm, "attention norm", numbers, at.rows, at)
    table["input of query, key, value"] = at.width * at.tokens * spec.hidden_size
    table |= _attention(spec, layer, at, selective)
    if spec.hidden_dropout > 0:
        table["dropout of attention's result"] = numbers
    return table


def mlp_table(spec: TransformerSpec, layer: int, at: Forward) -> Table:
    """What a layer's MLP or experts keep, with their norm and the dropout of their result."""
    numbers, table = at.rows * spec.hidden_size, {}
    if not spec.shared_norm:
        table |= norm_table(spec.norm, "MLP norm", numbers, at.rows, at)
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
        table["dropout of the MLP's result"] = numbers
    return table


def gate_bytes(features: int, at: Forward) -> int:
    """Its two inputs, and its activation, unless that is made again (`megalite.train.compile`)."""
    return (2 if at.compiled else 3) * features


def _routed(spec: TransformerSpec, mixture: Mixture, at: Forward) -> Table:
    """What a layer's router and experts keep where a rank's experts get as many rows as its tokens choose."""
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
        "what the weights multiply": rows,
    }
    if mixture.normalised:
        table["router: weights, their sums"] = FP32 * (t * k + t)
        table["router: sums before they are raised"] = FP32 * t if mixture.least_sum > 0 else 0
    if at.width < FP32:
        table["router: weight in fp32"] = FP32 * count * d
    if mixture.balance == "sample" and mixture.balance_coefficient > 0:
        table["router: shares of the samples"] = FP32 * at.batch * count
    if mixture.z_loss > 0:
        table["router: logits, their logarithms"] = FP32 * t * (count + 1)
    if at.experts > 1:
        table["experts: order of what arrives"] = 2 * INT64 * t * k
    return table | (_shared(spec, mixture, at) if mixture.shared_size else {})


def _shared(spec: TransformerSpec, mixture: Mixture, at: Forward) -> Table:
    """What the shared expert keeps."""
    hidden = at.width * at.tokens * spec.hidden_size
    features = at.width * at.part(mixture.shared_size)
    table = {
        "shared: input": hidden if at.width < FP32 else 0,  # of fp32 the router keeps the same
        "shared: activation": gate_bytes(features, at),
        "shared: input of down projection": features,
    }
    if mixture.shared_is_weighed:
        table["shared: what its weight multiplies"] = hidden
        table["shared: weight"] = at.width * at.tokens
    return table


def _attention(spec: TransformerSpec, layer: int, at: Forward, selective: bool) -> Table:
    """Between the input of query, key, value and the output projection's product."""
    h, e = spec.head_size, at.width
    queries = at.part(spec.num_heads * h, h)
    keys = at.part(spec.num_kv_heads * h, h)
    table: Table = {}
    if spec.qk_norm != "none":
        by_head = spec.qk_norm == "head"
        kind = spec.norm if by_head or at.split.axis.size == 1 else "split"
        for name, numbers in (("query norm", queries), ("key norm", keys)):
            table |= norm_table(kind, name, numbers, numbers // h if by_head else at.tokens, at)
    core: Table = {}
    if not selective:  # which keeps a rank's own keys, not those of the whole samples
        core, keys = core_table(spec, layer, at)
    table |= {"queries": e * queries, "keys": e * keys, "values": e * keys}
    return table | core | {"input of output projection": e * queries}


def core_table(spec: TransformerSpec, layer: int, at: Forward) -> tuple[Table, int]:
    """What the core of attention keeps beside its inputs, and how many numbers of keys it reads, which are as many of
    values."""
    h, e = spec.head_size, at.width
    queries = at.part(spec.num_heads * h, h)
    own_heads = queries // (at.tokens * h)
    heads, key_heads = own_heads, at.part(spec.num_kv_heads * h, h) // (at.tokens * h)
    # Each of s tokens looks at t. The context axis works by heads, or each rank on its own run of tokens.
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
        return core, at.batch * t * heads * h  # keys are repeated for their queries
    core = {"attention: logarithms": FP32 * at.tokens * own_heads}
    in_pieces = masked and kernel_takes(at.device, at.dtype, h) and (spec.causal or not by_run)
    with_mask = masked and not in_pieces
    if with_mask:
        core["attention: mask"] = e * s * t * masks
    if in_pieces and at.prefixes:  # three results: causal, both ways, and what is taken of them
        core["attention: results in halves"] = 2 * e * queries
        core["attention: logarithms"] *= 2
    if in_pieces and by_run:
        t += at.length // 2  # keys before both runs are copied twice
    in_runs = by_run and spec.causal and at.device != "cpu" and not with_mask
    if by_heads or in_runs:  # put together for the output projection
        core["attention: result in parts"] = e * queries
    return core, at.batch * t * key_heads * h


def embedding_table(spec: TransformerSpec, at: Forward) -> Table:
    """What the embedding keeps: indices, since a look-up needs no values."""
    split = at.split.axis.size > 1
    table = {"ids": INT64 * at.tokens}
    if split:
        table["ids of other ranks"] = at.tokens
    if spec.position_rows:
        own = at.documents or spec.position_offset  # positions of each sample
        table["positions"] = INT64 * (at.tokens if own else at.length)
    if spec.embedding_norm:
        table |= norm_table(spec.norm, "embedding norm", at.rows * spec.hidden_size, at.rows, at)
    if spec.embedding_dropout > 0:
        table["dropout of embeddings"] = at.rows * spec.hidden_size
    return table


def head_table(spec: TransformerSpec, at: Forward) -> Table:
    """What the final norm and the head with its loss keep: no logits, but the gradients, which are made in forward."""
    numbers, table = at.rows * spec.hidden_size, {}
    if spec.final_norm:
        table |= norm_table(spec.norm, "final norm", numbers, at.rows, at)
    if spec.classifier is not None:  # of each text a few rows, which are left out
        return table
    if spec.head_transform:
        table["dense: input"] = at.width * numbers
        if spec.head_transform != "relu":  # whose result is the norm's input
            table["dense: input of its activation"] = at.width * numbers
        table |= norm_table(spec.norm, "norm of the dense layer", numbers, at.rows, at)
    start, stop = share(spec.vocabulary_size, at.split.axis)
    wide = gradient_type(at.dtype).itemsize
    sums = wide if _loss_rows(spec, at) >= at.tokens else FP32
    table["loss: gradient of its input"] = wide * at.tokens * spec.hidden_size
    table["loss: gradient of its weight"] = sums * (stop - start) * spec.hidden_size
    if spec.head_bias:
        table["loss: gradient of its bias"] = FP32 * (stop - start)
    return table


def logits_bytes(spec: TransformerSpec, at: Forward) -> int:
    """What the loss holds of a chunk's logits: themselves, and in 16 bits a copy in fp32, in bf16 of a block of them
    alone, which on a CPU is a few rows."""
    if spec.classifier is not None:
        return 0
    start, stop = share(spec.vocabulary_size, at.split.axis)
    rows, ranks, columns = _loss_rows(spec, at), at.split.axis.size, stop - start
    held = at.width * rows * row_length(columns, at.width, at.device)
    if at.dtype == torch.float16:  # whose gradients are made in fp32
        held += FP32 * rows * row_length(columns, FP32, at.device)
    elif at.width < FP32 and (ranks > 1 or at.device != "cpu"):
        largest = -(-spec.vocabulary_size // ranks)
        held += FP32 * block_rows(rows, largest, ranks, at.device) * columns
    return held


def _loss_rows(spec: TransformerSpec, at: Forward) -> int:
    """Tokens of a chunk of the loss."""
    columns = -(-spec.vocabulary_size // at.split.axis.size)
    return chunk_rows(
        at.tokens, spec.hidden_size, columns, gradient_type(at.dtype).itemsize, at.device
    )


def angles_table(spec: TransformerSpec, layers: Iterable[int], at: Forward) -> Table:
    """What these layers of a chunk share."""
    kinds = {spec.rotary_of(layer) for layer in layers}
    pairs = sum((rotary.size + 1) // 2 for rotary in kinds if rotary is not None)
    positions = at.tokens if at.documents else at.length
    return {"cosines twice, sines": 3 * at.width * pairs * positions}


def total(table: Table) -> int:
    """Bytes of all operations."""
    return sum(table.values())
