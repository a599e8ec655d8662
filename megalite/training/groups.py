"""Figures of metrics rows under grouped names, for TensorBoard and trackers: `train/loss`, `speed/mfu`."""

from collections.abc import Mapping
from typing import Any

GROUPS = {
    "train": (
        *("loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens"),
        *("skipped_steps", "loss_scale"),
    ),
    "experts": ("expert_imbalance",),
    "checkpoint": ("checkpoint_seconds", "checkpoint_write_seconds", "checkpoint_copy_bytes"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
LEFT_OUT = ("step", "unix_seconds")


def grouped(row: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a row by group and name: the maximum of lists of bytes by rank, each entry of a dict; fields without a
    group go to `speed`."""
    figures: dict[str, float] = {}
    for name, value in row.items():
        if name in LEFT_OUT:
            continue
        group = "valid" if name.startswith("valid_") else GROUP_OF.get(name, "speed")
        short = name.removeprefix(f"{group}_")
        if name.endswith("_bytes") and isinstance(value, list):
            figures[f"memory/{name}"] = float(max(value))
        elif isinstance(value, dict):
            parts = {part: number for part, number in value.items() if _is_figure(number)}
            figures |= {f"{group}/{short}/{part}": number for part, number in parts.items()}
        elif _is_figure(value):
            figures[f"{group}/{short}"] = value
    return figures


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
