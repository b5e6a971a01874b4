"""Times of several candidates, taken in turns so that a drift of the machine hits all alike."""

import math
import random
import time
from dataclasses import dataclass

import numpy as np
import torch

from qlatrain.bench.runs import Steps

FLUSH_BYTES = 2**28  # written before each timed call on a GPU: several times any L2 cache
LEAD, MOST_LEAD_SECONDS = 1.5, 0.02  # of the host before the device, in times that it took to issue the call
ENOUGH_SECONDS, LEAST_REPEATS = 1.0, 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of `repeats` calls and the quartiles around it; host: the median that the host took to
    issue a call, which is the time of the call itself where there is no GPU."""

    median: float
    lower: float
    upper: float
    repeats: int
    host: float

    @classmethod
    def of(cls, milliseconds: list[float], host: list[float]) -> "Timing":
        lower, median, upper = (float(x) for x in np.quantile(milliseconds, [0.25, 0.5, 0.75]))
        return cls(median, lower, upper, len(milliseconds), float(np.median(host)))


class Stopwatch:
    """CUDA events on a GPU, `perf_counter` elsewhere.

    On a GPU a large buffer is overwritten before each timed call, so that it finds none of its inputs in the cache, and
    as often as it takes for the host to be ahead of the device until the call has been issued, as it is in training. A
    call that waits for the device itself is not helped by that. The device is waited for once a round.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._leads: dict[Steps, float] = {}  # seconds
        if self._on_gpu:
            self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            self._flushed.zero_()
            start, end = _events()
            start.record()
            self._flushed.zero_()
            end.record()
            torch.cuda.synchronize(device)
            self._flush_seconds = start.elapsed_time(end) / 1e3

    def round(self, candidates: list[Steps]) -> list[tuple[float, float]]:
        """Milliseconds of each, one after the other, and those that the host took to issue it."""
        return self._round_on_gpu(candidates) if self._on_gpu else [self._on_host(steps) for steps in candidates]

    def _on_host(self, steps: Steps) -> tuple[float, float]:
        before, timed = steps
        if before is not None:
            before()
        start = time.perf_counter()
        timed()
        milliseconds = 1e3 * (time.perf_counter() - start)
        return milliseconds, milliseconds

    def _round_on_gpu(self, candidates: list[Steps]) -> list[tuple[float, float]]:
        spans = []
        for steps in candidates:
            before, timed = steps
            start, end = _events()
            if before is not None:
                before()
            for _ in range(1 + math.ceil(self._leads.get(steps, 0.0) / self._flush_seconds)):
                self._flushed.zero_()
            start.record()
            began = time.perf_counter()
            timed()
            seconds = time.perf_counter() - began
            end.record()
            self._leads[steps] = min(LEAD * seconds, MOST_LEAD_SECONDS)
            spans.append((start, end, 1e3 * seconds))
        torch.cuda.synchronize()
        return [(start.elapsed_time(end), host) for start, end, host in spans]


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def interleaved(
    candidates: dict[str, Steps], device: torch.device, warmup: int, repeats: int, seed: int
) -> dict[str, Timing]:
    """Each candidate once a round, in a new order each round; `warmup` rounds are not counted.

    A candidate whose timed calls add up to `ENOUGH_SECONDS` and number `LEAST_REPEATS` drops out: the slowest shall not
    decide how long all take.
    """
    stopwatch, shuffle, names = Stopwatch(device), random.Random(seed).shuffle, list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    hosts: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + repeats):
        shuffle(names)
        for name, (milliseconds, host) in zip(names, stopwatch.round([candidates[n] for n in names]), strict=True):
            if number >= warmup:
                times[name].append(milliseconds)
                hosts[name].append(host)
        names = [name for name in names if len(times[name]) < LEAST_REPEATS or sum(times[name]) < 1e3 * ENOUGH_SECONDS]
    return {name: Timing.of(times[name], hosts[name]) for name in candidates}
