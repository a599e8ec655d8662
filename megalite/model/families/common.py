"""Shared code of families: rejecting a field, rotary embeddings and windows, an entry of a table of tensor names."""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megalite.config.section import shown_text
from megalite.errors import ConfigError
from megalite.model.spec import Mixture, Rotary, TransformerSpec

KEY = "megalite.model"
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
_ROPE_KEYS_OF_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LAYERS = {"num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"}
_SIZES = _LAYERS | {
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "max_position_embeddings", "sliding_window", "local_attention", "type_vocab_size", "n_embd", "n_head",
    "n_inner", "n_positions", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "decoder_sparse_step", "shared_expert_intermediate_size", "moe_num_experts", "moe_k", "moe_layer_interval",
    "d_model", "d_kv", "d_ff", "num_heads", "relative_attention_num_buckets", "relative_attention_max_distance",
    "no_rope_layer_interval",
}  # fmt: skip
_RATES = ("embedding_dropout", "attention_dropout", "hidden_dropout")
_ROTARY_NUMBERS = (
    "theta", "factor", "original_positions", "low_frequency_factor", "high_frequency_factor", "beta_fast",
    "beta_slow", "attention_factor",
)  # fmt: skip
MOST_SIZE = 2**31 - 1  # token ids and many other values must fit in 31 bits
MOST_LAYERS = 10_000
MOST_NUMBER = 1e300  # NaN is not below it
MOST_PARAMETERS = 10**15  # torch can still count their bytes
EXPERT = "{expert}"
QUERY_KEY_VALUE = tuple(f"layers.{{layer}}.attention.{name}" for name in ("query", "key", "value"))


@dataclass(frozen=True)
class HFTensor:
    """The location of one of our tensors in a Hugging Face file.

    name: with `{layer}` for the layer's number, and `{expert}` if the file has a separate tensor for each expert, which
    ours stacks along its first dim; transposed: the file stores it as [in, out]; part, parts: if the file fuses several
    of our tensors, ours is number `part` of `parts` equal parts along the output features; by_head: the parts are
    interleaved head by head.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1
    by_head: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the file has a separate tensor for each index of our first dim."""
        return EXPERT in self.name

    def of_expert(self, number: int) -> str:
        """The name of one expert's tensor."""
        return self.name.replace(EXPERT, str(number))


def tensors(names: dict[str, str], transposed: tuple[str, ...] = ()) -> dict[str, HFTensor]:
    """A table of weights and biases from a table of modules, our names to the file's. transposed: our names of modules
    whose weights the file stores transposed."""
    return {
        f"{ours}.{kind}": HFTensor(
            f"{theirs}.{kind}", transposed=kind == "weight" and ours in transposed
        )
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }


def fused(
    ours: Sequence[str], theirs: str, transposed: bool = False, by_head: bool = False
) -> dict[str, HFTensor]:
    """A table of weights and biases of our modules that the files fuse into one module, in equal parts."""
    return {
        f"{name}.{kind}": HFTensor(
            f"{theirs}.{kind}", transposed and kind == "weight", part, len(ours), by_head
        )
        for part, name in enumerate(ours)
        for kind in ("weight", "bias")
    }


def expert_tensors(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, HFTensor]:
    """A table of a layer's router and experts. block: their name in the files; gate, up, down: names of an expert's
    matrices there."""
    matrices = {"gate": gate, "up": up, "down": down}
    names = {"router": "gate"} | {
        f"experts.{ours}": f"experts.{EXPERT}.{theirs}" for ours, theirs in matrices.items()
    }
    return {
        f"layers.{{layer}}.mlp.{ours}.weight": HFTensor(
            f"model.layers.{{layer}}.{block}.{theirs}.weight"
        )
        for ours, theirs in names.items()
    }


def written(value: Any) -> str:
    """A field's value as shown in an error."""
    return shown_text(repr(value))


def require(config: Any, field: str, *allowed: Any) -> None:
    """Raises ConfigError unless a field has one of the allowed values: others change the function in an unsupported
    way."""
    value = getattr(config, field, allowed[0])
    if value not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise ConfigError(
            f"{KEY}.{field}: {written(value)}: must be {choices} (other values are not supported)"
        )


def choose(config: Any, field: str, table: dict[Any, Any]) -> Any:
    """Our name for a field's value, from the table. Raises ConfigError if the table does not have it."""
    value = getattr(config, field)
    if not isinstance(value, Hashable) or value not in table:
        raise ConfigError(
            f"{KEY}.{field}: {written(value)}: must be one of {', '.join(map(str, table))}"
        )
    return table[value]


def at_least_zero(config: Any, field: str) -> float:
    """A field's value. Raises ConfigError if it is not a finite number of at least 0."""
    value: Any = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{KEY}.{field}: {written(value)}: must be a number")
    if not 0 <= value < MOST_NUMBER:
        rule = "must be a finite number of at least 0"
        raise ConfigError(f"{KEY}.{field}: {written(value)}: {rule}")
    return value


def mixture(
    config: Any, intermediate_size: int, normalised: bool, layers: Iterable[int] | None = None
) -> Mixture | None:
    """The experts of a config. layers: those with experts, None for all layers. Returns None if no layer has any."""
    coefficient = at_least_zero(config, "router_aux_loss_coef")
    layers = tuple(range(config.num_hidden_layers) if layers is None else layers)
    if not layers:
        return None
    return Mixture(
        count=config.num_experts,
        chosen=config.num_experts_per_tok,
        intermediate_size=intermediate_size,
        normalised=normalised,
        layers=layers,
        balance_coefficient=coefficient,
    )


def routed_layers(config: Any) -> list[int]:
    """The layers of a Qwen model that have experts, by `mlp_only_layers` and `decoder_sparse_step`."""
    dense, every = config.mlp_only_layers, config.decoder_sparse_step
    if not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(
            f"{KEY}.mlp_only_layers: {written(dense)}: must be a list of layer numbers"
        )
    layers = range(config.num_hidden_layers)
    return [layer for layer in layers if layer not in dense and (layer + 1) % every == 0]


def head_size(config: Any) -> int:
    """Features per head in families that read `head_dim`: that, or hidden_size / num_attention_heads if it is not
    given."""
    given = getattr(config, "head_dim", None)
    return _equal_part(config) if given is None else given


def equal_head_size(config: Any) -> int:
    """Features per head in families whose attention, or a part of it, does not read `head_dim`: hidden_size /
    num_attention_heads."""
    size = _equal_part(config)
    require(config, "head_dim", None, size)
    return size


def _equal_part(config: Any) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        raise ConfigError(f"{KEY}.num_attention_heads: {heads}: must divide hidden_size {hidden}")
    return hidden // heads


def padding(config: Any) -> int | None:
    """`pad_token_id` as torch's Embedding interprets it: negative ids count from the end."""
    pad, size = config.pad_token_id, config.vocab_size
    if pad is None:
        return None
    if not -size <= pad < size:
        rule = f"must be below vocab_size {size} and at least -{size}"
        raise ConfigError(f"{KEY}.pad_token_id: {pad}: {rule}")
    return pad % size


def rotary(
    config: Any,
    size_of_head: int,
    parameters: Any = None,
    field: str = "rope_parameters",
    partial: bool = False,
) -> Rotary:
    """Reads `rope_parameters` in the form of transformers 5. Raises ConfigError for a type of scaling or a key that is
    not supported.

    parameters, field: the value and its name, in a config that has several; partial: whether the family's attention can
    rotate a part of each head. Most attention modules of transformers rotate whole heads whatever the config says.
    """
    given = dict(parameters or config.rope_parameters or {})
    kind: Any = given.get("rope_type", "default")
    where = f"{KEY}.{field}"
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ConfigError(
            f"{where}.rope_type: {written(kind)}: must be one of {', '.join(_ROPE_KEYS)}"
        )
    _check_rope_keys(kind, given, where)
    share = given.get("partial_rotary_factor", 1.0)
    if not partial and share != 1:
        rule = f"must be 1.0: a {config.model_type} model rotates whole heads"
        raise ConfigError(f"{where}.partial_rotary_factor: {written(share)}: {rule}")
    size = int(size_of_head * share)
    if size < 2 or size % 2:
        raise ConfigError(
            f"{where}: {size} of the head's {size_of_head} features are rotated: must be even and at least 2"
        )
    original = given.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = given.get("factor") or config.max_position_embeddings / original
    return Rotary(
        theta=given.get("rope_theta") or 10000.0,
        size=size,
        scaling=kind,  # type: ignore[arg-type]  # a key of _ROPE_KEYS
        factor=factor,
        max_positions=config.max_position_embeddings,
        original_positions=original,
        low_frequency_factor=given.get("low_freq_factor", 1.0),
        high_frequency_factor=given.get("high_freq_factor", 4.0),
        beta_fast=given.get("beta_fast") or 32.0,
        beta_slow=given.get("beta_slow") or 1.0,
        truncate=given.get("truncate", True),
        attention_factor=_yarn_attention_factor(given, factor) if kind == "yarn" else 1.0,
    )


