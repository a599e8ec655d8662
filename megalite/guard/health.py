"""Judges every step before its update, on every rank the same, and says by name where it went wrong.

The judge sits in the global norm (engine/norm.py), whose one message carries the loss too. A stop, a skipped update
or going back follow from its word, in loop.py. Not ranks that differ (guard/replicas.py) or are slow (pace.py).
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
NAMES = 3  # of tensors that a line repeats
_LATER = 1 << 30  # after every micro-batch


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step. text: without the step's number."""

    kind: Literal["overflow", "not_finite", "spike"]
    text: str
    action: Literal["stop", "skip", "rewind", "warn"]


def not_finite(boxes: BoxDict) -> list[str]:
    """Names of the boxes with a number that is not finite. The host waits for a device once, not once a box."""
    peaks: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, some in boxes.items():
        for box in some:
            if box.values.numel():
                # NaN where there is one. Unlike isfinite() it writes no tensor of that size.
                peak = torch.linalg.vector_norm(box.values, float("inf"), dtype=torch.float32)
                peaks.setdefault(box.values.device, []).append((name, peak))
    found: dict[str, bool] = {}
    for of_device in peaks.values():
        finite = torch.stack([peak for _, peak in of_device]).isfinite().tolist()
        for (name, _), is_finite in zip(of_device, finite, strict=True):
            found[name] = found.get(name, True) and is_finite
    return [name for name in boxes if not found.get(name, True)]


class Health:
    """Of one run on this rank; every rank has one. `fault`, `loss` and `norm` are of the step judged last; the norm is
    without the loss scale, and `scale` is that of the step."""

    def __init__(
        self,
        faults: Faults,
        engine: Engine,
        pipeline: Pipeline,
        hosts: list[str],
        file: Appended,
        start: Position,
    ) -> None:
        """file: takes a line for each fault, of rank 0's; start: where the run starts from."""
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
        # Not the position's own: a run that goes back must not forget why.
        self.in_a_row, self.faulty_step = start.faults_in_a_row, start.faulty_step
        engine.global_norm.judge = self._judge
        if engine.stage.embedding is not None:
            engine.stage.embedding.register_forward_hook(self._watch_first_gradient)

    @property
    def rewinds(self) -> bool:
        """Whether a run may go back, and so needs a checkpoint to go back to."""
        return "rewind" in (self.faults.not_finite, self.faults.spike)

    def begin(self, position: Position) -> None:
        """Before a step from there."""
        self.position, self.fault, self.scale = position, None, self.engine.current_loss_scale

    def take_loss(self, part: Tensor) -> None:
        """This rank's part of the step's mean loss, once all gradients are there."""
        first = self.engine.grid.tensor.is_first  # its ranks have the same
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
            usual = median(recent)  # 0 where no token of most batches counts: nothing to measure by
            if loss > faults.spike_factor * usual > 0:
                text = f"loss {loss:.4f} is {loss / usual:.2f} times the median {usual:.4f} of {len(recent)} steps"
                return Fault("spike", text, faults.spike)
        return None

    def after(self, samples: int, tokens: int) -> Position:
        """Where the judged step leads."""
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
        """After the judged step: a line about its fault for the log, None where there is none; raises TrainingError
        where the run must stop (collective where something was not finite)."""
        if self.fault is None or self.fault.kind == "overflow":
            return None
        text = self.fault.text + (f"; {self._origin()}" if self.fault.kind == "not_finite" else "")
        return self._answer(step, replace(self.fault, text=text))

    def check_sound(self, boxes: BoxDict, step: int) -> str | None:
        """As `answer`, about what is to be saved after a step: None where all of it is finite (collective)."""
        grid, names = self.engine.grid, not_finite(boxes)
        # Where all is well one number travels, in main memory; a name only from the lowest rank that has one.
        first = torch.tensor(grid.rank if names else grid.world_size)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        rank = int(first)
        if rank == grid.world_size:
            return None
        told = [names[0] if rank == grid.rank else ""]
        dist.broadcast_object_list(told, src=rank)
        name = told[0]
        action = (
            "rewind" if self.faults.not_finite == "rewind" else "stop"
        )  # what is skipped would not mend it
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
        return f"{line}: {({'skip': 'skipped', 'rewind': 'going back', 'warn': 'continues'})[fault.action]}"

    def _watch_first_gradient(self, module: Any, inputs: Any, output: Tensor) -> None:
        """What backward leaves at the embedding goes to nobody; it tells of all that came before it."""
        if output.requires_grad:
            output.register_hook(self._note_first_gradient)

    def _note_first_gradient(self, gradient: Tensor) -> None:
        action = self.pipeline.interpreter.action
        if action is not None:
            self.pipeline.note_peak(action, gradient)

    def _origin(self) -> str:
        """Where numbers first were not finite (collective)."""
        everyone = self._gather(self._first_found())
        found = [(where, rank) for rank, where in enumerate(everyone) if where is not None]
        names = self.engine.global_norm.not_finite()
        told = f"{', '.join(names[:NAMES])}{' …' * (len(names) > NAMES)}"
        gradients = [f"gradients of {len(names)} tensors ({told})"] if names else []
        if found:
            (_, text), _ = first = min(found)
            ranks = [self._rank(rank) for where, rank in found if where == first[0]]
            gradients.insert(0, f"first in {text} on {', '.join(ranks)}")
        return "; ".join(gradients)

    def _first_found(self) -> tuple[tuple[int, int, int], str] | None:
        """The first place on this rank, by (phase, micro-batch, order of the chunks in it), and its name."""
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
            found.append(((2, _LATER, 0), f"the gradient of {names[0]} as it is held"))
        return min(found, default=None)

    def _rank(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]} ({self.engine.grid.sizes.told(rank)})"

    def _gather(self, value: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.engine.grid.world_size
        dist.all_gather_object(everyone, value)
        return everyone
