"""Hugging Face configs: every field read or refused, and rotary scalings."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megalite.config import check_model, load_config
from megalite.errors import ConfigError
from megalite.model.families import load_hf_config, model_dict, read_spec
from megalite.model.rotary import frequencies
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from tests.families import FAMILY_CONFIGS, batch, hf_model, load_hf

# Fields of the config classes that have no effect on a decoder in training.
NO_EFFECT = {"use_cache", "bos_token_id", "eos_token_id", "is_decoder", "classifier_dropout"}
NO_EFFECT |= {
    "classifier_pooling",
    "deterministic_flash_attn",
    "sparse_prediction",
    "sparse_pred_ignore_index",
}
NO_EFFECT |= {"cls_token_id", "sep_token_id", "mask_token_id"}
NO_EFFECT |= {"output_router_logits"}  # megalite.train.router determines how routers are trained
NO_EFFECT |= {
    field for field in AutoConfig.for_model("gpt2").to_dict() if field.startswith("summary_")
}
OTHERS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10.0, "factor": 7.0},
    "num_key_value_heads": 1,
    "num_attention_heads": 2,
    "n_head": 2,
    "pretraining_tp": 2,
    "hidden_act": "relu",
    "activation_function": "relu",
    "pad_token_id": 11,
    "rotary_dim": 2,
    "head_dim": 14,
    "n_inner": 60,
    "max_window_layers": 0,
    "hidden_activation": "relu",
    "classifier_activation": "relu",
    "mlp_only_layers": [0],
    "no_rope_layers": [0, 1, 1],
    "moe_layer_start_index": 1,
    "router_jitter_noise": 0.1,
    "clip_qkv": 3.0,
    "feed_forward_proj": "gated-silu",
    "num_heads": 2,
}


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_every_field_of_a_config_is_read_or_refused(name: str) -> None:
    section = FAMILY_CONFIGS[name]
    spec = read_spec(section)
    defaults = AutoConfig.for_model(section["model_type"])
    own = [
        field
        for field in type(defaults).__annotations__
        if "_plan" not in field and field != "model_type"
    ]
    assert len(own) > 10
    # No padding_idx there.
    no_effect = NO_EFFECT | ({"pad_token_id"} if spec.family.startswith("gpt") else set())
    if not spec.causal:
        no_effect = no_effect - {"is_decoder"}
    for field in own:
        value = section.get(field, getattr(defaults, field))
        other = OTHERS.get(
            field, not value if isinstance(value, bool) else 0.5 if "drop" in field else None
        )
        if other is None and isinstance(value, int | float):
            other = value * 2
        if field in no_effect or other is None:
            assert field in no_effect, f"{field}: no value to try"
            continue
        try:
            assert read_spec({**section, field: other}) != spec, (
                f"{field} {value!r} -> {other!r}: not honoured"
            )
        except ConfigError as error:
            assert field in str(error), field


@pytest.mark.parametrize(
    ("family", "change", "line"),
    [
        ("llama", {"pretraining_tp": 2}, "megalite.model.pretraining_tp: 2: must be 1"),
        ("llama", {"hidden_sise": 3}, "hidden_sise: unknown key of a llama config; did you mean hidden_size?"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4}: is not supported"),
        ("llama", {"hidden_act": "tanh"}, "megalite.model.hidden_act: 'tanh': must be one of"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
         "megalite.model.rope_parameters.rope_type: 'longrope': must be one of"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "facter": 3.0}}, "facter: unknown key"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
         "rope_parameters.partial_rotary_factor: 0.5: must be 1.0: a llama model rotates whole heads"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads: 4: must divide num_attention_heads 6"),
        ("llama", {"hidden_size": 35}, "megalite.model: The hidden size (35) is not a multiple"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: 0: must be an integer of at least 1"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000: must be at most 10,000"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads: 0: must be an integer of at least 1"),
        ("gpt2", {"n_head": 0}, "n_head: 0: must be an integer of at least 1"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings: 0: must be an integer of at least 1"),
        ("llama", {"vocab_size": 10**21}, "vocab_size: 1000000000000000000000: must be at most 2,147,483,647"),
        ("llama", {"vocab_size": 2**31 - 1, "hidden_size": 6 * 2**28}, "parameters: must be at most 1,000,000,000,"),
        ("llama", {"rope_parameters": {"rope_type": {}, "rope_theta": 1e4}}, "rope_type: {}: must be one of default"),
        ("llama", {"rms_norm_eps": float("nan")}, "the norm eps is nan: must be a finite number"),
        ("phi", {"layer_norm_eps": 1e301}, "the norm eps is 1e+301: must be a finite number"),
        ("llama", {"attention_dropout": 1.5}, "attention dropout is 1.5: must be in [0, 1)"),
        ("llama", {"pad_token_id": 500}, "pad_token_id: 500: must be below vocab_size 131"),
        ("qwen3", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3}, "needs use_sliding_window"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types.0: 'chunked_attention': must be"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "megalite.model.no_rope_layers: [1, 0]: must be a list of at least"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers: [1, 0, 2]: must be a list of at least"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval: 0: must be an integer of at least 1"),
        ("smollm3", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3},
         "layer_types.0: 'sliding_attention': needs use_sliding_window true"),
        ("gptj", {"rotary_dim": 3}, "megalite.model.rotary_dim: 3: must be even"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True: must be False"),
        ("bert", {"is_decoder": True}, "megalite.model.is_decoder: True: must be False"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings: False: must be True"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size: 0: must be an integer of at least 1"),
        ("roberta", {"pad_token_id": None}, "pad_token_id: None: must be a token id: positions begin after it"),
        ("roberta", {"max_position_embeddings": 8}, "max_position_embeddings: 8: must be at least 9"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts: 0: must be an integer of at least 1"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok: 6: must be at most the number of experts 5"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1: must be 0.0 or 0"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: 8.0: must be None"),
        ("olmoe", {"router_aux_loss_coef": -1.0}, "router_aux_loss_coef: -1.0: must be a finite number of at least 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: 0: must be an integer of at least 1"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0},
         "shared_expert_intermediate_size: 0: must be an integer of at least 1"),
        ("qwen2_moe", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3},
         "layer_types.0: 'sliding_attention': needs use_sliding_window true"),
        ("qwen2_moe", {"mlp_only_layers": ["2"]}, "mlp_only_layers"),
        ("mistral", {"sliding_window": 0}, "megalite.model.sliding_window: 0: must be an integer of at least 1"),
        ("ernie4_5_moe", {"moe_norm_min": -1.0}, "moe_norm_min: -1.0: must be a finite number of at least 0"),
        ("ernie4_5_moe", {"moe_k": 0}, "moe_k: 0: must be an integer of at least 1"),
        ("ernie4_5_moe", {"moe_num_shared_experts": -1}, "num_shared_experts: -1: must be an integer of at least 0"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias: True: must be False"),
        ("eurobert", {"pretraining_tp": 2}, "megalite.model.pretraining_tp: 2: must be 1"),
        ("mamba", {}, "model_type: 'mamba': must be one of llama, mistral"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, "megalite.model.feed_forward_proj: 'gated-tanh': must be one of"),
        ("t5", {"relative_attention_max_distance": 4}, "max_distance: 4: must be above half of"),
        ("t5", {"relative_attention_num_buckets": 3}, "num_buckets: 3: must be at least 4"),
        ("t5", {"pad_token_id": None}, "pad_token_id: None: must be the token that targets begin with, below"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder: False: is not supported"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_model_is_one_line(family: str, change: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_spec({**FAMILY_CONFIGS.get(family, {}), "model_type": family, **change})
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_unknown_keys_of_a_folder_are_listed_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**FAMILY_CONFIGS["mistral"], "my_note": 1, "torch_dtype": "bfloat16", "another": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "megalite"):
        assert read_spec(str(tmp_path)) == read_spec(FAMILY_CONFIGS["mistral"])
    assert len(caplog.records) == 1 and caplog.records[0].getMessage().endswith(
        "does not use: another, my_note"
    )
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "layer_types": ["full_attention"] * 3})
    )
    with pytest.raises(ConfigError, match="layer_types"):
        read_spec(str(tmp_path))


ROPE: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
     "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 20, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "truncate": False},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1000},
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPE, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any], theta: float) -> None:
    section = {
        **FAMILY_CONFIGS["llama"],
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {**rope, "rope_theta": theta},
    }
    rotary = read_spec(json.loads(json.dumps(section))).rotary
    assert rotary is not None
    for length in (100, 5000) if rope["rope_type"] == "dynamic" else (100,):
        config = AutoConfig.for_model(**json.loads(json.dumps(section)))
        expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None, seq_len=length)
        assert torch.equal(frequencies(rotary, length), expected)
        assert rotary.attention_factor == factor


@pytest.mark.parametrize(
    ("kv_heads", "tensor", "refused"), [(2, 4, False), (1, 4, False), (4, 2, False), (3, 2, True)]
)
def test_key_value_heads_against_the_tensor_axis(kv_heads: int, tensor: int, refused: bool) -> None:
    overrides = [f"megalite.parallel.tensor={tensor}", "megalite.data.sequence_length=8"]
    config = load_config("ds_configs/tiny_cpu.json", overrides).resolve(8)
    sizes = {
        "num_attention_heads": 12,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_key_value_heads": kv_heads,
    }
    spec = read_spec({**FAMILY_CONFIGS["mistral"], **sizes})
    if not refused:
        return check_model(config, spec)
    with pytest.raises(
        ConfigError, match="tensor: 2: must divide num_key_value_heads 3 or be a multiple of it"
    ):
        check_model(config, spec)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2", {}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {}),
        ("olmo2", {}),
        ("ernie4_5_moe", {}),
        ("phi", {"qk_layernorm": False, "rope_parameters": {"partial_rotary_factor": 0.6}}),
        ("smollm3", {}),
    ],
)
def test_a_head_size_that_the_class_does_not_list_is_read(
    family: str, change: dict[str, Any]
) -> None:
    """transformers' attention uses `head_dim` if a config of these families has it."""
    section = {**FAMILY_CONFIGS[family], "head_dim": 10, **change}
    model, spec, (tokens, _) = hf_model(section), read_spec(section), batch()
    assert spec.head_size == 10
    with torch.no_grad():
        logits = load_hf(Stage(spec, Grid()), model).eval()(tokens, None)
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_layers_without_rotary_positions_are_those_of_the_list() -> None:
    """Independent of their windows; the list may be longer than the model."""
    section = {
        **FAMILY_CONFIGS["smollm3"],
        "no_rope_layers": [0, 1, 0, 1],
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }
    model, spec, (tokens, _) = hf_model(section), read_spec(section), batch()
    assert [spec.rotary_of(layer) is None for layer in range(3)] == [True, False, True]
    assert spec.windows == (None, 4, 4)
    with torch.no_grad():
        logits = load_hf(Stage(spec, Grid()), model).eval()(tokens, None)
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["olmoe", "phi", "gpt2", "gptj", "gpt_neox", "bert", "roberta", "modernbert"]
)
def test_a_head_size_that_attention_does_not_read_is_refused(family: str, tmp_path: Path) -> None:
    """transformers' attention, or a part of it, divides the hidden size by the heads and ignores `head_dim`."""
    config = {**FAMILY_CONFIGS[family], "head_dim": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_spec(str(tmp_path)).head_size == 6
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 10}))
    with pytest.raises(ConfigError, match="head_dim: 10: must be None or 6"):
        read_spec(str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_familys_end_of_text_is_not_a_models(family: str, tmp_path: Path) -> None:
    """A config in the run's JSON is for the run's tokenizer, whose end of text is another token."""
    section = FAMILY_CONFIGS[family]
    own = {key: value for key, value in section.items() if key != "eos_token_id"}
    assert model_dict(own)["eos_token_id"] is None
    assert model_dict(own | {"eos_token_id": 7})["eos_token_id"] == 7
    load_hf_config(own).save_pretrained(tmp_path)
    assert model_dict(str(tmp_path))["eos_token_id"] is not None, "a folder's config is complete"
