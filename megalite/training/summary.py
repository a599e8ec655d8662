"""The summary at a run's end: tokens, time, the best validation loss, the paths of checkpoint and report, and what to
do next."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint.files import named_best
from megalite.config import Data
from megalite.data.position import Position
from megalite.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megalite.report.numbers import clock
from megalite.report.read import REPORT, STOPPED_BY_ERROR
from megalite.training.metrics import MetricsFile
from megalite.training.watchers import Watcher


class Summary(Watcher):
    """Summary of one start, on rank 0. decoder: whether the model can continue text. data: of the config."""

    def __init__(
        self,
        run_dir: Path,
        metrics: MetricsFile,
        decoder: bool,
        data: Data,
        log: Callable[[str], None],
    ) -> None:
        self.run_dir, self.metrics, self.decoder, self.log = run_dir, metrics, decoder, log
        self.data = data
        self.begin = time.monotonic()
        self.first_tokens: int | None = None

    def before_step(self, position: Position) -> None:
        """Remembers the tokens at the start."""
        if self.first_tokens is None:
            self.first_tokens = position.consumed_tokens

    def ended(self, position: Position, reason: str) -> None:
        """Prints the summary, unless the run ended with an error, which is then printed last."""
        if reason.startswith(STOPPED_BY_ERROR):
            return
        seconds = time.monotonic() - self.begin
        tokens = position.consumed_tokens - (self.first_tokens or 0)
        self.log(
            f"{reason}: step {position.step}, {tokens:,} tokens in {clock(seconds)}, "
            f"{tokens / seconds:,.0f} tokens/s"
        )
        if (best := self.metrics.best) is not None:
            self.log(f"best validation loss {best['valid_loss']:.4f} at step {best['step']}")
        self.log(f"checkpoint {self.run_dir / 'checkpoints'}, report {self.run_dir / REPORT}")
        if (best_name := named_best(self.run_dir)) is not None:
            self.log(f"best checkpoint {best_name}: --checkpoint {self.run_dir} --best")
        if not reason.startswith("signal"):
            self.log(f"next: {self._next()}")

    def _next(self) -> str:
        """A command for the trained model, in the form in which this program was started."""
        program = Path(sys.argv[0])
        name, rest = (
            ("generate", ' --prompt "…"') if self.decoder else ("evaluate", " --data PREFIX")
        )
        if self.decoder and self._is_of_conversations():
            name, rest = "chat", ""
        sibling = program.with_name(f"{name}.py")
        command = f"python {shlex.quote(str(sibling))}" if sibling.is_file() else f"megalite {name}"
        best = "" if named_best(self.run_dir) is None else " --best"
        return f"{command} --checkpoint {shlex.quote(str(self.run_dir))}{best}{rest}"

    def _is_of_conversations(self) -> bool:
        """Whether the run trained on answers, with a tokenizer that renders conversations."""
        if self.data.loss != "marked" or self.data.tokenizer is None:
            return False
        tokenizer = load_tokenizer(self.data.tokenizer)
        return isinstance(tokenizer, HuggingFaceTokenizer) and bool(tokenizer.inner.chat_template)
