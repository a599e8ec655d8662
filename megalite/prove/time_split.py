"""Breakdown of a step's time by kind of work, from torch.profiler's operators.

An operator belongs to the outermost kind that contains it: a product inside the loss counts as loss. On a device the
seconds are its kernels'. The rest of the step is Python, hooks and autograd's overhead. Used by measure.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Kind -> substrings of the names of its operators, autograd functions and ranges. The first match counts.
KINDS: dict[str, tuple[str, ...]] = {
    "loss": ("_HeadLoss", "cross_entropy", "CrossEntropy", "nll_loss", "NllLoss", "log_softmax", "LogSoftmax"),
    "optimizer": ("Optimizer.step", "_fused_adam"),
    "norm": ("GlobalNorm", "vector_norm", "_foreach_norm"),
    "communication": ("c10d::", "gloo:", "nccl:"),
    "attention": ("scaled_dot_product", "ScaledDotProduct", "_flash_attention", "varlen_attn"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "grouped_mm"),
    "normalization": ("rms_norm", "_RmsNorm", "layer_norm", "LayerNorm", "LlamaRMSNorm"),
    "copies": ("aten::copy_", "aten::cat", "aten::_to_copy"),
    "gradient sums": ("AccumulateGrad",),
}  # fmt: skip
# Kinds that occur inside any operator; the others are looked for first.
PURE = frozenset({"products", "copies"})


def split_by_kind(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds by kind of one call; unmatched operators are `other operators`. The profiler's overhead is not
    included."""
    device = torch.accelerator.current_accelerator()
    on_device = device is not None and device.type != "cpu"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    with profile(activities=activities) as found:
        step()
        if on_device:
            torch.accelerator.synchronize()
    seconds: Counter[str] = Counter()
    for event in found.events() or ():
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        if _is_operator(event):
            seconds[_kind(event)] += own / 1e6
    return dict(seconds)


def _is_operator(event: Any) -> bool:
    """False for ranges of autograd's engine or of the profiler, whose own time is Python's or waiting."""
    return "::" in event.name and not event.name.startswith(("autograd::", "ProfilerStep"))


def _kind(event: Any) -> str:
    names = [*_names_outwards(event)][::-1]
    for name in names:  # from the outermost
        for kind, parts in KINDS.items():
            if kind not in PURE and any(part in name for part in parts):
                return kind
    for name in names:
        for kind in KINDS:
            if kind in PURE and any(part in name for part in KINDS[kind]):
                return kind
    return "other operators"


def _names_outwards(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent
