import pytest

from qlatrain.metrics.throughput import Throughput, format_duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def train(throughput, clock, steps, seconds, tokens=1000, flops=2e9):
    for _ in range(steps):
        clock.now += seconds
        throughput.step(tokens, flops)


def test_record_is_exact_over_its_interval(clock):
    throughput = Throughput(peak_flops=1e10, clock=clock)
    train(throughput, clock, 3, 0.5)
    train(throughput, clock, 1, 2.5)
    interval = throughput.record()
    assert (interval.steps, interval.tokens, interval.seconds) == (4, 4000, 4.0)
    assert interval.tokens_per_second == 1000
    assert interval.mfu == pytest.approx(8e9 / 4 / 1e10)
    train(throughput, clock, 1, 0.25)
    assert throughput.record().tokens_per_second == 4000


def test_pauses_belong_to_no_step(clock):
    throughput = Throughput(clock=clock, warmup_steps=0)
    train(throughput, clock, 1, 1.0)
    with throughput.pause():
        clock.now += 50
        with throughput.pause():  # a checkpoint inside a validation counts once
            clock.now += 10
    train(throughput, clock, 1, 1.0)
    assert throughput.record().seconds == pytest.approx(2.0)
    summary = throughput.summary()
    assert (summary.train_seconds, summary.paused_seconds) == pytest.approx((2.0, 60.0))
    # time left expects pauses at the rate there were
    assert throughput.seconds_left(10) == pytest.approx(10 * (1.0 + 60 / 2))


def test_untimed_steps_are_counted_and_have_no_speed(clock):
    throughput = Throughput(peak_flops=1e10, clock=clock, warmup_steps=0)

    def profiled() -> None:
        with throughput.pause():
            clock.now += 9
        throughput.step(1000, 2e9, timed=False)

    train(throughput, clock, 2, 1.0)
    profiled()
    train(throughput, clock, 1, 1.0)
    interval = throughput.record()
    assert (interval.steps, interval.tokens, interval.seconds) == (3, 3000, 3.0)
    profiled()
    assert throughput.record() is None
    train(throughput, clock, 1, 0.5)
    assert throughput.record().tokens_per_second == 2000
    assert throughput.tokens_per_second == 1500  # the median of two
    summary = throughput.summary()
    assert (summary.steps, summary.tokens, summary.untimed_steps) == (6, 6000, 2)
    assert (summary.train_seconds, summary.paused_seconds) == (3.5, 18)
    assert summary.tokens_per_second == pytest.approx(4000 / 3.5)
    assert throughput.seconds_left(6) == pytest.approx(6 * 0.75 + 18)
    with pytest.raises(AssertionError):
        throughput.record()


def test_pause_between_records(clock):
    throughput = Throughput(clock=clock)
    train(throughput, clock, 1, 1.0)
    throughput.record()
    with throughput.pause():
        clock.now += 7
    train(throughput, clock, 1, 1.0)
    assert throughput.record().seconds == pytest.approx(1.0)


def test_display_is_the_median(clock):
    throughput = Throughput(peak_flops=1e10, clock=clock, window=5)
    assert throughput.tokens_per_second is None and throughput.mfu is None and throughput.seconds_left(5) is None
    for seconds in (10.0, 1.0, 1.0, 100.0, 1.0, 1.0):
        train(throughput, clock, 1, seconds)
        throughput.record()
    assert throughput.tokens_per_second == 1000
    assert throughput.mfu == pytest.approx(0.2)
    assert throughput.seconds_left(30) == 30


def test_summary_leaves_out_the_warm_up(clock):
    throughput = Throughput(peak_flops=1e10, clock=clock, warmup_steps=2)
    train(throughput, clock, 1, 60)
    throughput.record()
    train(throughput, clock, 1, 30)
    throughput.record()
    train(throughput, clock, 4, 0.5)
    throughput.record()
    summary = throughput.summary()
    assert (summary.steps, summary.tokens, summary.excluded_steps) == (6, 6000, 2)
    assert summary.tokens_per_second == pytest.approx(2000)
    assert summary.mfu == pytest.approx(0.4)
    assert summary.train_seconds == 92


def test_short_run_is_summarised_whole(clock):
    throughput = Throughput(clock=clock, warmup_steps=5)
    train(throughput, clock, 2, 1.0)
    throughput.record()
    summary = throughput.summary()
    assert (summary.excluded_steps, summary.tokens_per_second, summary.mfu) == (0, 1000, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0:00"), (7.4, "0:07"), (754, "12:34"), (3599.6, "1:00:00"), (18367, "5:06:07")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_days():
    assert format_duration(2 * 86400 + 3 * 3600 + 4 * 60) == "2d 03:04"
