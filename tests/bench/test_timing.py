import time

import torch

from qlatrain.bench.timing import Stopwatch, Timing, interleaved

CPU = torch.device("cpu")


def test_median_and_quartiles():
    assert Timing.of([4.0, 1.0, 2.0, 3.0, 100.0], [1.0, 9.0, 2.0]) == Timing(3.0, 2.0, 4.0, 5, 2.0)


def test_what_comes_before_is_not_timed():
    ((milliseconds, host),) = Stopwatch(CPU).round([(lambda: time.sleep(0.05), lambda: time.sleep(0.002))])
    assert 2 <= milliseconds == host < 50


def test_turns():
    calls = []
    steps = {name: (None, lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleaved(steps, CPU, warmup=2, repeats=8, seed=0)
    assert list(timings) == ["a", "b", "c"] and {timing.repeats for timing in timings.values()} == {8}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 10 and all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1


def test_the_slow_drop_out(monkeypatch):
    monkeypatch.setattr("qlatrain.bench.timing.ENOUGH_SECONDS", 0.01)
    steps = {"slow": (None, lambda: time.sleep(0.004)), "fast": (None, lambda: None)}
    timings = interleaved(steps, CPU, warmup=1, repeats=12, seed=0)
    assert timings["slow"].repeats == 5 and timings["fast"].repeats == 12


def test_nobody():
    assert interleaved({}, CPU, 1, 1, 0) == {}
