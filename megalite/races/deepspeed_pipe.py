"""Contender: DeepSpeed's PipelineEngine over transformers' layers. request: cut: layers of the first stage; deepspeed:
its JSON."""

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from megalite.races.plain import batches, load_model, loss_of
from megalite.races.race_turns import Turns, request


class Layer(nn.Module):
    """A layer that computes its rotary angles itself, so that only one tensor crosses the stages."""

    def __init__(self, layer: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        angles = self.rotary(hidden, positions)
        out = self.layer(
            hidden, attention_mask=None, position_ids=positions, position_embeddings=angles
        )
        return out[0] if isinstance(out, tuple) else out


class CutModule(PipelineModule):
    """Cut after `first_layers`: PipelineModule's own methods count the embedding as work."""

    first_layers = 0

    def _partition_layers(self, *args: Any, **kwargs: Any) -> None:
        super()._partition_layers(*args, **kwargs)
        self.parts = [0, 1 + self.first_layers, len(self._layer_specs)]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


def main() -> None:
    asked, turns = request(), Turns()
    deepspeed.init_distributed("gloo", verbose=False)
    model, batch = load_model(asked), batches(asked)
    inner = model.model
    CutModule.first_layers = asked["cut"]
    layers = [Layer(layer, inner.rotary_emb) for layer in inner.layers]
    module = CutModule(
        [inner.embed_tokens, *layers, inner.norm, model.lm_head], num_stages=2, loss_fn=loss_of
    )
    keys, values = json.loads(Path(asked["deepspeed"]).read_text()), list(module.parameters())
    engine: Any = deepspeed.initialize(model=module, model_parameters=values, config=keys)[0]  # pyright: ignore

    def step(number: int) -> float:
        tokens, labels = batch(number)
        parts = tokens.shape[0] // asked["micro"]
        data = zip(tokens.chunk(parts), labels.chunk(parts), strict=True)
        return float(engine.train_batch(data_iter=iter(list(data))))

    turns.serve(step)


if __name__ == "__main__":
    main()
