"""Where the time of a step goes, by kind of work, as torch.profiler sees its operators.

An operator belongs to the outermost kind that holds it: the product inside the loss is loss. On a device the seconds
are its kernels'. What is left of the step is Python, hooks and autograd's own work. Used by measure.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Kind -> parts of the names of its operators, functions of autograd and ranges. The first kind that fits is taken.
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
PURE = frozenset(
    {"products", "copies"}
)  # of any operator's inside; the others are looked for first


def split_by_kind(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds by kind of one call; what no kind takes is `other operators`. The profiler's own cost is in none."""
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
    """Not a range of autograd's engine or of the profiler, whose own time is Python's or waiting."""
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
