"""A line if a start changes the learning rate of a run that it resumes."""

import math

from megalite.config import Config
from megalite.data.position import Position
from megalite.model.parameter_groups import learning_rate_factor
from megalite.training.history import Log
from megalite.training.watchers import Row, Watcher

LEAST_CHANGE = 1e-3  # relative


class ChangedRate(Watcher):
    """Compares the learning rate of the last step before this start with what this start's schedule gives for that
    step. They differ if the schedule changed, or `megalite.train.steps`, where the schedule ends."""

    def __init__(self, config: Config, last: Row | None, log: Log) -> None:
        """last: the row of that step; None if there is none."""
        self.line, self.log = None if last is None else changed_rate(config, last), log

    def before_step(self, position: Position) -> None:
        """Prints the line before the first step."""
        if self.line is not None:
            self.log(self.line)
            self.line = None


def changed_rate(config: Config, last: Row) -> str | None:
    """The line about the row of a step; None if its learning rate is that of the config. DeepSpeed's own schedulers are
    not compared."""
    if config.schedule is None:
        return None
    step, plan, length = last["step"] - 1, config.batch_plan, config.data.sequence_length
    before = last.get("learning_rate")
    if before is None:
        return None
    step_tokens = plan.size(plan.consumed(step)) * length
    # From the row, since the run may have had another batch size until now.
    tokens = last["consumed_tokens"] - step_tokens
    factor = learning_rate_factor(config.schedule, step, tokens, step_tokens)
    rate = config.optimizer.params.lr * factor
    if math.isclose(rate, before, rel_tol=LEAST_CHANGE):
        return None
    return (
        f"the learning rate of step {last['step']} was {before:.3e}; this start's config gives {rate:.3e} for it (see "
        "optimizer.params.lr, scheduler, megalite.train.steps)"
    )
