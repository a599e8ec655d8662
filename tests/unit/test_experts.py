"""Experts without ranks: the grouped product and its twin, initial weights, the choice, the rules of the config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megalite.checkpoint.files import Checkpoint
from megalite.config import Config, check_model
from megalite.errors import ConfigError
from megalite.hub.import_hf import import_hf
from megalite.hub.upcycle import Experts
from megalite.model.context import Context
from megalite.model.experts import RoutedMLP
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel import grouped
from megalite.parallel.collectives import Split
from megalite.parallel.grid import ALONE, Grid
from megalite.parallel.grouped import Groups, grouped_linear
from megalite.parallel.layers import placed
from tests.families import FAMILY_CONFIGS, hf_model
from tests.small_models import MODELS

GROUPS = torch.tensor([0, 0, 0, 2, 2, 3])  # none of group 1, nor of 4


def product(width: int, dtype: torch.dtype) -> list[Tensor]:
    """Result and both gradients of a grouped product."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(GROUPS), width, generator=generator).to(dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(5, 2 * width, width, generator=generator).to(dtype))
    made = grouped_linear(rows, weight, Groups.of(GROUPS, 5))
    made.float().square().sum().backward()
    assert rows.grad is not None and weight.grad is not None
    return [made.detach(), rows.grad, weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_equals_its_twin(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = product(16, dtype)
    monkeypatch.setattr(grouped, "_fuses", lambda rows, others: False)
    looped = product(16, dtype)
    assert all(torch.equal(one, other) for one, other in zip(fused, looped, strict=True))
    assert not looped[2][1].any() and not looped[2][4].any() and looped[2][0].any()


def test_the_loop_takes_what_the_fused_product_refuses() -> None:
    made, rows_gradient, weight_gradient = product(7, torch.float32)
    assert made.shape == (6, 14) and rows_gradient.shape == (6, 7)
    assert weight_gradient.shape == (5, 14, 7)


@pytest.mark.parametrize("width", [16, 7])
def test_experts_without_a_token_have_gradients_of_zero(width: int) -> None:
    """As all experts of a rank may be."""
    rows = torch.randn(0, width).requires_grad_()
    weight = nn.Parameter(torch.randn(3, 2 * width, width))
    made = grouped_linear(rows, weight, Groups.of(torch.empty(0, dtype=torch.int64), 3))
    made.sum().backward()
    assert made.shape == (0, 2 * width) and rows.grad is not None and weight.grad is not None
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def stage_of(grid: Grid) -> Stage:
    return Stage(read_spec(MODELS["mixtral"]), grid).initialise(7)


def test_an_expert_starts_from_the_same_weights_on_any_rank() -> None:
    whole = {place.name: value for value, place in placed(stage_of(Grid()))}
    matrices = whole["layers.0.mlp.experts.up.weight"]
    assert not torch.equal(matrices[0], matrices[1])
    for rank in range(4):
        part = stage_of(Grid.at(rank, 1, 2, 2, expert=2))
        for value, place in placed(part):
            assert torch.equal(value, place.cut(whole[place.name])), place.name
            assert getattr(value, "allreduce", True) != place.has_own_replicas
            assert place.has_own_replicas == (".experts." in place.name)


def routed(balance: float) -> RoutedMLP:
    spec = read_spec({**MODELS["mixtral"], "router_aux_loss_coef": balance})
    assert spec.mixture is not None
    mlp = RoutedMLP(spec, spec.mixture, Split(ALONE), ALONE, ALONE)
    generator = torch.Generator().manual_seed(3)
    for value in mlp.parameters():
        value.data.normal_(0.0, 0.3, generator=generator)
    return mlp


def test_of_equal_probabilities_the_lower_expert_comes_first() -> None:
    mlp = routed(0.0)
    mlp.router.weight.data[2] = mlp.router.weight.data[5]
    chosen, weights = mlp.router(torch.randn(64, 32), Context())
    assert chosen.shape == weights.shape == (64, 2)
    both = [row for row in chosen.tolist() if {2, 5} & set(row)]
    assert both and all(5 not in row or row == [2, 5] for row in both)


def test_each_token_gets_what_its_experts_make() -> None:
    """By the definition, token by token."""
    mlp, x = routed(0.0), torch.randn(2, 5, 32)
    made = mlp(x, Context()).flatten(0, 1)
    experts = mlp.experts
    for token, row in enumerate(x.flatten(0, 1)):
        likely = (mlp.router.weight @ row).softmax(0)
        best = likely.topk(2)
        wanted = torch.zeros(32)
        for share, number in zip(best.values / best.values.sum(), best.indices, strict=True):
            gate, up, down = (m.weight[number] for m in (experts.gate, experts.up, experts.down))
            wanted += share * (down @ (nn.functional.silu(gate @ row) * (up @ row)))
        torch.testing.assert_close(made[token], wanted, rtol=1e-4, atol=1e-5)


def test_the_balance_loss_is_that_of_its_formula() -> None:
    mlp, x, each = routed(0.5), torch.randn(3, 7, 32), torch.tensor([1.0, 0.0, 2.0])
    before, _ = mlp.router(x.flatten(0, 1), Context())
    mlp(x, Context(balance=each)).sum().backward()
    with_loss = mlp.router.weight.grad
    assert with_loss is not None
    tally, mlp.router.weight.grad = mlp.router.tally.clone(), None
    assert (
        tally.tolist() == torch.bincount(before.view(3, -1)[[0, 2]].flatten(), minlength=8).tolist()
    )
    loss = torch.zeros(())
    for sample, weight in zip(x, each, strict=True):
        likely = (sample @ mlp.router.weight.t()).softmax(-1)
        often = torch.bincount(likely.topk(2).indices.flatten(), minlength=8) * 8 / (2 * 7)
        loss = loss + weight * 0.5 * (often * likely.mean(0)).sum()
    (mlp(x, Context()).sum() + loss).backward()
    torch.testing.assert_close(mlp.router.weight.grad, with_loss)


@pytest.mark.parametrize(("name", "family"), [("mistral", "mixtral"), ("qwen3", "qwen3_moe")])
def test_a_dense_model_with_experts_computes_what_it_did(
    name: str, family: str, tmp_path: Path
) -> None:
    section = FAMILY_CONFIGS[name]
    if name == "qwen3":
        section = {**section, "use_sliding_window": False}
    hf_model(section).save_pretrained(tmp_path / "dense")
    # The import holds its logits against transformers' dense model.
    assert import_hf(tmp_path / "dense", tmp_path / "made", True, Experts(6, 2)) is not None
    made = Checkpoint.open(tmp_path / "made")
    assert made.model["model_type"] == family
    gate = made.read("layers.1.mlp.experts.gate.weight")
    assert gate.shape == (6, 50, 36) and torch.equal(gate[0], gate[5])
    assert made.read("layers.1.mlp.router.weight").std() > 0


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])  # a shared expert is no copy of an MLP
def test_a_family_without_a_counterpart_is_not_upcycled(family: str, tmp_path: Path) -> None:
    hf_model(FAMILY_CONFIGS[family]).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=f"--experts: a {family} model has no counterpart"):
        import_hf(tmp_path / "dense", tmp_path / "made", False, Experts(4, 2))


