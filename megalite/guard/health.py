"""Judges every step before its update, identically on every rank, and reports where numbers stopped being finite.

The judge is called by the global norm (engine/norm.py), whose one message also carries the loss. loop.py acts on the
verdict: it stops, skips the update or rewinds. Not ranks that differ (guard/replicas.py) or are slow (pace.py).
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.checkpoint.appended import Appended
from megalite.checkpoint.parts import BoxDict
from megalite.config.limits import Faults
from megalite.data.position import Position
from megalite.engine.engine import Engine
from megalite.errors import TrainingError
from megalite.pipeline.actions import Pipeline

FAULTS = "faults.jsonl"
NAMES = 3  # tensors named in a message
_LATER = 1 << 30  # after every micro-batch


@dataclass(frozen=True)
class Fault:
    """A fault of a step. text: its description, without the step's number."""

    kind: Literal["overflow", "not_finite", "spike"]
    text: str
    action: Literal["stop", "skip", "rewind", "warn"]


def not_finite(boxes: BoxDict) -> list[str]:
    """Names of the boxes with values that are not finite. The host waits once per device, not once per box."""
    peaks: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, some in boxes.items():
        for box in some:
            if box.values.numel():
                # NaN if there is one. Unlike isfinite(), this writes no tensor of that size.
                peak = torch.linalg.vector_norm(box.values, float("inf"), dtype=torch.float32)
                peaks.setdefault(box.values.device, []).append((name, peak))
    found: dict[str, bool] = {}
    for of_device in peaks.values():
        finite = torch.stack([peak for _, peak in of_device]).isfinite().tolist()
        for (name, _), is_finite in zip(of_device, finite, strict=True):
            found[name] = found.get(name, True) and is_finite
    return [name for name in boxes if not found.get(name, True)]


