"""What a run tells: the progress line, `metrics.jsonl`, the tracker and the pictures, from the same figures.

A step's figures are read from the device one step late, so that reading them never keeps the device waiting.
"""

import logging
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from qlatrain.files import writing
from qlatrain.metrics.console import RunConsole
from qlatrain.metrics.kernel_times import KernelTimes
from qlatrain.metrics.plots import plot_run
from qlatrain.metrics.recorder import MetricsWriter, read_metrics
from qlatrain.metrics.throughput import Throughput
from qlatrain.metrics.trackers import Tracker
from qlatrain.training.checkpoints import TrainState
from qlatrain.training.step import PendingResult, StepResult


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class _Waiting:
    step: int
    lr: float
    result: PendingResult
    timed: bool


class Report:
    """
    Args:
        console, tracker, throughput: where figures go and where speed comes from.
        run_dir: `metrics.jsonl` and `loss.png` are written here, by the main process.
        state: its counters of tokens and skipped steps are kept up to date.
        steps: of the whole run.
        tokens_per_step: over all processes.
        log_every: steps between lines.
        max_skipped_steps: steps with a non-finite gradient in a row that end the run.
        late: steps that may be on their way: 1 on a GPU, 0 where nothing runs behind the host's back.
        resumed_step: rows after it are dropped from `metrics.jsonl`; None begins the file anew.
    """

    def __init__(
        self,
        console: RunConsole,
        tracker: Tracker,
        throughput: Throughput,
        run_name: str,
        run_dir: Path,
        state: TrainState,
        steps: int,
        tokens_per_step: int,
        log_every: int,
        max_skipped_steps: int,
        late: int,
        is_main: bool,
        resumed_step: int | None,
    ):
        self.console, self.tracker, self.throughput = console, tracker, throughput
        self.run_name, self.run_dir, self.state, self.steps = run_name, run_dir, state, steps
        self.tokens_per_step, self.log_every, self.max_skipped_steps = tokens_per_step, log_every, max_skipped_steps
        self.late = late
        self.stop_agreed = False  # by all processes, at the same step
        self._waiting: deque[_Waiting] = deque()
        self._writer = None
        if is_main:
            with writing(run_dir / "metrics.jsonl"):
                self._writer = MetricsWriter(run_dir / "metrics.jsonl", resumed_step)

    def step(self, step: int, lr: float, result: PendingResult, timed: bool = True) -> None:
        """step: optimizer steps taken, this one included; timed: as in `Throughput.step`. Reports what has arrived."""
        self._waiting.append(_Waiting(step, lr, result, timed))
        while len(self._waiting) > self.late:
            self._read_one()

    def flush(self) -> None:
        """Waits for and reports every step so far."""
        while self._waiting:
            self._read_one()

    def _read_one(self) -> None:
        waiting = self._waiting.popleft()
        result = waiting.result.read()
        self.throughput.step(self.tokens_per_step, result.flops, waiting.timed)
        self.state.tokens += int(result.targets)
        self.state.skipped += int(result.skipped)
        self.stop_agreed = self.stop_agreed or result.stop > 0
        if result.skipped:
            self.console.warning(f"step {waiting.step} was skipped: its gradient is not finite")
        if waiting.step % self.log_every == 0 or waiting.step == self.steps or self.stop_agreed:
            self._log(waiting, result)
        if result.skipped_in_a_row >= self.max_skipped_steps:
            raise TrainingStopped(
                f"the gradient was not finite {int(result.skipped_in_a_row)} steps in a row, up to step "
                f"{waiting.step}: lower optim.lr or look at the data; the last checkpoint is from before"
            )

    def _log(self, waiting: _Waiting, result: StepResult) -> None:
        interval = self.throughput.record()
        row = {
            "step": waiting.step,
            "loss": result.loss,
            "lr": waiting.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": interval and interval.tokens_per_second,
            "mfu": interval and interval.mfu,
            "tokens": self.state.tokens,
            "skipped_steps": self.state.skipped,
        }
        self._write(row)
        # the line shows the smoothed speed, the file the exact one
        shown = row | {"tokens_per_second": self.throughput.tokens_per_second, "mfu": self.throughput.mfu}
        self.console.step(shown, self.steps, self.throughput.seconds_left(self.steps - waiting.step))

    def validation(
        self, step: int, nll: float, targets: float, bytes_per_token: float | None, bigram: float | None
    ) -> None:
        """nll: sum over `targets` held-out tokens, in nats; bigram: the baseline's bits per byte; None: left out."""
        loss = nll / targets
        row = {"step": step, "validation_loss": loss}
        if bytes_per_token is not None:
            row["validation_bits_per_byte"] = loss / math.log(2) / bytes_per_token
        if bigram is not None:
            row["bigram_bits_per_byte"] = bigram
        self._write(row)
        self.console.validation(row)
        self._plot()

    def kernel_times(self, step: int, times: KernelTimes | None) -> None:
        """times: of step `step`, which was profiled; None, a warning here, where the profiler saw nothing."""
        if self._writer is None:
            return
        if times is None:
            self.console.warning(
                f"no kernel times of step {step}: the profiler saw no kernel; KINETO_LOG_LEVEL=0 shows what it says"
            )
            return
        row = {"step": step, **times.row()}
        self._write(row)
        self.console.kernel_times(row)

    def _write(self, row: dict) -> None:
        if self._writer is not None:
            with writing(self.run_dir / "metrics.jsonl"):
                self._writer.write(row)
        self.tracker.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def _plot(self) -> None:
        if self._writer is not None:
            with writing(self.run_dir / "loss.png"):
                plot_run(self.run_dir / "metrics.jsonl", self.run_dir / "loss.png", self.run_name)

    def finish(self, files: dict[str, Path]) -> None:
        """The summary, and the last picture."""
        if self._writer is not None:
            self._writer.close()
            self._plot()
            rows = read_metrics(self.run_dir / "metrics.jsonl")
            validations = [row for row in rows if "validation_loss" in row]
            self.console.summary(
                self.throughput.summary(),
                self.state.step,
                validations,
                self.state.skipped,
                {"run": self.run_dir, **files},
            )
        self.tracker.finish()


class ConsoleLog(logging.Handler):
    """Lines of our packages' loggers, such as which backend runs, on the run's console."""

    def __init__(self, console: RunConsole):
        super().__init__(logging.INFO)
        self.console = console
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self.lines.append(line)
        (self.console.warning if record.levelno >= logging.WARNING else self.console.note)(line)

    def attach(self) -> None:
        for name in ("qlatrain", "qlakernels"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            logger.propagate = False
            logger.handlers = [self]
