import itertools
import math

import pytest

from qlatrain.config import ScheduleConfig
from qlatrain.training.schedule import learning_rate_factor


def curve(steps: int, **settings) -> list[float]:
    return [learning_rate_factor(ScheduleConfig(**settings), step, steps) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(name):
    factors = curve(100, name=name, warmup_steps=10, final=0.1)
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1


def test_cosine_at_key_steps():
    factors = curve(111, name="cosine", warmup_steps=10, final=0.2)
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.6)  # half way between the peak and the final
    assert factors[35] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[110] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))


def test_wsd_at_key_steps():
    factors = curve(101, name="wsd", warmup_steps=10, final=0.0, decay_fraction=0.2)
    assert factors[9:82] == [1.0] * 73
    assert factors[81] == 1 and factors[82] < 1
    assert factors[100] == pytest.approx(0)
    falls = [a - b for a, b in itertools.pairwise(factors[81:])]
    assert falls == pytest.approx([falls[0]] * len(falls))


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [50, 500, 5000])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_continuous(name, steps, final):
    """No step moves the rate by more than the steepest line of its shape would."""
    factors = curve(steps, name=name, warmup_steps=steps // 10, final=final, decay_fraction=0.3)
    steepest = max(10 / steps, math.pi / 2 / (0.9 * steps - 1), 1 / (0.3 * steps - 1))
    assert max(abs(a - b) for a, b in itertools.pairwise(factors)) <= steepest * 1.001
    assert all(final - 1e-12 <= factor <= 1 for factor in factors[steps // 10 :])


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_very_short_runs(name, steps, warmup):
    factors = curve(steps, name=name, warmup_steps=warmup, final=0.1)
    assert all(0 < factor <= 1 for factor in factors)


def test_wsd_whose_decay_would_begin_in_the_warm_up():
    factors = curve(20, name="wsd", warmup_steps=10, final=0.0, decay_fraction=1.0)
    assert factors[9] == 1 and factors[10] == 1
    assert factors[19] == pytest.approx(0)


def test_depends_on_the_step_alone():
    config = ScheduleConfig(name="cosine", warmup_steps=3)
    forwards = [learning_rate_factor(config, step, 30) for step in range(30)]
    backwards = [learning_rate_factor(config, step, 30) for step in reversed(range(30))]
    assert forwards == backwards[::-1]
