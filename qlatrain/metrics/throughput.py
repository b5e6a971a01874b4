"""Tokens per second, model FLOPs utilisation (MFU) and time left.

Two numbers are kept apart: a record is exact over the steps since the last record; what the status line shows is
the median of the last few records, because a single slow step should not make the line jump.

The clock is the host's. A device works behind the host, so the time of one step means little; the time between two
moments at which the host has read a result back (which logging a loss does) is right. Hence records are taken when
a row is logged, and not at every step.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Interval:
    """Training between two records, validation and checkpoints left out."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None  # 0..1; None without a peak


@dataclass(frozen=True)
class ThroughputSummary:
    """A whole run, or its part since the resume."""

    steps: int
    tokens: int
    train_seconds: float
    paused_seconds: float  # validation, checkpoints, plots, untimed steps
    tokens_per_second: float  # without the warm-up steps
    mfu: float | None  # without the warm-up steps
    excluded_steps: int  # warm-up steps left out of the two figures above
    untimed_steps: int = 0  # left out of them as well


class Throughput:
    """Measures a training loop. Tokens and FLOPs are those of all processes together, and so is `peak_flops`.

    peak_flops: FLOP/s of all devices; None where no MFU is wanted.
    warmup_steps: steps left out of the summary's means (compilation, allocator, caches). They are left out up to the
        first record at or after them; a run shorter than that is summarised whole.
    window: records in the median that `tokens_per_second` and `mfu` show.
    """

    def __init__(
        self,
        peak_flops: float | None = None,
        warmup_steps: int = 5,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._peak, self._warmup, self._clock = peak_flops, warmup_steps, clock
        self._recent: deque[Interval] = deque(maxlen=window)
        self._steps, self._tokens, self._flops = 0, 0, 0.0  # since the last record
        self._untimed_steps = self._untimed_tokens = self._interval_untimed = 0
        self._interval_paused = self._paused = 0.0
        self._pausing = False
        # steps, tokens, FLOPs and seconds: over everything, and over the part that is left out of the means
        self._all = [0, 0, 0.0, 0.0]
        self._excluded = [0, 0, 0.0, 0.0]
        self._start = clock()

    def start(self) -> None:
        """Sets the clock's zero to now; without it, it is the moment of construction."""
        self._start, self._interval_paused = self._clock(), 0.0

    def step(self, tokens: int, flops: float, timed: bool = True) -> None:
        """Counts one optimizer step: its tokens and FLOPs over all processes. Reads no clock and waits for nothing.

        A step that is not timed, because it was taken in a pause, belongs to the totals and to no speed.
        """
        if timed:
            self._steps, self._tokens, self._flops = self._steps + 1, self._tokens + tokens, self._flops + flops
        else:
            self._untimed_steps, self._untimed_tokens = self._untimed_steps + 1, self._untimed_tokens + tokens
            self._interval_untimed += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside belongs to no step: validation, checkpoints, plots. May be nested."""
        if self._pausing:
            yield
            return
        self._pausing, start = True, self._clock()
        try:
            yield
        finally:
            self._pausing = False
            seconds = self._clock() - start
            self._interval_paused += seconds
            self._paused += seconds

    def record(self) -> Interval | None:
        """Closes the interval since the last record, in which at least one step must have been counted.

        None when none of them was timed.
        """
        assert self._steps + self._interval_untimed > 0, "record() without a step() since the last one"
        now = self._clock()
        self._interval_untimed = 0
        if self._steps == 0:
            self._start, self._interval_paused = now, 0.0
            return None
        seconds = max(now - self._start - self._interval_paused, 1e-9)
        interval = Interval(
            self._steps, self._tokens, seconds, self._tokens / seconds, self._utilisation(self._flops, seconds)
        )
        self._all = _added(self._all, self._steps, self._tokens, self._flops, seconds)
        if self._excluded[0] < self._warmup:
            self._excluded = _added(self._excluded, self._steps, self._tokens, self._flops, seconds)
        self._recent.append(interval)
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._start, self._interval_paused = now, 0.0
        return interval

    @property
    def tokens_per_second(self) -> float | None:
        """Median of the recent records; None before the first."""
        return median(i.tokens_per_second for i in self._recent) if self._recent else None

    @property
    def mfu(self) -> float | None:
        """Median of the recent records, 0..1; None before the first or without a peak."""
        return median(i.mfu for i in self._recent) if self._recent and self._peak else None

    def seconds_left(self, remaining_steps: int) -> float | None:
        """Expected wall-clock seconds for so many more steps, pauses at their rate so far; None before a record."""
        if not self._recent:
            return None
        step_seconds = median(i.seconds / i.steps for i in self._recent)
        return remaining_steps * (step_seconds + self._paused / (self._all[0] + self._untimed_steps))

    def summary(self) -> ThroughputSummary:
        """Totals and means over everything recorded."""
        steps, tokens, flops, seconds = self._all
        excluded = self._excluded if self._excluded[0] < steps else [0, 0, 0.0, 0.0]
        mean_seconds = max(seconds - excluded[3], 1e-9)
        return ThroughputSummary(
            steps=steps + self._untimed_steps,
            tokens=tokens + self._untimed_tokens,
            train_seconds=seconds,
            paused_seconds=self._paused,
            tokens_per_second=(tokens - excluded[1]) / mean_seconds,
            mfu=self._utilisation(flops - excluded[2], mean_seconds),
            excluded_steps=excluded[0],
            untimed_steps=self._untimed_steps,
        )

    def _utilisation(self, flops: float, seconds: float) -> float | None:
        return flops / seconds / self._peak if self._peak else None


def _added(totals: list, *amounts: float) -> list:
    return [total + amount for total, amount in zip(totals, amounts, strict=True)]


def format_duration(seconds: float | None) -> str:
    """`0:07`, `12:34`, `5:06:07` or `2d 03:04`; `-` for None."""
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
