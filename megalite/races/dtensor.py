"""Contender: torch's DTensor tensor parallelism over transformers' model, with loss_parallel."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from megalite.races.plain import adam, batches, load_model
from megalite.races.race_turns import Turns, request


def split(model: nn.Module, size: int) -> None:
    """Megatron's splits, including the head's vocabulary."""
    mesh = init_device_mesh("cpu", (size,))
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = {
        "self_attn.q_proj": columns,
        "self_attn.k_proj": columns,
        "self_attn.v_proj": columns,
        "self_attn.o_proj": rows,
        "mlp.gate_proj": columns,
        "mlp.up_proj": columns,
        "mlp.down_proj": rows,
    }
    for layer in model.model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, mesh, plan)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, ends)


def main() -> None:
    asked, turns = request(), Turns()
    dist.init_process_group("gloo")
    model, batch = load_model(asked), batches(asked)
    split(model, dist.get_world_size())
    whole = [value for value in model.parameters() if not isinstance(value, DTensor)]
    cut = [value for value in model.parameters() if isinstance(value, DTensor)]
    optimizers = [adam(whole, asked), adam(cut, asked)]

    def step(number: int) -> float:
        tokens, labels = batch(number)
        parts, total = tokens.shape[0] // asked["micro"], 0.0
        for ids, wanted in zip(tokens.chunk(parts), labels.chunk(parts), strict=True):
            with loss_parallel():
                loss = F.cross_entropy(model(ids).logits.flatten(0, 1), wanted.flatten()) / parts
                loss.backward()
            total += (loss.full_tensor() if isinstance(loss, DTensor) else loss).item()
        # One norm over all gradients, from the norms of whole and of sharded parameters.
        norms = []
        for values in (whole, cut):
            gradients = [value.grad for value in values if value.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        norm = torch.stack(norms).square().sum().sqrt()
        factor = (asked["clipping"] / (norm + 1e-6)).clamp(max=1.0)
        for value in (*whole, *cut):
            if value.grad is not None:
                local = value.grad.to_local() if isinstance(value.grad, DTensor) else value.grad
                local.mul_(factor)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return total

    turns.serve(step)


if __name__ == "__main__":
    main()