def _check_rope_keys(kind: str, given: dict[str, Any], where: str) -> None:
    """Rejects keys that a type of scaling does not have, and numbers that are not positive."""
    known = _ROPE_KEYS[kind]
    for key in given:
        if key not in known | _ROPE_KEYS_OF_ALL:
            raise ConfigError(f"{where}.{key}: unknown key with rope_type {kind!r}")
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        needed = key in known and kind != "yarn"  # yarn's factor has a default
        if needed and not _is_positive(given.get(key)):
            rule = f"must be a positive number with rope_type {kind!r}"
            raise ConfigError(f"{where}.{key}: {written(given.get(key))}: {rule}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _yarn_attention_factor(given: dict[str, Any], factor: float) -> float:
    """YaRN's factor of sines and cosines (arXiv 2309.00071, section 3.4; mscale is DeepSeek's)."""

    def scale(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return given["attention_factor"]
    mscale, all_dims = given.get("mscale"), given.get("mscale_all_dim")
    return scale(mscale) / scale(all_dims) if mscale and all_dims else scale(1.0)


def windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's window, from `layer_types` and `sliding_window`; empty if no layer has one."""
    size = config.sliding_window if getattr(config, "use_sliding_window", True) else None
    for number, kind in enumerate(config.layer_types):
        if kind not in ("full_attention", "sliding_attention"):
            rule = (
                "must be 'full_attention' or 'sliding_attention' (other values are not supported)"
            )
            raise ConfigError(f"{KEY}.layer_types.{number}: {kind!r}: {rule}")
        if kind == "sliding_attention" and not size:
            rule = "needs use_sliding_window true and a sliding_window"
            raise ConfigError(f"{KEY}.layer_types.{number}: {kind!r}: {rule}")
    if len(config.layer_types) != config.num_hidden_layers:
        rule = f"must have num_hidden_layers {config.num_hidden_layers} entries"
        raise ConfigError(f"{KEY}.layer_types: {len(config.layer_types)} entries: {rule}")
    sliding = ["sliding" in kind for kind in config.layer_types]
    if not any(sliding):
        return ()
    return tuple(size if slides else None for slides in sliding)


def check_sizes(values: dict[str, Any], where: str = f"{KEY}.") -> None:
    """Rejects invalid sizes before transformers or a family computes with them."""
    for name in _SIZES & values.keys():
        size = values[name]
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{where}{name}: {written(size)}: must be an integer of at least 1")
        most = MOST_LAYERS if name in _LAYERS else MOST_SIZE
        if size > most:
            raise ConfigError(f"{where}{name}: {written(size)}: must be at most {most:,}")


def check_spec(spec: TransformerSpec) -> None:
    """Rejects values that give no valid model in any family."""
    for window in {*spec.windows, None}:
        check_sizes({"head_dim": spec.head_size, "sliding_window": window})
    if (count := spec.num_parameters) > MOST_PARAMETERS:
        raise ConfigError(f"{KEY}: has {count:,} parameters: must be at most {MOST_PARAMETERS:,}")
    for name, value in _numbers(spec):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and abs(value) < MOST_NUMBER):
            words = name.replace("_", " ")
            raise ConfigError(f"{KEY}: the {words} is {written(value)}: must be a finite number")
    if spec.num_heads % spec.num_kv_heads:
        rule = f"must divide num_attention_heads {spec.num_heads}"
        raise ConfigError(f"{KEY}.num_key_value_heads: {spec.num_kv_heads}: {rule}")
    if (mixture := spec.mixture) is not None and mixture.chosen > mixture.count:
        rule = f"must be at most the number of experts {mixture.count}"
        raise ConfigError(f"{KEY}.num_experts_per_tok: {mixture.chosen}: {rule}")
    rates = {f"the {name.replace('_', ' ')}": getattr(spec, name) for name in _RATES}
    if spec.classifier is not None:
        rates["the dropout of the classifier"] = spec.classifier.dropout
        rates["the dropout before the classifier's dense layer"] = spec.classifier.dense_dropout
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ConfigError(f"{KEY}: {name} is {rate}: must be in [0, 1)")


def _numbers(spec: TransformerSpec) -> Iterator[tuple[str, Any]]:
    """The numbers of a spec that are not sizes, by name."""
    for name in ("norm_eps", "init_std", *_RATES):
        yield name, getattr(spec, name)
    for rotary in (spec.rotary, spec.local_rotary):
        if rotary is not None:
            for name in _ROTARY_NUMBERS:
                yield f"rope {name}", getattr(rotary, name)
