"""Contender: torch's FSDP2 around transformers' model. request: reshard: whether weights are sharded again after
forward, as with ZeRO-3."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from megalite.races.plain import adam, batches, load_model, loss_of
from megalite.races.race_turns import Turns, request


def main() -> None:
    asked, turns = request(), Turns()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    model, batch = load_model(asked), batches(asked)
    policy = MixedPrecisionPolicy()
    if asked["bf16"]:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=asked["reshard"])
    optimizer = adam(model.parameters(), asked)

    def step(number: int) -> float:
        tokens, labels = batch(number)
        tokens, labels = tokens.chunk(size)[rank], labels.chunk(size)[rank]
        parts, total = tokens.shape[0] // asked["micro"], 0.0
        for k, (ids, wanted) in enumerate(
            zip(tokens.chunk(parts), labels.chunk(parts), strict=True)
        ):
            model.set_requires_gradient_sync(k == parts - 1)
            loss = loss_of(model(ids).logits, wanted) / parts
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), asked["clipping"])
        optimizer.step()
        optimizer.zero_grad()
        return total

    turns.serve(step)


if __name__ == "__main__":
    main()
