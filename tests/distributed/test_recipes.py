"""What depends on the step or on parameter names: growing batches, schedules, parameter groups, initial weights. All
are the same on every layout, across a change of layout, and as with torch's AdamW in one process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.checkpoint.files import Checkpoint, find_checkpoint
from megalite.config import Config
from megalite.data.loader import TrainData
from megalite.engine.build import build_stage
from megalite.errors import CheckpointError
from megalite.model.families import model_dict, read_spec
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from megalite.training.pretraining import PreparedRun, _check_run_dir
from tests.ranks import run_ranks
from tests.training_runs import VOCABULARY, document, nothing, rows, train

SIZES = [4, 4, 8, 12, 12, 12]  # sizes of the batches, by the ramp below
WARMUP_TOKENS = 150  # 12 tokens per sample: the third step ends at 192
RATES = [48 / 150, 96 / 150, 1.0, 1.0, 1.0, 1 - math.sqrt(0.5)]
GROUPS = [
    {"match": "layers.1.*", "lr_ratio": 0.25},
    {"match": "*.query.*", "weight_decay": 0.0},
    {"match": "embedding.*", "lr_ratio": 0.5, "weight_decay": 0.02},
    {"match": "final_norm.*", "lr_ratio": 0.0},
]
# Layouts, each with its micro-batch size.
LAYOUTS: list[tuple[dict[str, int], int]] = [
    ({"zero": 1}, 1),
    ({"pipe": 2, "tensor": 2, "zero": 2}, 4),
]
MOVED: list[tuple[dict[str, int], int]] = [
    ({"tensor": 2, "zero": 3}, 1),
    ({"pipe": 2, "zero": 1}, 2),
]
SGD = {"type": "SGD", "params": {"lr": 0.5, "momentum": 0.9}}
OPTIMIZERS: list[dict[str, Any]] = [{"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4}}, SGD]


def recipe(
    folder: Path,
    run: str,
    layout: dict[str, int],
    micro: int,
    steps: int = 6,
    optimizer: Any = OPTIMIZERS[0],
) -> dict[str, Any]:
    train = {
        "steps": steps,
        "batch_ramp": {"start": 4, "increment": 4, "samples": 16},
        "parameter_groups": GROUPS,
        "init": {"std": 0.05, "embedding_std": 0.1, "depth_scaled": True},
    }
    keys = document(folder, run, layout, train=train)
    params = {"total_steps": 6, "warmup_tokens": WARMUP_TOKENS, "decay_steps": 2}
    keys |= {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 0.5,
    }
    keys["scheduler"] = {"type": "wsd", "params": params}
    keys["optimizer"] = {**optimizer, "params": {**optimizer["params"], "weight_decay": 0.1}}
    keys["megalite"]["model"]["attention_bias"] = True
    return keys


def tensors(run: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(find_checkpoint(run))
    kinds = ["weight", *checkpoint.moments]
    return {
        f"{kind}/{name}": checkpoint.read(name, kind=kind)
        for name in checkpoint.names
        for kind in kinds
    }


def by_torch(keys: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms and final weights of a plain torch loop, whose groups, rates and batches are written by hand."""
    config = Config.from_dict(keys).resolve(1)
    stage = build_stage(config, read_spec(config.model), Grid())
    groups: list[dict[str, Any]] = []
    for value, place in placed(stage):
        ratio, decay = 1.0, 0.1 if value.dim() > 1 else 0.0
        if place.name.startswith("layers.1."):
            ratio = 0.25
        elif ".query." in place.name:
            decay = 0.0
        elif place.name.startswith("embedding."):
            ratio, decay = 0.5, 0.02
        elif place.name == "final_norm.weight":
            ratio = 0.0
        groups.append({"params": [value], "weight_decay": decay, "ratio": ratio})
    params = keys["optimizer"]["params"]
    sgd = keys["optimizer"]["type"] == "SGD"
    optimizer = (
        torch.optim.SGD(groups, momentum=0.9)
        if sgd
        else torch.optim.AdamW(groups, eps=1e-4, fused=True)
    )
    data = TrainData(config.data, config.train.seed, VOCABULARY)
    losses, norms = [], []
    for step, size in enumerate(SIZES):
        start = sum(SIZES[:step])
        batch = data.batch(range(start, start + size))
        tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
        for group in optimizer.param_groups:
            group["lr"] = params["lr"] * RATES[step] * group["ratio"]
        loss = F.cross_entropy(stage(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(stage.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {place.name: value.detach() for value, place in placed(stage)}


def test_a_recipe_is_the_same_on_every_layout_and_as_in_torch(tmp_path: Path) -> None:
    alone = recipe(tmp_path, "alone", {"zero": 0}, 2)
    assert run_ranks(1, train, [(alone, nothing)]) == [[0]]
    sgd = recipe(tmp_path, "sgd", {"zero": 0}, 2, optimizer=SGD)
    runs = [recipe(tmp_path, str(number), *layout) for number, layout in enumerate(LAYOUTS)]
    # Stopped in the ramp under ZeRO-3, resumed on pipe 2 with another micro-batch size.
    for name, optimizer in zip(("moved", "sgd"), OPTIMIZERS, strict=True):
        runs.append(recipe(tmp_path, name, *MOVED[0], steps=3, optimizer=optimizer))
        runs.append(recipe(tmp_path, name, *MOVED[1], optimizer=optimizer))
    assert run_ranks(4, train, [(keys, nothing) for keys in runs]) == [[0] * len(runs)] * 4

    samples = [sum(SIZES[: step + 1]) for step in range(6)]
    for keys, names in (
        (alone, ("alone", "moved", *map(str, range(len(LAYOUTS))))),
        (sgd, ("sgd",)),
    ):
        losses, norms, weights = by_torch(keys)
        assert max(norms) > 0.5, "clipping must act"
        for name in names:
            found, held = rows(tmp_path / name), tensors(tmp_path / name)
            assert [row["consumed_samples"] for row in found] == samples
            assert [row["consumed_tokens"] for row in found] == [12 * count for count in samples]
            rates = [keys["optimizer"]["params"]["lr"] * rate for rate in RATES]
            assert [row["learning_rate"] for row in found] == pytest.approx(rates, rel=1e-12)
            assert [row["loss"] for row in found] == pytest.approx(losses, rel=2e-6), name
            assert [row["grad_norm"] for row in found] == pytest.approx(norms, rel=2e-5), name
            for tensor, value in weights.items():
                assert (held[f"weight/{tensor}"] - value).norm() < 3e-5 * value.norm() + 1e-7, (
                    name,
                    tensor,
                )
    expected, found = tensors(tmp_path / "alone"), tensors(tmp_path / "moved")
    assert all(
        (found[name] - value).norm() < 5e-5 * value.norm() + 1e-7
        for name, value in expected.items()
    )
    alone["optimizer"] = sgd["optimizer"]
    with pytest.raises(
        CheckpointError,
        match="optimizer.type: SGD: must be AdamW, as in .*: another needs a new run",
    ):
        _check_run_dir(prepared(alone))


def prepared(keys: dict[str, Any]) -> PreparedRun:
    config = Config.from_dict(keys).resolve(1)
    return PreparedRun(config, read_spec(config.model), model_dict(config.model))
