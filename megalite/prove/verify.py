"""`tools/verify_layouts.py`: checks on a user's config that every layout trains the same.

One process trains a few steps with several micro-batch sizes; their differences are rounding, and a layout may differ
by 4 times as much. Then each layout trains the same steps, and every loss, norm, weight and Adam moment is compared
with the one process, as are the update of each step, an evaluation, and all of it after a resume halfway. It runs in
fp32, at a constant learning rate and with Adam's epsilon at 1e-4, so that a fault cannot hide in rounding.

Next: mutants.py, which plants faults to show how many of them this finds.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megalite.config import Config, load_config
from megalite.data.loader import TrainData
from megalite.engine.nvme import check_nvme
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.prove.layouts import (
    Layout,
    base_batch,
    common_batch,
    comparable,
    config_of,
    layouts_parser,
    micro_sizes,
)
from megalite.prove.mutants import chosen, mutants
from megalite.prove.trace import Piece, Trace
from megalite.ranks.arguments import at_least
from megalite.ranks.local import check_room, run_local_ranks

TIMES = 4.0  # a layout may differ by this many times the spread of one process
LEAST = 1e-6  # of a loss or norm, relative
LEAST_TENSOR = 5e-7  # of a tensor, by the ratio of norms: four units in the last place of fp32
CHANGED = 1e-5  # of a tensor: more than any order of summation causes in a few steps of fp32
AT_A_TIME = 12  # mutants that one start of ranks tries
UNIT_IN_LAST_PLACE = 2.0**-23  # of fp32, relative
DESCRIPTION = (
    "Train a few steps of the JSON on each layout and on one process, in fp32, at a constant learning rate and with "
    "Adam's epsilon at 1e-4 or more, resume halfway, evaluate at the end, and compare losses, norms, weights, updates "
    "and moments. Needs disk space for up to 60 bytes per weight and step, in the folder for temporary files."
)
RANK_MODULE = "megalite.prove.verify_rank"


@dataclass(frozen=True)
class LayoutDifference:
    """The first difference between a layout and the one process. what: loss, norm, or kind/name of a tensor. ratio:
    relative difference. bound: the allowed one. rank: the one that differs most."""

    step: int
    what: str
    rank: int
    ratio: float
    bound: float

    def __str__(self) -> str:
        where = f"{self.what} on rank {self.rank}"
        return f"step {self.step}: {where} differs by {self.ratio:.2e}, allowed {self.bound:.2e}"


@dataclass
class Verdict:
    """A layout's result. first: the differences in the first step that differs, of loss, norm and the tensor that
    differs most. worst: by kind (loss, norm, weight, exp_avg, exp_avg_sq) the largest ratio of a difference to its
    bound."""

    first: list[LayoutDifference] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)


class Spread:
    """The bounds: differences of one process between micro-batch sizes."""

    def __init__(self, reference: Trace, others: list[Trace]) -> None:
        self.reference = reference
        self.bounds: list[dict[str, float]] = []
        reached: dict[str, float] = {}
        for step in range(reference.steps):
            for other in others:
                for key, ratio, _ in differences(reference, other, step):
                    reached[key] = max(reached.get(key, 0.0), ratio)
            self.bounds.append(self._bounds(reached))

    @staticmethod
    def _bounds(reached: dict[str, float]) -> dict[str, float]:
        """A tensor that happened to be equal in all of them gets at least the usual bound of its kind."""
        kinds: dict[str, list[float]] = {}
        for key, ratio in reached.items():
            kinds.setdefault(key.partition("/")[0], []).append(ratio)
        usual = {kind: median(ratios) for kind, ratios in kinds.items()}
        bounds = {}
        for key, ratio in reached.items():
            kind = key.partition("/")[0]
            bounds[key] = (
                max(LEAST, TIMES * ratio)
                if kind == key
                else TIMES * max(LEAST_TENSOR, usual[kind], ratio)
            )
        return bounds

    def judge(self, trace: Trace) -> Verdict:
        """Compares a layout with the one process."""
        verdict = Verdict()
        for step in range(trace.steps):
            found: list[tuple[float, LayoutDifference]] = []
            for key, ratio, rank in differences(self.reference, trace, step):
                kind, bound = key.partition("/")[0], self.bounds[step][key]
                excess = ratio / bound if ratio == ratio else float("inf")
                verdict.worst[kind] = max(verdict.worst.get(kind, 0.0), excess)
                if excess > 1.0:
                    found.append((excess, LayoutDifference(step + 1, key, rank, ratio, bound)))
            if found and not verdict.first:
                figures = [difference for _, difference in found if "/" not in difference.what]
                tensors = [entry for entry in found if "/" in entry[1].what]
                farthest = max(tensors, key=lambda entry: entry[0], default=None)
                verdict.first = [*figures, *([farthest[1]] if farthest else [])]
        return verdict


def differences(one: Trace, other: Trace, step: int) -> Iterator[tuple[str, float, int]]:
    """(loss, norm, evaluation or kind/name; relative difference; rank that differs most) after a step.

    A tensor's difference is relative to its norm, or to the norm of a tensor with elements of its kind's usual size if
    that is larger: some gradients are only rounding, above all those of key biases, which softmax ignores. The update
    of a weight in the step is compared too, since a missing weight decay is small compared with the weight; what
    rounding causes (`_slope`) does not count. The difference is infinite if a copy is not equal to the piece that
    counts, or if no rank holds some elements.
    """
    for figure in one.figures[0][step].keys() & other.figures[0][step].keys():
        wanted = one.figures[0][step][figure]
        ratios = [
            abs(rank[step][figure] - wanted) / max(abs(wanted), 1e-30) for rank in other.figures
        ]
        worst = max(
            range(len(ratios)),
            key=lambda rank: ratios[rank] if ratios[rank] == ratios[rank] else float("inf"),
        )
        yield figure, ratios[worst], worst
    if missing := one.shapes.keys() ^ other.shapes.keys():
        yield from ((key, float("inf"), 0) for key in sorted(missing))
        return
    wanted_before, before = one.weights(step - 1), other.weights(step - 1)
    wanted_tensors, usual = one.full(step), one.usual(step)
    mean, moved = dict[str, float](), dict[str, float]()
    for (key, wanted, _), (_, full, pieces) in zip(wanted_tensors, other.full(step), strict=True):
        kind, _, name = key.partition("/")
        norm = max(wanted.double().norm().item(), usual[kind] * wanted.numel() ** 0.5, 1e-30)
        ratio, rank = _tensor_difference(wanted, full, pieces, norm)
        yield key, ratio, rank
        if kind == "exp_avg":
            mean[name] = norm / wanted.numel() ** 0.5
        elif kind == "exp_avg_sq" and one.adam is not None:
            slope = _slope(wanted, (wanted > 0) | (full > 0), name, step, one.adam)
            moved[name] = LEAST_TENSOR * mean[name] * slope
        elif kind == "weight":
            # Half a unit in the last place of each weight on both sides, and what rounded gradients cause.
            rounding = UNIT_IN_LAST_PLACE * norm + moved.get(name, 0.0)
            update = full - before[name]
            yield (
                f"update/{name}",
                _update_difference(wanted - wanted_before[name], update, rounding),
                rank,
            )


def _slope(
    second_moment: Tensor, counted: Tensor, name: str, step: int, adam: dict[str, Any]
) -> float:
    """Norm of lr / ((1 − β1^t) (√v̂ + ε)) over the elements that `counted` marks: how far a change of the first moment
    moves each weight, with the second moment fixed, an upper bound.

    If the terms of an element's gradient cancel out, the element is divided by little more than ε, so rounding, which
    is relative to the terms, moves the weight far. In a small tensor this may be most of the update.
    """
    beta1, beta2 = adam["beta1"] ** (step + 1), adam["beta2"] ** (step + 1)
    ratio = next((ratio for match, ratio in adam["groups"] if fnmatchcase(name, match)), 1.0)
    root = (second_moment.double() / (1 - beta2)).sqrt() + adam["eps"]
    return (ratio * adam["lr"] / (1 - beta1) / root)[counted].norm().item()


def _update_difference(wanted: Tensor, update: Tensor, rounding: float) -> float:
    """Relative to the update's norm, without rounding."""
    distance = max(0.0, (update - wanted).double().norm().item() - rounding)
    return distance / max(wanted.double().norm().item(), rounding, 1e-30)


