"""Small models with awkward sizes (an odd vocabulary, grouped queries, tied and not) and one way to train them
on a layout, for tests that compare layouts."""

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig

from megalite.engine.engine import Engine
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.pipeline.actions import Pipeline
from megalite.pipeline.cut import ModelCosts
from megalite.pipeline.pipeline_plan import make_plan

VOCABULARY, SEQUENCE = 131, 12
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "mixtral": {
        "model_type": "mixtral",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 26,  # grouped_mm does not support half of it
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.05,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "router_aux_loss_coef": 0.05,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 52,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 6,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 28,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
        "router_aux_loss_coef": 0.05,
    },
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "moe_intermediate_size": 16,
        "moe_num_experts": 6,
        "moe_k": 2,
        "router_aux_loss_coef": 0.05,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "bert": {
        "model_type": "bert",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "modernbert": {
        "model_type": "modernbert",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "local_attention": 6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "cls_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
    },
}


@dataclass(frozen=True)
class Layout:
    """A run to compare: sizes of the axes, ZeRO stage, micro-batch size, dtype."""

    pipe: int = 1
    tensor: int = 1
    data: int = 1
    stage: int = 0
    micro: int = 2
    dtype: str = "fp32"
    recompute: bool = False
    offload: bool = False

    @property
    def world_size(self) -> int:
        return self.pipe * self.tensor * self.data


@dataclass(frozen=True)
class Task:
    """The training that every layout runs: a model, tied or not, on random batches with some labels ignored."""

    model: str
    tied: bool
    steps: int = 6
    batch: int = 16
    clipping: float = 0.5
    lr: float = 1e-2
    masked: bool = True

    @property
    def section(self) -> dict[str, Any]:
        return {**MODELS[self.model], "tie_word_embeddings": self.tied}

    def samples(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels [B, S] of a step's global batch."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY, (self.batch, SEQUENCE + 1), generator=generator)
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if self.masked:
            labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        return tokens, labels


def build(layout: Layout, task: Task) -> tuple[Engine, Pipeline, Grid]:
    """An engine of the task's model on this rank of the layout, with torch's AdamW."""
    deepspeed.init_distributed("gloo")
    grid = Grid.build(layout.pipe, layout.tensor)
    spec = read_spec(task.section)
    plan = make_plan("1f1b", layout.pipe, 1, None, ModelCosts.of(spec, SEQUENCE, layout.recompute))
    stage = Stage(spec, grid, plan.cut, layout.recompute).initialise(seed=1)
    tied = stage.tied_parameter
    groups = [{"params": [p for p in stage.parameters() if p is not tied]}]
    if tied is not None:
        groups.append({"params": [tied]})
    optimizer = torch.optim.AdamW(groups, lr=task.lr, eps=1e-4, weight_decay=0.01, fused=True)
    config = {
        "train_batch_size": task.batch,
        "train_micro_batch_size_per_gpu": layout.micro,
        "gradient_clipping": task.clipping,
        "zero_optimization": {
            "stage": layout.stage,
            "use_multi_rank_bucket_allreduce": False,
            "offload_optimizer": {"device": "cpu" if layout.offload else "none"},
        },
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "bf16": {"enabled": layout.dtype == "bf16"},
        "steps_per_print": 10**9,
    }
    engine = Engine(
        stage,
        grid,
        args=None,
        optimizer=optimizer,
        config=config,
        config_class=DeepSpeedConfig(config, grid),
    )
    dtype = torch.bfloat16 if layout.dtype == "bf16" else torch.float32
    return engine, Pipeline(engine, grid.pipe, plan, (layout.micro, SEQUENCE, 32), dtype), grid


def train_steps(
    engine: Engine, pipeline: Pipeline, grid: Grid, layout: Layout, task: Task, steps: range
) -> tuple[list[float], list[float]]:
    """Trains some of the task's steps; returns their losses and norms."""
    losses, norms = [], []
    count = task.batch // (layout.micro * grid.data.size)
    for step in steps:
        tokens, labels = task.samples(step)
        weight = int((labels != -100).sum())
        starts = [(k * grid.data.size + grid.data.rank) * layout.micro for k in range(count)]
        batches = [(tokens[i : i + layout.micro], labels[i : i + layout.micro]) for i in starts]
        total = pipeline.train_step(batches, grid.data.size / weight).double()
        dist.all_reduce(total)
        losses.append(total.item() / (layout.tensor * weight))
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms
