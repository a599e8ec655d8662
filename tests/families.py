"""Small models of every family, with odd sizes, and transformers' own models with the same random weights."""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from megalite.checkpoint.saved_bias import set_router_bias
from megalite.hub.names import hf_auto_class, state_of
from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import Placement, placed
from tests.hf_tensors import from_hf

VOCABULARY, SEQUENCE, BATCH = 131, 13, 3
SOURCE = 8  # source tokens of an encoder-decoder within the sequence
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 16,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MODERNBERT_IDS = {"pad_token_id": 7, "cls_token_id": 1, "sep_token_id": 2}
_T5: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": 36,
    "d_kv": 8,
    "d_ff": 50,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 6,
    "relative_attention_num_buckets": 9,
    "relative_attention_max_distance": 7,
    "dropout_rate": 0.0,
    "pad_token_id": 7,
    "eos_token_id": 2,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        **_SIZES,
        "model_type": "llama",
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 8,
        "pad_token_id": 7,
        "rope_parameters": {**_LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8},
    },
    "mistral": {**_SIZES, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {
        **_SIZES,
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "rope_parameters": {**_YARN, "rope_theta": 1e4},
    },
    "qwen2_moe": {
        **_SIZES,
        "model_type": "qwen2_moe",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 22,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [2],
    },
    "qwen3": {
        **_SIZES,
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 10,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "smollm3": {
        **_SIZES,
        "model_type": "smollm3",
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "no_rope_layer_interval": 2,
        "pad_token_id": 7,
    },
    "olmo2": {
        **_SIZES,
        "model_type": "olmo2",
        "num_key_value_heads": 2,
        "pad_token_id": 100,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "mixtral": {
        **_SIZES,
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **_SIZES,
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 10,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "moe_intermediate_size": 24,  # a size that grouped_mm supports, also when halved
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmoe": {
        **_SIZES,
        "model_type": "olmoe",
        "num_key_value_heads": 2,
        "pad_token_id": 100,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "ernie4_5_moe": {
        **_SIZES,
        "model_type": "ernie4_5_moe",
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "pad_token_id": 7,
        "moe_intermediate_size": 24,
        "moe_num_experts": 7,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
    },
    "gpt2": {
        **_GPT,
        **_NO_DROPOUT,
        "model_type": "gpt2",
        "n_inner": 50,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gptj": {
        **_GPT,
        **_NO_DROPOUT,
        "model_type": "gptj",
        "rotary_dim": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {
        **_SIZES,
        "model_type": "gpt_neox",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.7,
        },
    },
    "gpt_neox sequential": {
        **_SIZES,
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "attention_bias": False,
        "max_position_embeddings": 8,  # shorter than the batch: the frequencies change
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 1e4,
            "factor": 2.0,
            "partial_rotary_factor": 1.0,
        },
    },
    "phi": {
        **_SIZES,
        "model_type": "phi",
        "qk_layernorm": True,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.7,
        },
    },
    "bert": {
        **_SIZES,
        **_NO_BERT_DROPOUT,
        "model_type": "bert",
        "pad_token_id": 7,
        "type_vocab_size": 3,
    },
    "roberta": {
        **_SIZES,
        **_NO_BERT_DROPOUT,
        "model_type": "roberta",
        "pad_token_id": 7,
        "max_position_embeddings": 24,  # positions start after the padding id
        "hidden_act": "gelu_new",
        "type_vocab_size": 1,
    },
    "modernbert": {
        **_SIZES,
        **_MODERNBERT_IDS,
        "model_type": "modernbert",
        "local_attention": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1.6e5, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "modernbert with biases": {
        **_SIZES,
        **_MODERNBERT_IDS,
        "model_type": "modernbert",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "local_attention": 9,
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "decoder_bias": False,
        "hidden_activation": "silu",
        "tie_word_embeddings": False,
    },
    "eurobert": {
        **_SIZES,
        "model_type": "eurobert",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 7,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "t5": {
        **_T5,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "t5 original": {
        **_T5,
        "num_layers": 1,
        "num_decoder_layers": 3,
        "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    },
}

# Fewer key/value heads than tensor ranks, with every kind of weight that is then replicated.
_EIGHT: dict[str, Any] = {"num_attention_heads": 8, "hidden_size": 48}
FEW_KV_HEADS: list[dict[str, Any]] = [
    {**FAMILY_CONFIGS["llama"], **_EIGHT, "num_key_value_heads": 1},
    {**FAMILY_CONFIGS["qwen2"], **_EIGHT, "num_key_value_heads": 2},
    {**FAMILY_CONFIGS["qwen3"], **_EIGHT, "num_key_value_heads": 1},
    {**FAMILY_CONFIGS["olmo2"], **_EIGHT, "num_key_value_heads": 2, "attention_bias": True},
    {**FAMILY_CONFIGS["phi"], **_EIGHT, "num_key_value_heads": 2},
]


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels [BATCH, SEQUENCE], some labels ignored."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    ids[:, 4] = 7  # the padding id of one of the models
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return ids[:, :-1], labels


def hf_model(config: dict[str, Any]) -> Any:
    """transformers' model in fp32 with random weights, including norms and biases, the same at every call."""
    hf_config, spec = AutoConfig.for_model(**config), read_spec(config)
    hf_config._attn_implementation = hf_config._experts_implementation = "eager"
    model = hf_auto_class(spec).from_config(hf_config).eval()
    if spec.stacks is not None and not spec.tied:  # as when such a file is loaded
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    torch.manual_seed(5)
    # Unscaled scores cause large gradients, and large rounding.
    spread = 0.2 if spec.scaled_scores else 0.1
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name.lower() or "ln_" in name else 0.0, spread)
    return model


_EXPERT = re.compile(r"^(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$")


_RENAMED = {
    "embed_out.": "lm_head.",
    "block_sparse_moe": "mlp",
    "mlp.moe_statics": "mlp.gate.moe_statics",
}


def file_reader(values: dict[str, Tensor]) -> Callable[[str], Tensor]:
    """Reads tensors by their names in files, which transformers may rename or, for experts, stack when it loads
    them."""

    def read(name: str) -> Tensor:
        match = _EXPERT.match(name)
        if match is None:
            for theirs, loaded in _RENAMED.items():
                name = name.replace(theirs, loaded)
            return values[name]
        layer, number, matrix = match.groups()
        if matrix in ("w2", "down_proj"):
            return values[f"{layer}.mlp.experts.down_proj"][int(number)]
        gate, up = values[f"{layer}.mlp.experts.gate_up_proj"][int(number)].chunk(2)
        return gate if matrix in ("w1", "gate_proj") else up

    return read


def load_hf(stage: Stage, model: Any) -> Stage:
    """Fills a stage with its slices of transformers' weights."""
    spec, read = stage.spec, file_reader(model.state_dict())
    with torch.no_grad():
        for value, place in placed(stage):
            value.copy_(place.cut(from_hf(spec, place.name, read)))
    set_router_bias(stage, state_of(spec, read), torch.device("cpu"))
    return stage


def hf_gradients(config: dict[str, Any]) -> tuple[Tensor, float, dict[str, Tensor]]:
    """transformers' logits, sum of losses, and gradients of that sum under our names."""
    model, (tokens, labels) = hf_model(config), batch()
    if read_spec(config).stacks is None:
        logits = model(tokens).logits
    else:
        labels = labels[:, SOURCE:]
        logits = model(tokens[:, :SOURCE], decoder_input_ids=tokens[:, SOURCE:]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    loss.backward()
    spec = read_spec(config)
    read = file_reader({name: value.grad for name, value in model.named_parameters()})
    names = [place.name for _, place in placed(Stage(spec, Grid()))]
    gradients = {name: from_hf(spec, name, read) for name in names}
    return logits.detach(), loss.item(), gradients


COPIED = {"embedding.tokens.weight", "encoder_bias.weight", "decoder_bias.weight"}
"""Parameters with copies on several stages, each with its own part of the gradient."""
Result = tuple[Tensor | None, float, dict[str, tuple[Placement, Tensor]]]


def forward_backward(
    stage: Stage, tokens: Tensor, labels: Tensor, context: Context | None = None
) -> Result:
    """One micro-batch through the stages of the grid: this rank's logits (last stage), loss and gradients."""
    axis, source, logits = stage.grid.pipe, tokens, None
    if stage.spec.stacks is not None and context is None:
        context = Context(source=SOURCE)
    if not axis.is_first:
        source = torch.empty(stage.hidden_shape(*tokens.shape))
        dist.recv(source, axis.ranks[axis.rank - 1])
        source.requires_grad_()
    output = stage(source, labels if axis.is_last else None, context)
    if axis.is_last:
        with torch.no_grad():
            logits = stage(source, None, context)
        output.backward()
    else:
        dist.send(output.detach(), axis.ranks[axis.rank + 1])
        gradient = torch.empty_like(output)
        dist.recv(gradient, axis.ranks[axis.rank + 1])
        output.backward(gradient)
    if not axis.is_first:
        dist.send(source.grad, axis.ranks[axis.rank - 1])
    gradients = {
        place.name: (place, value.grad) for value, place in placed(stage) if value.grad is not None
    }
    return logits, output.item() if axis.is_last else 0.0, gradients


def full_gradients(results: list[Result]) -> dict[str, Tensor]:
    """Full gradients from all ranks' slices; those of copies on several stages are summed."""
    sums: dict[str, Tensor] = {}
    for _, _, held in results:
        for name, (place, value) in held.items():
            full = sums.setdefault(name, torch.zeros(place.full_shape))
            if place.counted or name in COPIED:
                place.cut(full).add_(value)
    return sums
