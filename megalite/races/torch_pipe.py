"""Contender: torch.distributed.pipelining's 1F1B over two stages of transformers' model. request: cut: layers of the
first stage."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from megalite.races.plain import adam, batches, load_model, loss_of
from megalite.races.race_turns import Turns, request
from megalite.races.stages import PeerStage


def clip(module: nn.Module, limit: float) -> None:
    """Clips gradients by the norm over both stages."""
    gradients = [value.grad for value in module.parameters() if value.grad is not None]
    square = nn.utils.get_total_norm(gradients).square()
    dist.all_reduce(square)
    nn.utils.clip_grads_with_norm_(module.parameters(), limit, square.sqrt())


def main() -> None:
    asked, turns = request(), Turns()
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), asked["batch"] // asked["micro"]
    batch, module = batches(asked), PeerStage(load_model(asked), rank == 0, asked["cut"])
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, count, loss_fn=loss_of)
    optimizer = adam(module.parameters(), asked)

    def step(number: int) -> float | None:
        tokens, labels = batch(number)
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(tokens)
        else:
            schedule.step(target=labels, losses=losses)
        clip(module, asked["clipping"])
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item() if losses else None

    turns.serve(step)


if __name__ == "__main__":
    main()
