"""Times of several candidates, taken in turns so that a drift of the machine hits all alike."""

import random
import time
from dataclasses import dataclass

import numpy as np
import torch

from qlatrain.bench.runs import Steps

FLUSH_BYTES = 2**28  # written before each timed call on a GPU: several times any L2 cache
ENOUGH_SECONDS, LEAST_REPEATS = 1.0, 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of `repeats` calls and the quartiles around it."""

    median: float
    lower: float
    upper: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Timing":
        lower, median, upper = (float(x) for x in np.quantile(milliseconds, [0.25, 0.5, 0.75]))
        return cls(median, lower, upper, len(milliseconds))


class Stopwatch:
    """CUDA events on a GPU, `perf_counter` elsewhere.

    On a GPU a large buffer is overwritten before each timed call, so that it finds none of its inputs in the cache, and
    so that the host is ahead of the device when the call begins. The device is waited for once a round.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self._on_gpu else None

    def round(self, candidates: list[Steps]) -> list[float]:
        """Milliseconds of each, one after the other."""
        return self._round_on_gpu(candidates) if self._on_gpu else [self._on_host(steps) for steps in candidates]

    def _on_host(self, steps: Steps) -> float:
        before, timed = steps
        if before is not None:
            before()
        start = time.perf_counter()
        timed()
        return 1e3 * (time.perf_counter() - start)

    def _round_on_gpu(self, candidates: list[Steps]) -> list[float]:
        spans = []
        for before, timed in candidates:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if before is not None:
                before()
            self._flushed.zero_()
            start.record()
            timed()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in spans]


def interleaved(
    candidates: dict[str, Steps], device: torch.device, warmup: int, repeats: int, seed: int
) -> dict[str, Timing]:
    """Each candidate once a round, in a new order each round; `warmup` rounds are not counted.

    A candidate whose timed calls add up to `ENOUGH_SECONDS` and number `LEAST_REPEATS` drops out: the slowest shall not
    decide how long all take.
    """
    stopwatch, shuffle, names = Stopwatch(device), random.Random(seed).shuffle, list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + repeats):
        shuffle(names)
        for name, milliseconds in zip(names, stopwatch.round([candidates[name] for name in names]), strict=True):
            if number >= warmup:
                times[name].append(milliseconds)
        names = [name for name in names if len(times[name]) < LEAST_REPEATS or sum(times[name]) < 1e3 * ENOUGH_SECONDS]
    return {name: Timing.of(times[name]) for name in candidates}
