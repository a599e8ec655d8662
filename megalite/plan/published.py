"""Predictions of published runs: the constants of device_figures.py are fitted to them, and they show the planner's
error.

python -m megalite.plan.published     prints the table of docs/planning.md

Each row has what its paper states. Megatron-LM's runs had dropout of 0.1 and no fused attention, as our block does with
dropout; a micro-batch that is not stated is the fastest of 1, 2, 4 and 8. FLOPs are counted as in each paper: with
`again`, full recomputation counts too. Next: device_figures.py.
"""

from dataclasses import dataclass, replace
from typing import Any

from megalite.config import Config
from megalite.model.families import read_spec
from megalite.plan.candidates import Candidate, Search, config_of
from megalite.plan.device_figures import DEVICES, Device
from megalite.plan.search import PlannedLayout, Planner


@dataclass(frozen=True)
class PublishedRun:
    """model: a Hugging Face config. layout: micro 0 means not stated. tflops: published, per device. again: whether
    recomputation counts in it. hidden: parts of a step that the run overlaps with computation, and ours does not."""

    name: str
    source: str
    device: str
    ranks: int
    batch: int
    length: int
    model: dict[str, Any]
    layout: Candidate
    tflops: float
    again: bool = False
    hidden: tuple[str, ...] = ()


def gpt(layers: int, hidden: int, heads: int, vocabulary: int, dropout: float, length: int) -> Any:
    """A GPT like GPT-3."""
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "vocab_size": vocabulary,
        "n_positions": length,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout),
    }


MEGATRON = "arXiv 2104.04473, table 1"
_ROWS = [  # heads, hidden, layers, tensor, pipe, GPUs, batch, TFLOP/s, chunks
    ("1.7 B", 24, 2304, 24, 1, 1, 32, 512, 137, 1),
    ("3.6 B", 32, 3072, 30, 2, 1, 64, 512, 138, 1),
    ("7.5 B", 32, 4096, 36, 4, 1, 128, 512, 142, 1),
    ("18.4 B", 48, 6144, 40, 8, 1, 256, 1024, 135, 1),
    ("39.1 B", 64, 8192, 48, 8, 2, 512, 1536, 138, 2),
    ("76.1 B", 80, 10240, 60, 8, 4, 1024, 1792, 140, 3),
    ("145.6 B", 96, 12288, 80, 8, 8, 1536, 2304, 148, 2),
    ("310.1 B", 128, 16384, 96, 8, 16, 1920, 2160, 155, 3),
    ("529.6 B", 128, 20480, 105, 8, 35, 2520, 2520, 163, 3),
    ("1008 B", 160, 25600, 128, 8, 64, 3072, 3072, 163, 2),
]


def _megatron(row: tuple[Any, ...]) -> PublishedRun:
    name, heads, hidden, layers, tensor, pipe, ranks, batch, tflops, chunks = row
    layout = Candidate(
        pipe=pipe,
        tensor=tensor,
        zero=1,
        micro=1 if pipe > 1 else 0,
        schedule="interleaved" if chunks > 1 else "1f1b",
        chunks=chunks,
        recompute="full",
    )
    model = gpt(layers, hidden, heads, 51200, 0.1, 2048)
    return PublishedRun(
        f"GPT {name}", MEGATRON, "A100", ranks, batch, 2048, model, layout, tflops, True
    )


def _selective(
    name: str,
    shape: tuple[int, int, int],
    pipe: int,
    data: int,
    batch: int,
    chunks: int,
    mfu: float,
) -> PublishedRun:
    """Rows of arXiv 2205.05198: sequence parallelism and selective recompute on tensor 8."""
    layers, hidden, heads = shape
    layout = Candidate(
        pipe=pipe,
        tensor=8,
        zero=1,
        micro=4 if pipe == 1 else 1,
        schedule="interleaved" if chunks > 1 else "1f1b",
        chunks=chunks,
        recompute="selective",
        sequence=True,
    )
    model = gpt(layers, hidden, heads, 51200, 0.1, 2048)
    source = "arXiv 2205.05198, table 5 and section 6.3"
    return PublishedRun(
        name, source, "A100", 8 * pipe * data, batch, 2048, model, layout, 312 * mfu
    )