def _tensor_difference(
    wanted: Tensor, full: Tensor, pieces: list[Piece], norm: float
) -> tuple[float, int]:
    for piece in pieces:
        if not torch.equal(piece.cut(full), piece.values):
            return float("inf"), piece.rank
    if full.isnan().any():
        return float("inf"), pieces[0].rank
    ratio = (full - wanted).double().norm().item() / norm
    distances = [(piece.values - piece.cut(wanted)).double().norm().item() for piece in pieces]
    return ratio, pieces[max(range(len(pieces)), key=distances.__getitem__)].rank


def main(arguments: list[str]) -> int:
    """Returns 0 if all layouts agree and all mutants that change a number are found, otherwise 1. Raises UserError with
    one line."""
    parser = layouts_parser(
        "verify_layouts.py",
        DESCRIPTION,
        "pipe=2,tensor=2,data=2,zero=2",
        "optimizer steps",
    )
    mutants_help = "then plant up to N faults in each layout, and report how many are found"
    parser.add_argument("--mutants", type=at_least(0), default=0, metavar="N", help=mutants_help)
    options = parser.parse_args(arguments)
    if options.mutants and options.steps < 2:
        raise ConfigError(
            f"--steps: {options.steps}: must be 2 or more with --mutants, to include a resume"
        )
    layouts = [Layout.parse(text) for text in options.layouts]
    config = comparable(load_config(options.deepspeed_config, options.set))
    batch = base_batch(config, layouts[0])
    configs = {layout: config_of(config, layout, batch) for layout in layouts}
    for layout, one in configs.items():
        check_room(layout.world_size, str(layout))
        check_nvme(one, read_spec(one.model), layout.world_size)
    alone = _of_one_process(config, batch)
    with tempfile.TemporaryDirectory(prefix="verify_layouts_") as folder:
        reference, *others = _traces(alone, 1, options.steps, Path(folder) / "one")
        spread = Spread(reference, others)
        verdicts, all_found = {}, True
        for layout, one in configs.items():
            with tempfile.TemporaryDirectory(prefix="layout_", dir=folder) as inner:
                own, size = Path(inner) / "own", layout.world_size
                (trace,) = _traces([one.to_json()], size, options.steps, own)
                verdict = verdicts[layout] = spread.judge(trace)
                print(f"{layout}: {'; '.join(map(str, verdict.first)) or 'agrees'}", flush=True)
                if options.mutants:
                    all_found &= _try_mutants(one, options.mutants, spread, trace, Path(inner))
    print("\n" + table(verdicts))
    return 1 if any(verdict.first for verdict in verdicts.values()) or not all_found else 0