class Health:
    """Judges the steps of one run; every rank has one. `fault`, `loss` and `norm` are of the last judged step. The norm
    is without the loss scale, and `scale` is the step's."""

    def __init__(
        self,
        faults: Faults,
        engine: Engine,
        pipeline: Pipeline,
        hosts: list[str],
        file: Appended,
        start: Position,
    ) -> None:
        """file: rank 0 appends a line for each fault. start: the position at which the run starts."""
        self.faults, self.engine, self.pipeline, self.hosts, self.file = (
            faults,
            engine,
            pipeline,
            hosts,
            file,
        )
        self.position = start
        self.fault: Fault | None = None
        self.loss = self.norm = math.nan
        self.scale = 1.0
        # Not the position's: a run that rewinds must remember why.
        self.in_a_row, self.faulty_step = start.faults_in_a_row, start.faulty_step
        engine.global_norm.judge = self._judge
        if engine.stage.embedding is not None:
            engine.stage.embedding.register_forward_hook(self._watch_first_gradient)

    @property
    def rewinds(self) -> bool:
        """Whether a run may rewind, and so needs a checkpoint to rewind to."""
        return "rewind" in (self.faults.not_finite, self.faults.spike)

    def begin(self, position: Position) -> None:
        """Call before a step from `position`."""
        self.position, self.fault, self.scale = position, None, self.engine.current_loss_scale

    def take_loss(self, part: Tensor) -> None:
        """Takes this rank's part of the step's mean loss. Call when all gradients are complete."""
        first = self.engine.grid.tensor.is_first  # all tensor ranks have the same
        self.engine.global_norm.loss = part if first else None

    def _judge(self, loss: float, norm: float) -> bool:
        self.loss, self.norm = loss, norm / self.scale
        self.fault = self._fault_of(loss, norm)
        return self.fault is None or self.fault.action == "warn"

    def _fault_of(self, loss: float, norm: float) -> Fault | None:
        faults, recent = self.faults, self.position.recent_losses
        if not math.isfinite(loss):
            return Fault("not_finite", f"loss is {loss}", faults.not_finite)
        if not math.isfinite(norm):
            if self.engine.can_lower_loss_scale:
                return Fault("overflow", f"overflow with loss scale {self.scale:g}", "skip")
            return Fault("not_finite", f"gradient norm is {norm}", faults.not_finite)
        if faults.spike_factor is not None and len(recent) == faults.spike_window:
            usual = median(recent)  # 0 if no token counts in most batches: nothing to compare with
            if loss > faults.spike_factor * usual > 0:
                text = f"loss {loss:.4f} is {loss / usual:.2f} times the median {usual:.4f} of {len(recent)} steps"
                return Fault("spike", text, faults.spike)
        return None

    def after(self, samples: int, tokens: int) -> Position:
        """The position after the judged step."""
        skipped = self.fault is not None and self.fault.action != "warn"
        position = self.position.after(samples, tokens, skipped)
        if not skipped and self.faults.spike_factor is not None:
            recent = (*position.recent_losses, self.loss)[-self.faults.spike_window :]
            position = replace(position, recent_losses=recent)
        if not skipped and position.step > self.faulty_step:
            self.in_a_row = 0
        return position

    def row(self) -> dict[str, Any]:
        """Fields of the judged step's row of metrics."""
        fault = self.fault
        row: dict[str, Any] = {"skipped_steps": self.position.skipped_steps}
        if fault is not None and fault.action != "warn":
            row |= {"skipped": fault.kind, "skipped_steps": self.position.skipped_steps + 1}
        if self.engine.fp16_enabled():
            row["loss_scale"] = self.scale
        return row

    def answer(self, step: int) -> str | None:
        """After the judged step: a line about its fault for the log, or None without one. Raises TrainingError if the
        run must stop (collective if something was not finite)."""
        if self.fault is None or self.fault.kind == "overflow":
            return None
        text = self.fault.text + (f"; {self._origin()}" if self.fault.kind == "not_finite" else "")
        return self._answer(step, replace(self.fault, text=text))

    def check_sound(self, boxes: BoxDict, step: int) -> str | None:
        """As `answer`, for the values to be saved after a step: None if all are finite (collective)."""
        grid, names = self.engine.grid, not_finite(boxes)
        # If all is well, only one number is sent, in main memory; a name comes only from the lowest rank with a fault.
        first = torch.tensor(grid.rank if names else grid.world_size)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        rank = int(first)
        if rank == grid.world_size:
            return None
        message = [names[0] if rank == grid.rank else ""]
        dist.broadcast_object_list(message, src=rank)
        name = message[0]
        # Skipping an update would not repair the weights.
        action = "rewind" if self.faults.not_finite == "rewind" else "stop"
        text = f"{name} is not finite on {self._rank(rank)}: must not be saved"
        self.fault = Fault("not_finite", text, action)
        return self._answer(step, self.fault)

    def _answer(self, step: int, fault: Fault) -> str:
        self.in_a_row += fault.action != "warn"
        self.faulty_step = max(step, self.faulty_step)
        line = f"step {step}: {fault.text}"
        if fault.action != "stop" and self.in_a_row > self.faults.most_in_a_row:
            line += f"; {self.faults.most_in_a_row} in a row before it (megalite.train.faults.most_in_a_row)"
            fault = replace(fault, action="stop")
        if self.engine.grid.rank == 0:
            self.file.append(f"{json.dumps({'step': step, **asdict(fault)})}\n".encode())
        if fault.action == "stop":
            raise TrainingError(f"{line}: nothing of this step is saved")
        return f"{line}: {({'skip': 'skipped', 'rewind': 'rewinding', 'warn': 'continuing'})[fault.action]}"

    def _watch_first_gradient(self, module: Any, inputs: Any, output: Tensor) -> None:
        """Watches the gradient of the embedding's output. It is the last that backward computes, so it shows whether
        any earlier one was not finite."""
        if output.requires_grad:
            output.register_hook(self._note_first_gradient)

    def _note_first_gradient(self, gradient: Tensor) -> None:
        action = self.pipeline.interpreter.action
        if action is not None:
            self.pipeline.note_peak(action, gradient)

    def _origin(self) -> str:
        """Where values first were not finite (collective)."""
        everyone = self._gather(self._first_found())
        found = [(where, rank) for rank, where in enumerate(everyone) if where is not None]
        names = self.engine.global_norm.not_finite()
        listed = f"{', '.join(names[:NAMES])}{' …' * (len(names) > NAMES)}"
        gradients = [f"gradients of {len(names)} tensors ({listed})"] if names else []
        if found:
            (_, text), _ = first = min(found)
            ranks = [self._rank(rank) for where, rank in found if where == first[0]]
            gradients.insert(0, f"first in {text} on {', '.join(ranks)}")
        return "; ".join(gradients)

    def _first_found(self) -> tuple[tuple[int, int, int], str] | None:
        """The first finding on this rank, as a sort key (phase, micro-batch, order of the chunk) and a name."""
        found, last = [], self.pipeline.plan.cut.last_chunk
        for (kind, chunk, k), peak in self.pipeline.peaks:
            if not torch.isfinite(peak).item():
                backward = kind != "F"
                what = "backward" if backward else "the loss" if chunk == last else "forward"
                found.append(
                    (
                        (int(backward), k, -chunk if backward else chunk),
                        f"{what} of micro-batch {k}",
                    )
                )
        names = self.engine.global_norm.not_finite(own=True)
        if not found and names:
            found.append(((2, _LATER, 0), f"the accumulated gradient of {names[0]}"))
        return min(found, default=None)

    def _rank(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]} ({self.engine.grid.sizes.described(rank)})"

    def _gather(self, value: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.engine.grid.world_size
        dist.all_gather_object(everyone, value)
        return everyone
