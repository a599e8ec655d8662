"""The watchers of a run, in order. A new one is a line here. Next: loop.py, which calls them."""

from pathlib import Path
from typing import Any, Protocol

import torch

from megalite.config import Config
from megalite.config.sections import RouterSection
from megalite.data.loader import TrainData
from megalite.data.position import Position
from megalite.engine.build import DTYPES
from megalite.engine.engine import Engine
from megalite.guard.health import Health
from megalite.guard.pace import Pace
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.pipeline.actions import Pipeline
from megalite.training.about import about, axes_of
from megalite.training.changed_rate import ChangedRate
from megalite.training.checkpointing import Checkpoints
from megalite.training.expert_load import ExpertLoad
from megalite.training.foreseen import Foreseen, device_of_run, predicted_seconds
from megalite.training.guards import PaceGuard, ReplicaGuard
from megalite.training.history import History, ReportWriter
from megalite.training.metrics import MetricsFile
from megalite.training.mfu import Utilisation, peak_flops
from megalite.training.sampler import Sampler
from megalite.training.screen import Screen
from megalite.training.speed import Speed
from megalite.training.summary import Summary
from megalite.training.tracing import StepTimeline
from megalite.training.trackers import Trackers
from megalite.training.watchers import Watcher


class Watched(Protocol):
    """The attributes of a run (loop.py) that watchers may use."""

    config: Config
    spec: TransformerSpec
    engine: Engine
    grid: Grid
    device: torch.device
    pipeline: Pipeline
    data: TrainData
    health: Health
    checkpoints: Checkpoints
    position: Position
    watchdog: Any

    def log(self, text: str) -> None: ...


def watchers_of(run: Watched) -> list[Watcher]:
    """Guards come first, so that their time counts as the step's, then watchers that add to a row, then those that show
    it."""
    config, spec, engine, data = run.config, run.spec, run.engine, run.config.data
    train, hosts = config.train, run.watchdog.hosts
    source = data.source_length
    pace = Pace(
        train.faults, engine, spec, data.counted_share, hosts, source / data.sequence_length
    )
    peak = peak_flops(run.device, DTYPES[config.precision])
    flops_per_token = spec.flops_per_token(data.sequence_length, data.counted_share, source)
    utilisation = Utilisation(flops_per_token, peak, run.grid.world_size)
    router = train.router or RouterSection.model_validate({})
    watchers = [
        ReplicaGuard(config, engine, run.health),
        PaceGuard(pace, run.log),
        *([ExpertLoad(engine, router.load_interval, run.log)] if spec.mixture is not None else []),
        Speed(utilisation),
        run.checkpoints,
        StepTimeline(
            run.grid,
            run.device,
            Path(train.run_dir),
            train.trace_steps,
            train.faults.pace_interval,
            run.log,
        ),
    ]
    if train.sample_prompts:
        watchers.append(Sampler(config, spec, run.grid, run.pipeline))
    if run.grid.rank == 0:
        watchers += _on_rank_0(run)
    return watchers


def _on_rank_0(run: Watched) -> list[Watcher]:
    """Rank 0's watchers. Screen is last, because closing the others may print a line. Trackers are next to last,
    because they may wait for a server: everything else is written by then."""
    train, first = run.config.train, run.position.step
    run_dir = Path(train.run_dir)
    owes = run.position.owes_evaluation and run.config.evaluates
    metrics = MetricsFile(run_dir, first, train.tensorboard, run.log, owes)
    history = History(run_dir, run.data, run.log)
    axes = " × ".join(f"{name} {size}" for name, size in axes_of(run.config).items())
    history.started(run.position, axes, metrics.last_seen)
    facts = about(run.config, run.spec)
    device = device_of_run(run.config, run.device, run.watchdog.hosts)
    decoder = run.spec.causal and not run.spec.labels
    return [
        ChangedRate(run.config, metrics.last_step, run.log),
        Foreseen(facts["predicted"], predicted_seconds(run.config, device), run.log),
        metrics,
        history,
        ReportWriter(run_dir, facts, run.log),
        Summary(run_dir, metrics, decoder, run.config.data, run.log),
        Trackers(train.trackers, run_dir, run.config.to_json(), run.log),
        Screen(train.last_step, first, train.log_interval),
    ]