def _llama(
    ranks: int, batch: int, tflops: float, length: int = 8192, context: int = 1
) -> PublishedRun:
    model = {
        "model_type": "llama",
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": length,
    }
    layout = Candidate(
        pipe=16,
        tensor=8,
        zero=1,
        micro=1,
        schedule="interleaved",
        chunks=8,
        sequence=True,
        context=context,
    )
    source = "arXiv 2407.21783, table 4"
    return PublishedRun(
        "Llama-3 405 B", source, "H100", ranks, batch, length, model, layout, tflops
    )


def _megascale() -> PublishedRun:
    layout = Candidate(
        pipe=8, tensor=8, zero=1, micro=1, schedule="interleaved", chunks=6, sequence=True
    )
    model = gpt(96, 12288, 128, 64000, 0.0, 2048)
    source = "arXiv 2402.15627, table 2 and section 3.2"
    hidden = ("tensor",)
    return PublishedRun(
        "MegaScale 175 B",
        source,
        "A100",
        12288,
        6144,
        2048,
        model,
        layout,
        312 * 0.552,
        hidden=hidden,
    )


def _full_recompute() -> PublishedRun:
    """The run on 2,240 devices without the paper's methods: full recomputation, no sequence parallelism."""
    run = _selective("GPT 530 B", (105, 20480, 128), 35, 8, 2240, 3, 0.421)
    layout = run.layout._replace(recompute="full", sequence=False)
    return replace(run, layout=layout, source="arXiv 2205.05198, abstract")


RUNS = [
    *map(_megatron, _ROWS),
    _selective("GPT 22 B", (48, 6144, 64), 1, 1, 4, 1, 0.415),
    _selective("GPT 175 B", (96, 12288, 96), 8, 1, 64, 3, 0.514),
    _selective("GPT 530 B", (105, 20480, 128), 35, 1, 280, 3, 0.560),
    _selective("GPT 530 B", (105, 20480, 128), 35, 8, 2240, 3, 0.542),
    _full_recompute(),
    _selective("GPT 1 T", (128, 25600, 160), 64, 1, 512, 1, 0.563),
    _megascale(),
    _llama(8192, 2048, 430),
    _llama(16384, 2048, 400),
    _llama(16384, 128, 380, 131_072, 16),
]


def predicted(run: PublishedRun, device: Device | None = None) -> tuple[float, PlannedLayout]:
    """(TFLOP/s per device, as the paper counts them; the layout with the fastest micro-batch that fits)."""
    document = {
        "train_batch_size": run.batch,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 1},
        "megalite": {
            "model": run.model,
            "data": {"sequence_length": run.length, "train": ["data/train"]},
            "train": {"steps": 1, "run_dir": "runs/published"},
        },
    }
    config, spec = Config.from_dict(document), read_spec(run.model)
    device = device or DEVICES[run.device]
    planner = Planner(Search(config, spec, run.ranks, run.batch), device, device.memory_bytes)
    sizes = [run.layout.micro] if run.layout.micro else [1, 2, 4, 8]
    layouts = []
    for micro in sizes:
        one = run.layout._replace(micro=micro)
        layouts.append(planner.layout(config_of(planner.search, one), one))
    fitting = [layout for layout in layouts if layout.memory.total <= planner.memory_bytes]
    best = min(fitting or layouts, key=lambda layout: layout.time.seconds)
    seconds = best.time.seconds - sum(best.time.parts[name] for name in run.hidden)
    return flops(run) / seconds / run.ranks / 1e12, best


def flops(run: PublishedRun) -> float:
    """FLOPs of a step: for GPT as in Megatron-LM's papers, for other models 6 per weight and token, plus attention."""
    spec, s = read_spec(run.model), run.length
    if spec.family != "gpt2":
        return run.batch * s * spec.flops_per_token(s)
    h, layers, v = spec.hidden_size, spec.num_layers, spec.vocabulary_size
    if run.again:
        return 96 * run.batch * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    return 72 * run.batch * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))


def table() -> list[str]:
    """The table in Markdown."""
    lines = [
        "| run | source | GPUs | layout | published TFLOP/s | predicted | off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        found, layout = predicted(run)
        off = 100 * (found / run.tflops - 1)
        lines.append(
            f"| {run.name} | {run.source} | {run.ranks:,} {run.device} | {layout.candidate} | {run.tflops:.4g} | "
            f"{found:.4g} | {off:+.1f} % |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