def _of_one_process(config: Config, batch: int) -> list[dict[str, Any]]:
    """The JSON of one process for each micro-batch size from which bounds are computed. Opens the data. Raises
    ConfigError if there is only one size."""
    given = config_of(config, Layout(zero=0), batch, offload=False)
    sizes = micro_sizes(common_batch(given), given.micro_batch_size)
    if len(sizes) < 2:
        raise ConfigError(
            f"train_batch_size: {batch}: must be 2 or more: bounds need several micro-batch sizes"
        )
    TrainData(given.data, given.train.seed, read_spec(given.model).vocabulary_size)
    listed = ", ".join(map(str, sizes))
    print(f"one process, micro-batches of {listed} of {batch} samples", flush=True)
    layouts = [Layout(zero=0, micro=size) for size in sizes]
    return [config_of(config, layout, batch, offload=False).to_json() for layout in layouts]


def _try_mutants(config: Config, count: int, spread: Spread, sound: Trace, folder: Path) -> bool:
    """Plants faults in a layout and prints the results. Returns whether all that change a number were found."""
    names = chosen(mutants(config), count)
    without_effect, missed = [], []
    for first in range(0, len(names), AT_A_TIME):
        some = names[first : first + AT_A_TIME]
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            requests = [config.to_json()] * len(some)
            traces = _traces(requests, config.world_size, sound.steps, Path(inner), some)
            for name, trace in zip(some, traces, strict=True):
                if not _changes(sound, trace):
                    without_effect.append(name)
                elif not spread.judge(trace).first:
                    missed.append(name)
        print(f"    {first + len(some)} of {len(names)} mutants tried", flush=True)
    changing = len(names) - len(without_effect)
    found = f"{changing - len(missed)} of these are found"
    print(f"    {len(names)} mutants: {changing} change a number beyond rounding, {found}")
    for what, some in (("missed", missed), ("without effect", without_effect)):
        print(*(f"    {what}: {name}" for name in some), sep="\n", end="\n" if some else "")
    sys.stdout.flush()
    return not missed


def _changes(sound: Trace, trace: Trace) -> bool:
    """Whether a mutant differs from the unmodified layout by more than rounding."""
    return any(
        not ratio <= (LEAST if key in ("loss", "norm", "evaluation") else CHANGED)
        for step in range(sound.steps)
        for key, ratio, _ in differences(sound, trace, step)
    )


def _traces(
    configs: list[dict[str, Any]],
    world_size: int,
    steps: int,
    folder: Path,
    planted: Sequence[str] = (),
) -> list[Trace]:
    """Trains each config, one after another, on newly started ranks. planted: a mutant for each."""
    folders = [folder / str(number) for number in range(len(configs))]
    for each in folders:
        each.mkdir(parents=True)
    request = folder / "request.json"
    runs: list[dict[str, Any]] = [
        {"config": config, "folder": str(each)}
        for config, each in zip(configs, folders, strict=True)
    ]
    for run, name in zip(runs, planted, strict=False):
        run["mutant"] = name
    request.write_text(json.dumps({"steps": steps, "runs": runs}))
    run_local_ranks(world_size, RANK_MODULE, [str(request)])
    return [Trace(each) for each in folders]


def table(verdicts: dict[Layout, Verdict]) -> str:
    """One line per layout: for each kind the largest difference as a multiple of the allowed one."""
    kinds = ["loss", "norm", "evaluation", "exp_avg", "exp_avg_sq", "weight", "update"]
    width = max(len(str(layout)) for layout in verdicts)
    lines = [
        f"{'layout':{width}}  " + "  ".join(f"{kind:>10}" for kind in kinds) + "  (1 = allowed)"
    ]
    for layout, verdict in verdicts.items():
        figures = "  ".join(f"{verdict.worst.get(kind, 0.0):10.3g}" for kind in kinds)
        lines.append(
            f"{str(layout):{width}}  {figures}  {'differs' if verdict.first else 'agrees'}"
        )
    return "\n".join(lines)
