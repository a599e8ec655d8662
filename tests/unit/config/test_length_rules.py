"""The rules for the length of a run, each checked by its error line."""

import pytest

from megalite.config import load_config
from megalite.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["megalite.train.steps=null"],
            "megalite.train.steps: missing: give it or megalite.train.epochs",
        ),
        (
            ["megalite.train.epochs=3"],
            "megalite.train.epochs: 3.0: must not be given with megalite.train.steps 200: set one of them to null",
        ),
        (
            ["megalite.train.epochs=0", "megalite.train.steps=null"],
            "megalite.train.epochs: 0: must be greater than 0",
        ),
        (
            [
                "megalite.train.epochs=3",
                "megalite.train.steps=null",
                'megalite.data.train=["a", "b"]',
            ],
            "megalite.train.epochs: 3.0: needs one corpus in megalite.data.train: a blend of 2 by weights has no epoch",
        ),
        (
            [
                "megalite.train.epochs=3",
                "megalite.train.steps=null",
                "megalite.data.order=megatron",
            ],
            'megalite.train.epochs: 3.0: needs megalite.data.order "shuffled"',
        ),
        (
            ["megalite.train.keep_best=true", "megalite.data.valid=[]"],
            "megalite.train.keep_best: true: needs megalite.data.valid",
        ),
        (
            ["megalite.train.early_stop.patience=2", "megalite.train.eval_interval=0"],
            'megalite.train.early_stop: {"patience": 2, "min_delta": 0.0}: needs megalite.train.eval_interval above 0',
        ),
        (
            ["megalite.train.early_stop.patience=0"],
            "megalite.train.early_stop.patience: 0: must be at least 1",
        ),
        (
            ["megalite.train.early_stop.min_delta=0.1"],
            "megalite.train.early_stop.patience: missing: this key has no default",
        ),
        (
            ['megalite.train.early_stop={"patience": 1, "min_delta": -1}'],
            "megalite.train.early_stop.min_delta: -1: must be at least 0",
        ),
    ],
)
def test_a_mistake_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("ds_configs/tiny_cpu.json", overrides).resolve(8)
    assert line in str(raised.value)
