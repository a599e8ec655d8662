"""Measures a step on this rank: seconds by kind of work, waits by axis, bytes held, bytes sent by axis; and the same
for a plain PyTorch loop over transformers' model.

Next: benchmark.py, which prints both.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import Config
from megalite.data.loader import TrainData
from megalite.data.position import Position
from megalite.engine.hearing import hearing
from megalite.hub.names import hf_auto_class
from megalite.model.context import Context
from megalite.model.families import model_dict, read_spec
from megalite.model.spec import TransformerSpec
from megalite.parallel.clock import wait_for
from megalite.parallel.grid import ALONE
from megalite.parallel.timeline import RANK_TIMELINE
from megalite.parallel.traffic import Traffic
from megalite.plan.states import peak_bytes
from megalite.prove.time_split import split_by_kind
from megalite.prove.trace import Session
from megalite.training.batches import LazyMicroBatches
from megalite.training.step import tokens_that_count
from megalite.training.tracing import split

WARMUP_STEPS = 2


def measure_layout(config: Config, steps: int) -> dict[str, Any]:
    """Measures `steps` timed steps of a resolved config on this rank (collective)."""
    session = Session.build(config)
    with Traffic(session.engine.grid) as traffic, session.engine.weighed() as held:
        session.step(0)
    times = _timed(session.step, steps, torch.device(session.engine.device or "cpu"))
    peak, after = peak_bytes(torch.device(session.engine.device or "cpu")), WARMUP_STEPS + steps
    return {
        **held,
        **times,
        "peak_bytes": peak,
        "sent": dict(traffic.bytes),
        "bubble": _bubble(session, after),
        "split": split_by_kind(lambda: session.step(after + 1)),
        "waits": _waits(session, after + 2),
    }


def _waits(session: Session, step: int) -> dict[str, float]:
    """Seconds by axis that this rank waits for others in a step, transfers included."""
    grid = session.engine.grid
    dist.barrier()
    with hearing(grid):
        RANK_TIMELINE.begin(torch.device(session.engine.device or "cpu"))
        session.step(step)
    found = split(RANK_TIMELINE.take(wait=True), {"step_seconds": 0.0})
    waits = {name.split()[1]: value for name, value in found.items() if name.startswith("wait ")}
    return waits


def _bubble(session: Session, step: int) -> float:
    """Share of the time between a step's first and last action in which this rank is idle, waiting for others on the
    pipe axis."""
    interpreter = session.pipeline.interpreter
    interpreter.whole.on = interpreter.busy.on = True
    dist.barrier()
    session.step(step)
    wait_for(torch.device(session.engine.device or "cpu"))
    interpreter.whole.on = interpreter.busy.on = False
    return 1 - interpreter.busy.take() / interpreter.whole.take()


def measure_plain(config: Config, steps: int) -> dict[str, Any]:
    """Measures a plain training loop in one process: transformers' model of the same shape, the same batches and
    precision, autocast for bf16, fused AdamW, clip_grad_norm_."""
    from deepspeed.accelerator import get_accelerator  # slow, so imported only here

    accelerator: Any = get_accelerator()
    device = torch.device(
        accelerator.current_device_name() if accelerator.device_name() != "cpu" else "cpu"
    )
    spec, params = read_spec(config.model), config.optimizer.params
    model = _plain_model(config).to(device)
    matrices = [value for value in model.parameters() if value.dim() > 1]
    others = [value for value in model.parameters() if value.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": params.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    b1, b2 = params.betas or (0.9, 0.999)
    adam = torch.optim.AdamW(
        groups, lr=params.lr, betas=(b1, b2), eps=params.eps or 1e-8, fused=True
    )
    data = TrainData(config.data, config.train.seed, spec.vocabulary_size, check=False)
    bf16 = config.precision == "bf16"

    def one_step(step: int) -> None:
        size = config.train_batch_size
        draw = (config.train.seed, step)
        samples = data.at(Position(step), config.train.last_step)
        source = config.data.source_length
        micro = config.micro_batch_size
        unread = LazyMicroBatches(
            samples, step * size, size, micro, ALONE, device, draw, source=source
        )
        batches = unread.read()
        weight = max(1, int(tokens_that_count(batches)))
        for tokens, labels, context in batches:
            inputs = _inputs(tokens, context, spec)
            labels = labels[:, context.source :]
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                logits = model(**inputs).logits
            losses = F.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
            )
            (losses / weight).backward()
        if config.gradient_clipping > 0:
            nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)
        adam.step()
        adam.zero_grad()

    times, peak = _timed(one_step, steps, device), peak_bytes(device)
    split = split_by_kind(lambda: one_step(WARMUP_STEPS + steps))
    return {**times, "peak_bytes": peak, "split": split, "waits": {}}


def _plain_model(config: Config) -> Any:
    """transformers' model in fp32, in training mode, with its own initial weights."""
    from transformers import AutoConfig  # seconds to import

    spec, keys = read_spec(config.model), model_dict(config.model)
    hf_config = AutoConfig.for_model(**keys)
    hf_class = hf_auto_class(spec)
    model: Any = hf_class.from_config(
        hf_config, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    if spec.stacks is not None and not spec.tied:  # transformers 5 always ties them
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def _inputs(tokens: Tensor, context: Context, spec: TransformerSpec) -> dict[str, Any]:
    """The inputs of transformers' model."""
    documents, rows = context.documents, context.source
    if spec.stacks is None:
        mask = _document_mask(context, spec.causal)
        return {"input_ids": tokens, "attention_mask": mask}
    source, target = tokens[:, :rows], tokens[:, rows:]
    mask = None if documents is None else (documents[:, :rows] == documents[:, :1]).long()
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}


def _document_mask(context: Context, causal: bool) -> Tensor | None:
    """[B, 1, S, S], True where a token may attend to another; None if documents are not kept apart."""
    documents, prefixes = context.documents, context.prefixes
    if documents is None:
        return None
    mask = documents[:, None, :, None] == documents[:, None, None, :]
    if not causal:
        return mask
    return mask.tril() if prefixes is None else mask.tril() | mask & prefixes[:, None, None, :]


def _timed(step: Callable[[int], Any], steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step after warm-up, wall clock and CPU time; all ranks start a step together."""
    seconds, processor_seconds = [], []
    for number in range(WARMUP_STEPS + steps):
        wait_for(device)
        dist.barrier()
        start, processor_start = time.perf_counter(), time.process_time()
        step(number)
        wait_for(device)
        if number >= WARMUP_STEPS:
            seconds.append(time.perf_counter() - start)
            processor_seconds.append(time.process_time() - processor_start)
    return {"seconds": seconds, "processor_seconds": processor_seconds}
