"""Learning rates and batch sizes as functions of the position, compared with transformers' schedules and
Megatron-LM's ramp."""

from typing import Any

import pytest
import torch
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
from transformers.optimization import get_inverse_sqrt_schedule, get_wsd_schedule

from megalite.config import BatchPlan, Config, load_config
from megalite.config.sections import BatchRamp
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.model.parameter_groups import check_parameter_groups, learning_rate_factor

TINY = "ds_configs/tiny_cpu.json"


def tiny(*overrides: str) -> Config:
    return load_config(TINY, ["megalite.train.steps=40", *overrides]).resolve(8)


def factors(config: Config) -> list[float]:
    schedule, plan, length = config.schedule, config.batch_plan, config.data.sequence_length
    assert schedule is not None
    before = [plan.consumed(step) for step in range(40)]
    return [
        learning_rate_factor(schedule, i, n * length, plan.size(n) * length)
        for i, n in enumerate(before)
    ]


def of_transformers(make: Any, **keys: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = make(optimizer, num_warmup_steps=8, **keys)
    rates = []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules_are_those_of_transformers_after_the_warm_up() -> None:
    """During the warm-up megalite is one step ahead: its first rate is above 0."""
    rise = [(step + 1) / 8 for step in range(8)]
    for shape in ("linear", "cosine", "1-sqrt"):
        params = (
            f'{{"warmup_steps": 8, "decay_share": 0.3, "decay_shape": "{shape}", "min_ratio": 0.1}}'
        )
        keys = {
            "num_decay_steps": 12,
            "num_training_steps": 40,
            "decay_type": shape,
            "min_lr_ratio": 0.1,
        }
        ours = factors(tiny("scheduler.type=wsd", f"scheduler.params={params}"))
        assert ours == pytest.approx(rise + of_transformers(get_wsd_schedule, **keys)[8:])
    for timescale, params in (
        (None, '{"warmup_steps": 8}'),
        (20, '{"warmup_steps": 8, "timescale_steps": 20}'),
    ):
        ours = factors(tiny("scheduler.type=inverse_sqrt", f"scheduler.params={params}"))
        assert ours == pytest.approx(
            rise + of_transformers(get_inverse_sqrt_schedule, timescale=timescale)[8:]
        )


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_a_warm_up_in_tokens_is_one_in_steps_where_batches_are_equal(kind: str) -> None:
    steps = factors(tiny(f"scheduler.type={kind}", 'scheduler.params={"warmup_steps": 8}'))
    assert (
        factors(
            tiny(f"scheduler.type={kind}", f'scheduler.params={{"warmup_tokens": {8 * 16 * 128}}}')
        )
        == steps
    )
    ramp = 'megalite.train.batch_ramp={"start": 4, "increment": 4, "samples": 64}'
    ramped = factors(
        tiny(
            ramp, f"scheduler.type={kind}", f'scheduler.params={{"warmup_tokens": {8 * 16 * 128}}}'
        )
    )
    # Batches of 4 (6 steps), 8 (3), 12 (2), then 16: 72 samples in 11 steps, of 128 in the warm-up.
    assert ramped[:11] == [n / 128 for n in (4, 8, 12, 16, 20, 24, 32, 40, 48, 60, 72)]
    assert ramped[14] == 1.0 and ramped[13] < 1.0 and ramped[15] == steps[8]


@pytest.mark.parametrize("ramp", [(4, 4, 64), (8, 8, 1000), (4, 20, 7), (16, 8, 555)])
def test_the_ramp_is_megatron_s(ramp: tuple[int, int, int]) -> None:
    start, increment, samples = ramp
    theirs = RampupBatchsizeNumMicroBatchesCalculator(64, 4, 1, False, 1, start, increment, samples)
    plan, consumed = BatchPlan(64, BatchRamp(start=start, increment=increment, samples=samples)), 0
    for step in range(60):
        theirs.update(consumed, consistency_check=False)
        assert plan.size(consumed) == theirs.get_current_global_batch_size()
        assert (plan.consumed(step), plan.steps(consumed), plan.steps(consumed + 1)) == (
            consumed,
            step,
            step + 1,
        )
        consumed += plan.size(consumed)
    assert plan.size(consumed) == 64


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (['scheduler.params={"warmup_steps": 3, "warmup_tokens": 9}'], "warmup_tokens: 9: cannot be given together"),
        (['scheduler.params={"warmup_tokens": 9999999}'], "warmup_tokens: 9999999: is a warm-up of 4883 steps: must"),
        (["scheduler.type=wsd", 'scheduler.params={"warmup_steps": 37}'], "the decay's 4 steps must be at most total_"),
        (["scheduler.type=wsd", 'scheduler.params={"decay_steps": 90}'], "decay_steps: 90: must be at most total_"),
        (["scheduler.type=wsd", 'scheduler.params={"decay_steps": 9, "decay_share": 0.5}'], "cannot be given together"),
        (["scheduler.type=inverse_sqrt", "scheduler.params={}"], "timescale_steps: missing: give it, warmup_steps or"),
        (["scheduler.type=wds"], "must be one of constant, linear, cosine, wsd, inverse_sqrt"),
        (['megalite.train.batch_ramp={"start": 6, "increment": 4, "samples": 64}'],
         "batch_ramp.start: 6: must be a multiple of train_micro_batch_size_per_gpu 2 × data axis 2 = 4"),
        (['megalite.train.batch_ramp={"start": 4, "increment": 8, "samples": 64}'],
         "batch_ramp.increment: 8: must divide train_batch_size 16 - start 4 = 12"),
        (['megalite.train.batch_ramp={"start": 16, "increment": 4, "samples": 64}'], "start: 16: must be below train_"),
        (['megalite.train.parameter_groups=[{"match": "layers.9.*"}]'],
         "parameter_groups.0.match: 'layers.9.*': matches no tensor, such as final_norm.weight"),
        (['megalite.train.parameter_groups=[{"match": "layers.*"}, {"match": "layers.1.*"}]'],
         "parameter_groups.1.match: 'layers.1.*': earlier entries match every tensor that it matches"),
        (["optimizer.type=Muon"], '"Muon": must be one of AdamW, Adam, SGD: DeepSpeed\'s orthogonalizes'),
        (["optimizer.type=SGD"], "optimizer.params.betas: [0.9, 0.95]: is not a parameter of SGD; leave it out"),
        (["optimizer.type=lion"], '"lion": must be one of AdamW, Adam, SGD: DeepSpeed\'s moves weights'),
        (["scheduler.type=WarmupLR", "scheduler.params={}",
          'megalite.train.parameter_groups=[{"match": "layers.*", "lr_ratio": 2.0}]'],
         "parameter_groups.0.lr_ratio: 2.0: must be 1 with DeepSpeed's scheduler.type WarmupLR"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(keys: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config = tiny(*keys)
        check_parameter_groups(config, read_spec(config.model))
    assert line in str(raised.value) and "\n" not in str(raised.value)
