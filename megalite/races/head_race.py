"""Race of only the head and its loss, with GPT-2's sizes: ours against F.linear with F.cross_entropy, in one
process."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from megalite.races.referee import spread

TOKENS, HIDDEN, VOCABULARY = 1024, 768, 50257


def main(rounds: int) -> None:
    """Prints a line for each implementation and dtype."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from megalite.parallel.grid import ALONE
    from megalite.parallel.loss import head_loss

    torch.set_num_threads(1)
    print(
        f"\nhead: {TOKENS:,} tokens, hidden {HIDDEN}, vocabulary {VOCABULARY:,}, {rounds} rounds, one thread"
    )
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "megalite": lambda hidden, weight: head_loss(
            hidden, weight, None, labels, VOCABULARY, ALONE
        ),
        "linear + cross_entropy": lambda hidden, weight: F.cross_entropy(
            F.linear(hidden, weight).float(), labels, reduction="sum"
        ),
        "linear + cross_entropy, 16 bits": lambda hidden, weight: F.cross_entropy(
            F.linear(hidden, weight), labels, reduction="sum"
        ),
    }
    for dtype in (torch.float32, torch.bfloat16):
        names = [name for name in ways if dtype != torch.float32 or "16 bits" not in name]
        _race({name: ways[name] for name in names}, dtype, rounds)


def _race(ways: dict[str, Any], dtype: Any, rounds: int) -> None:
    """Races in one dtype; the order alternates from round to round, and the first round does not count."""
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).mul(0.02).to(dtype).requires_grad_()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}

    def step(name: str) -> float:
        loss = ways[name](hidden, weight) / TOKENS
        loss.backward()
        hidden.grad = weight.grad = None
        return loss.item()

    peaks = {name: _peak_bytes(partial(step, name)) for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        for name in names if number % 2 else names[::-1]:
            start = time.process_time()
            losses[name] = step(name)
            seconds[name].append(time.process_time() - start)
    kept = hidden.nbytes + weight.nbytes
    for name in names:
        own = seconds[name][1:]
        ratio = median(own) / median(seconds["megalite"][1:])
        memory = f"peak {peaks[name] / 1e6:4.0f} MB, {(peaks[name] - kept) / 1e6:4.0f} besides the gradients"
        print(
            f"{str(dtype)[6:]:9} {name:32} loss {losses[name]:.4f}  {spread(own)} s  ratio {ratio:.3f}  {memory}"
        )


def _peak_bytes(work: Callable[[], object]) -> int:
    """Peak bytes that torch allocates in `work`."""
    import torch

    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    now = highest = 0
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest
