"""Reads the rank and world size that `deepspeed`, `torchrun`, `srun` or Open MPI set in the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from megalite.errors import ConfigError
from megalite.ranks.arguments import SHOWN_CHARACTERS, is_number

MOST_RANKS = 2**17


@dataclass(frozen=True)
class RankPlace:
    """This process's rank and the world size, and its rank and the number of ranks on this node."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    started: ClassVar = False
    """Whether this process has become a rank."""


def place() -> RankPlace:
    """This process's place, from the environment that a launcher set; a world of one rank if there was no launcher.
    Raises ConfigError if the variables contradict each other."""
    env = os.environ
    # Not by SLURM_PROCID: a batch script has it too, but is not a task of a step.
    if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env:
        _rename(RANK="SLURM_PROCID", WORLD_SIZE="SLURM_STEP_NUM_TASKS", LOCAL_RANK="SLURM_LOCALID")
        env["LOCAL_WORLD_SIZE"] = str(_slurm_local_size(env))
    if "RANK" not in env and "OMPI_COMM_WORLD_RANK" in env:
        names = {
            "RANK": "RANK",
            "WORLD_SIZE": "SIZE",
            "LOCAL_RANK": "LOCAL_RANK",
            "LOCAL_WORLD_SIZE": "LOCAL_SIZE",
        }
        _rename(**{ours: f"OMPI_COMM_WORLD_{theirs}" for ours, theirs in names.items()})
    size = from_environment("WORLD_SIZE", 1, least=1, most=MOST_RANKS)
    local_name = next(
        (name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), "WORLD_SIZE"
    )
    local_size = from_environment(local_name, 1, least=1)
    rank, local_rank = from_environment("RANK", 0), from_environment("LOCAL_RANK", 0)
    for name, value, limit_name, limit in (
        ("RANK", rank, "WORLD_SIZE", size), ("LOCAL_RANK", local_rank, local_name, local_size),
        (local_name, local_size - 1, "WORLD_SIZE", size),
    ):  # fmt: skip
        if value >= limit:  # the others would wait for a rank that cannot exist
            rule = "must be at most" if name == local_name else "must be below"
            raise ConfigError(f"environment: {name}: {env[name]}: {rule} {limit_name} {limit}")
    return RankPlace(rank, size, local_rank, local_size)


def _rename(**names: str) -> None:
    """Copies a launcher's variables to the names that torch reads."""
    for ours, theirs in names.items():
        if theirs not in os.environ:
            raise ConfigError(
                f"environment: {theirs}: missing: must be set along with the launcher's other variables"
            )
        os.environ[ours] = os.environ[theirs]


def from_environment(name: str, default: int, least: int = 0, most: int = 2**31 - 1) -> int:
    """The value of an integer variable that launchers set. Raises ConfigError if it is not within the limits."""
    text = os.environ.get(name, str(default))
    if not is_number(text) or not least <= int(text) <= most:
        rule = f"must be an integer from {least} to {most}"
        raise ConfigError(f"environment: {name}: {text[:SHOWN_CHARACTERS]!r}: {rule}")
    return int(text)


def _slurm_local_size(env: Mapping[str, str]) -> int:
    """Number of tasks on this node: its entry in a list such as `4(x2),3`."""
    node = from_environment("SLURM_NODEID", 0)
    for count, _, times in re.findall(
        r"(\d{1,9})(\(x(\d{1,9})\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")
    ):
        if node < int(times or 1):
            return int(count)
        node -= int(times or 1)
    raise ConfigError(
        "environment: SLURM_STEP_TASKS_PER_NODE: must list the tasks of node SLURM_NODEID, as in 4(x2),3"
    )
