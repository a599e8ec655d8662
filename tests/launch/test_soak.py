"""A long run over two hosts that something happens to again and again. The line that it prints is in README.md."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.hosts import Cluster
from tests.launch.starts import Start, write_config
from tests.launch.test_host_failures import LIMIT, kill_a_launcher, kill_deepspeed, stop_a_rank
from tests.launch.test_hosts import losses

MINUTES = float(os.environ.get("SOAK_MINUTES", 30))
FAULT_MINUTES = float(os.environ.get("SOAK_FAULT_MINUTES", 7.5))
LEAST_GOODPUT = float(os.environ.get("SOAK_GOODPUT", 0.95))
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 690,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
}


def kill_rank_0(one: Start, cluster: Cluster) -> None:
    one.ranks[0].kill()


def kill_rank_1(one: Start, cluster: Cluster) -> None:
    one.ranks[1].kill()


FAULTS = [kill_rank_0, kill_rank_1, kill_a_launcher, kill_deepspeed, stop_a_rank]


def newest(run: Path) -> dict[str, Any]:
    """The last whole row of the metrics, without a look at the rest: the machine is to train meanwhile."""
    if not (run / "metrics.jsonl").exists():
        return {"step": 0}
    with (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2] or '{"step": 0}')


def wait_for_steps(run: Path, steps: int = 3) -> None:
    """Until so many more have been taken."""
    deadline = time.monotonic() + 200
    last = newest(run)["step"] + steps
    while newest(run)["step"] < last:
        assert time.monotonic() < deadline, f"step {last} is not reached within 200 s"
        time.sleep(1)


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_a_soak(tmp_path: Path, cluster: Cluster, start: Callable[..., Start]) -> None:
    """For SOAK_MINUTES (30), at a random moment of each SOAK_FAULT_MINUTES (7.5), one of FAULTS, all in turn by a
    random order: at least 95 % useful time, losses and last weights those of a run without faults bit for bit. Between
    the hosts is a network on which a step of so small a model takes more than a second."""
    cluster.limit("200mbit")
    config, run = (
        write_config(tmp_path, steps=10**6, checkpoint_interval=2, keep_checkpoints=2),
        tmp_path / "run",
    )
    model = [f"megalite.model.{key}={value}" for key, value in MODEL.items()]
    arguments = [f"--deepspeed_config={config}", *model, "megalite.data.sequence_length=128"]
    one = start(
        tmp_path, *arguments, LIMIT, launcher="run", hosts=cluster.hosts,
        options=["--hostfile", str(cluster.hostfile()), "--restarts", "1000"],
    )  # fmt: skip
    begin, chance, order, count = time.monotonic(), random.Random(0), list(FAULTS), 0
    for slot in range(int(MINUTES / FAULT_MINUTES)):
        if not slot % len(FAULTS):
            chance.shuffle(order)
        moment = begin + 60 * FAULT_MINUTES * (slot + chance.uniform(0.1, 0.9))
        time.sleep(max(0.0, moment - time.monotonic()))
        wait_for_steps(run)
        order[slot % len(FAULTS)](one, cluster)
        count += 1
    time.sleep(max(0.0, begin + 60 * MINUTES - time.monotonic()))
    wait_for_steps(run)
    one.run.send_signal(signal.SIGTERM)
    assert one.wait(60) == 143, one.text
    last = newest(run)
    again = one.text.count(" follows")
    print(f"{count} faults, {again} restarts, {last['step']} steps, goodput {last['goodput']:.3f}")
    assert again == count, one.text
    assert last["goodput"] >= LEAST_GOODPUT
    whole = start(
        tmp_path, *arguments, f"megalite.train.steps={last['step']}",
        f"megalite.train.run_dir={tmp_path / 'whole'}",
    )  # fmt: skip
    assert whole.wait(7200) == 0
    print(f"without faults: goodput {newest(tmp_path / 'whole')['goodput']:.3f}")
    assert losses(run) == losses(tmp_path / "whole")
    files = [*(tmp_path / "whole/checkpoints" / f"step_{last['step']:08d}").glob("*.safetensors")]
    assert files
    for file in files:
        assert (
            file.read_bytes()
            == (run / "checkpoints" / f"step_{last['step']:08d}" / file.name).read_bytes()
        )
