"""MFU: its formula, names of devices in data sheets, and the measured rate of other devices
(megalite/training/mfu.py)."""

import pytest
import torch

from megalite.model.families import read_spec
from megalite.training.mfu import Utilisation, data_sheet_flops, measured_flops, peak_flops
from tests.small_models import MODELS

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("AMD Instinct MI300X", 1307),
        ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA H20", 148),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA RTX 6000 Ada Generation", 364.2), ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA H800 PCIe", 756),
    ],
)  # fmt: skip
def test_a_device_is_found_by_its_name(name: str, teraflops: float) -> None:
    assert data_sheet_flops(name, BF16) == data_sheet_flops(name, torch.float16) == teraflops * 1e12


def test_types_and_unknown_devices() -> None:
    assert data_sheet_flops("NVIDIA A100-SXM4-40GB", FP32) == 19.5e12
    assert data_sheet_flops("NVIDIA GeForce RTX 9999", BF16) is None
    for name, teraflops in {
        "Tesla V100-SXM2-32GB": 125,
        "Tesla V100-PCIE-32GB": 112,
        "Tesla T4": 65,
    }.items():
        assert data_sheet_flops(name, torch.float16) == teraflops * 1e12
        assert data_sheet_flops(name, BF16) is None, "it has no units for bf16"
    for name in (
        "NVIDIA A10-8Q",
        "GRID A100-10C",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
    ):
        assert data_sheet_flops(name, BF16) is None, "a part of a GPU, or another card"


def test_the_measured_rate_is_that_of_large_products() -> None:
    """Measured by large products with one wait, not by 512³ products with a wait after each."""
    rate = measured_flops(torch.device("cpu"), FP32)
    assert 1e9 < rate < 1e14
    assert peak_flops(torch.device("cpu"), FP32) == pytest.approx(rate, rel=0.9)


def test_figures_of_a_step() -> None:
    """Llama 2 7B: 6 × 6.607e9 for weights in products, and 12 · 32 · 4096 · 2048 for attention over 4,096 tokens."""
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    flops = read_spec(config).flops_per_token(4096)
    assert flops == pytest.approx(6 * (6_738_415_616 - 32000 * 4096) + 12 * 32 * 4096 * 2048)
    row = Utilisation(flops, peak=8 * 989e12, ranks=8).row(tokens_per_second=70_000)
    assert row["tflops_per_rank"] == pytest.approx(70_000 * flops / 8e12)
    assert row["mfu"] == pytest.approx(row["tflops_per_rank"] / 989)


def test_a_window_counts_the_positions_that_it_sees() -> None:
    config = MODELS["llama"] | {"model_type": "mistral", "sliding_window": 8}
    wide, narrow = (read_spec(config | {"sliding_window": window}) for window in (None, 8))
    seen = sum(min(position + 1, 8) for position in range(64)) / 64
    everything = sum(range(1, 65)) / 64
    width = 12 * narrow.num_layers * narrow.num_heads * narrow.head_size
    difference = wide.flops_per_token(64) - narrow.flops_per_token(64)
    assert difference == pytest.approx(width * (everything - seen), rel=0.02)
