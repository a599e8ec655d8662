"""The rules of `scheduler`: the parameters of each type, and a warm-up that fits into the schedule.

Each function takes the validated document (or sizes) and raises ConfigError with one line that names the key, its
value and the rule.
"""

from typing import Any

from megalite.config.batch_plan import BatchPlan
from megalite.config.document import Document
from megalite.config.rate_schedules import SCHEDULES, WSD, Constant, InverseSqrt, Linear
from megalite.config.section import Section, Wrong, broken, nearest, parse, read
from megalite.errors import ConfigError


def wrong_schedule(value: Any) -> Wrong:
    """What is wrong with `scheduler.params` in a whole JSON, whose other parts may be wrong too."""
    scheduler = value.get("scheduler") if isinstance(value, dict) else None
    if not isinstance(scheduler, dict):
        return {}
    kind, params = scheduler.get("type"), scheduler.get("params")
    if not isinstance(kind, str) or kind not in SCHEDULES or not isinstance(params, dict):
        return {}
    _, wrong = read(SCHEDULES[kind], params, "scheduler.params")
    return {("scheduler", "params", *place): line for place, line in wrong.items()}


def check_schedule(document: Document) -> Section | None:
    """The parameters of `scheduler` as the section of its type; None if there is no scheduler."""
    scheduler = document.scheduler
    if scheduler is None:
        return None
    if scheduler.type not in SCHEDULES:
        near = nearest(scheduler.type, SCHEDULES)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise broken(
            "scheduler.type", scheduler.type, f"must be one of {', '.join(SCHEDULES)}{hint}"
        )
    params = parse(SCHEDULES[scheduler.type], scheduler.params, "scheduler.params")
    if isinstance(params, Constant):
        _check_own_schedule(params)
    warmup_key = "warmup_steps" if hasattr(params, "warmup_steps") else "warmup_num_steps"
    total_key = "total_steps" if hasattr(params, "total_steps") else "total_num_steps"
    if hasattr(params, total_key):
        total = getattr(params, total_key) or document.megalite.train.steps
        warmup = getattr(params, warmup_key)
        if warmup is not None and total is not None:  # total is None while it depends on epochs
            _check_fall(params, f"scheduler.params.{warmup_key}", warmup, warmup, total, total_key)
    return params


def _check_own_schedule(params: Constant) -> None:
    path = "scheduler.params"
    if params.warmup_tokens is not None and params.warmup_steps > 0:
        rule = "cannot be given together with warmup_steps"
        raise broken(f"{path}.warmup_tokens", params.warmup_tokens, rule)
    if isinstance(params, WSD) and None not in (params.decay_steps, params.decay_share):
        rule = "cannot be given together with decay_steps"
        raise broken(f"{path}.decay_share", params.decay_share, rule)
    unscaled = isinstance(params, InverseSqrt) and params.timescale_steps is None
    if unscaled and params.warmup_steps == 0 and params.warmup_tokens is None:
        raise ConfigError(
            "scheduler.params.timescale_steps: missing: give it, warmup_steps or warmup_tokens"
        )


def decay_steps(params: WSD, total: int) -> int:
    """Steps of the decay in a schedule of `total` steps."""
    return params.decay_steps or max(1, round((params.decay_share or 0.1) * total))


def _check_fall(
    params: Section, key: str, value: int, warmup: int, total: int, total_key: str = "total_steps"
) -> None:
    """Checks that a warm-up of `warmup` steps, which `value` of `key` gives, and the decay fit into `total` steps."""
    if isinstance(params, WSD) and (params.decay_steps or 0) > total:
        rule = f"must be at most {total_key} {total}"
        raise broken("scheduler.params.decay_steps", params.decay_steps, rule)
    in_steps = "" if value == warmup else f"is a warm-up of {warmup} steps: "
    if isinstance(params, WSD) and warmup + decay_steps(params, total) > total:
        rule = f"and the decay's {decay_steps(params, total)} steps must be at most {total_key} {total} together"
        raise broken(key, value, f"{in_steps}{rule}")
    if warmup > total:
        rule = f"must be at most {total_key} {total} (megalite.train.steps if it is left out)"
        raise broken(key, value, f"{in_steps}{rule}")


def warmup_steps(document: Document, params: Constant, plan: BatchPlan) -> int:
    """Steps of the warm-up, also if it is given in tokens. Raises ConfigError if it is too long for the schedule."""
    megalite = document.megalite
    if params.warmup_tokens is None:
        return params.warmup_steps
    steps = plan.steps(-(-params.warmup_tokens // megalite.data.sequence_length))
    if isinstance(params, Linear):
        total = params.total_steps or megalite.train.steps
        if total is not None:
            key = "scheduler.params.warmup_tokens"
            _check_fall(params, key, params.warmup_tokens, steps, total)
    return steps