@pytest.mark.parametrize(("dense", "every"), [([], 1), ([0, 2], 1), ([], 2), ([3], 2), ([], 9)])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_layers_have_experts_where_transformers_gives_them(
    family: str, dense: list[int], every: int
) -> None:
    section = {**MODELS[family], "mlp_only_layers": dense, "decoder_sparse_step": every}
    mixture = read_spec(section).mixture
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**section))
    theirs = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert theirs == ([] if mixture is None else [*mixture.layers])


def config(**changes: Any) -> Config:
    parallel = changes.pop("parallel", {})
    train = {"steps": 1, "run_dir": "unused", **changes.pop("train", {})}
    return Config.from_dict(
        {
            "train_batch_size": changes.pop("train_batch_size", 8),
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 1, **changes.pop("zero", {})},
            "megalite": {
                "model": MODELS[changes.pop("model", "mixtral")],
                "parallel": parallel,
                "data": {"sequence_length": 12, "train": ["unused"]},
                "train": train,
            },
        }
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"parallel": {"expert": 3}}, "megalite.parallel.expert: 3: must divide the data axis of 8 ranks"),
        ({"parallel": {"expert": 4, "tensor": 4}}, "megalite.parallel.expert: 4: must divide the data axis of 2 ranks"),
        ({"parallel": {"expert": 2}, "model": "llama"},
         "megalite.parallel.expert: 2: must be 1: a llama model of this config has no experts"),
        ({"train": {"router": {"bias_rate": 0.1}}},
         'megalite.train.router.bias_rate: 0.1: needs megalite.train.router.balance "bias"'),
        ({"train": {"router": {"z_loss": 0.1}}, "model": "llama"},
         'megalite.train.router: {"z_loss": 0.1}: must be left out: a llama model of this config has no experts'),
        ({"parallel": {"expert": 2}, "zero": {"stage": 3}},
         "zero_optimization.stage: 3: must be at most 2 with megalite.parallel.expert 2"),
        ({"parallel": {"expert": 2}, "zero": {"reduce_scatter": False}},
         "zero_optimization.reduce_scatter: false: must be true with megalite.parallel.expert 2"),
        ({"parallel": {"expert": 2}, "zero": {"offload_optimizer": {"device": "cpu"}}},
         'zero_optimization.offload_optimizer.device: "cpu": must be none with megalite.parallel.expert 2'),
    ],
)  # fmt: skip
def test_a_mistake_about_experts_is_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        made = config(**changes).resolve(8)
        check_model(made, read_spec(made.model))
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_the_tensor_axis_divides_the_shared_expert() -> None:
    made = config(parallel={"tensor": 4}, model="qwen2_moe").resolve(4)
    section = {**MODELS["qwen2_moe"], "shared_expert_intermediate_size": 30}
    rule = "megalite.parallel.tensor: 4: must divide shared_expert_intermediate_size 30"
    with pytest.raises(ConfigError, match=rule):
        check_model(made, read_spec(section))


def test_the_expert_axis_divides_the_experts() -> None:
    made = config(parallel={"expert": 16}, train_batch_size=16)
    made = made.resolve(16)
    with pytest.raises(ConfigError, match="expert: 16: must divide the model's 8 experts"):
        check_model(made, read_spec(made.model))


def test_gpus_without_the_one_kernel_take_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an A100 torch's own would wait for the device in each product."""
    of_device = {0: (8, 0), 1: (9, 0), 2: (10, 0), 3: (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of_device[device.index])
    found = [grouped._one_kernel(torch.device("cuda", index)) for index in of_device]
    grouped._one_kernel.cache_clear()
    assert found == [False, True, True, False]
