"""Predictions for clusters far larger than any available machine.

python -m megalite.plan.scale     prints the table of docs/scale.md
"""

from itertools import product
from math import gcd

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.plan.candidates import Candidate, Search, divisors
from megalite.plan.device_figures import DEVICES, GIB
from megalite.plan.plan_program import model_flops
from megalite.plan.search import PlannedLayout, Planner

MODELS = {  # hidden, intermediate, layers, heads
    "8 B": (4096, 14336, 32, 32),
    "70 B": (8192, 28672, 80, 64),
    "405 B": (16384, 53248, 126, 128),
    "8 × 22 B": (6144, 16384, 56, 48),
}
EXPERTS = {"8 × 22 B": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}}
RANKS = (64, 256, 1024, 4096, 16_384)
BATCH, LENGTH = 2048, 8192
VOCABULARY, KEY_VALUE_HEADS = 128_256, 8


def planner_of(name: str, ranks: int) -> Planner:
    """The planner of a model on H100s."""
    hidden, intermediate, layers, heads = MODELS[name]
    model = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        **EXPERTS.get(name, {}),
    }
    document = {
        "train_batch_size": BATCH,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 1},
        "megalite": {
            "model": model,
            "data": {"sequence_length": LENGTH, "train": ["data/train"]},
            "train": {"steps": 1, "run_dir": "runs/scale"},
        },
    }
    config, device = Config.from_dict(document), DEVICES["H100"]
    search = Search(config, read_spec(model), ranks, BATCH)
    return Planner(search, device, device.memory_bytes)


def best(planner: Planner) -> PlannedLayout | None:
    """The fastest layout that fits, of those with ZeRO-1, pipe up to 16, tensor up to 8, context up to 4, and 1F1B or
    interleaved."""
    search, found = planner.search, []
    for pipe, tensor, context in product((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4)):
        data, rest = divmod(search.world_size, pipe * tensor * context)
        if rest or BATCH % data:
            continue
        experts = divisors(gcd(data, search.spec.experts)) if search.spec.experts else [1]
        ways = product(divisors(BATCH // data)[:3], ("none", "full"), experts)
        for micro, recompute, expert in ways:
            plain = Candidate(pipe, tensor, 1, micro, recompute=recompute, sequence=tensor > 1)
            plain = plain._replace(context=context, expert=expert)
            found.append(plain)
            if pipe > 1 and search.spec.num_layers // pipe >= 4:
                found.append(plain._replace(schedule="interleaved", chunks=4))
    fitting = [one for one in found if planner.least_bytes(one) <= planner.memory_bytes]
    fastest: PlannedLayout | None = None
    for one in sorted(fitting, key=planner.least_seconds):
        if fastest is not None and planner.least_seconds(one) >= fastest.time.seconds:
            break
        try:
            layout = planner.exact(one)
        except ConfigError:
            continue
        fits = layout.memory.total <= planner.memory_bytes
        if fits and (fastest is None or layout.time.seconds < fastest.time.seconds):
            fastest = layout
    return fastest


def table() -> list[str]:
    """The table in Markdown."""
    lines = [
        "| model | GPUs | layout | data | s per step | TFLOP/s per GPU | of peak | bubble | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for ranks in RANKS:
            planner = planner_of(name, ranks)
            layout = best(planner)
            if layout is None:
                lines.append(f"| {name} | {ranks:,} | none of these fits | | | | | | |")
                continue
            flops = model_flops(planner, layout)
            lines.append(
                f"| {name} | {ranks:,} | {layout.candidate} | {layout.config.data_size} | "
                f"{layout.time.seconds:.3g} | {flops / 1e12:.0f} | "
                f"{100 * flops / planner.device.half_flops:.0f} % | {100 * layout.time.bubble:.1f} % | "
                f"{layout.memory.total / GIB:.0f} |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
