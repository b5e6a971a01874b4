"""What only a GPU has: events, the allocator's counters, and captured graphs."""

import pytest
import torch

from qlatrain.bench.config import BenchConfig, GridConfig
from qlatrain.bench.measure import measure_shape
from qlatrain.bench.memory import Memory
from qlatrain.bench.runs import EagerRun, ReplayedRun
from qlatrain.bench.shapes import parse_shape
from qlatrain.bench.timing import interleaved

pytestmark = pytest.mark.gpu
MIB = 2**20


class Products:
    """o = tanh(x y) over a million float32 elements: backward keeps x, y and o, of which only o is not an input."""

    def __init__(self):
        self.leaves = {name: torch.randn(MIB, device="cuda").requires_grad_() for name in "xy"}
        self.cotangent = torch.randn(MIB, device="cuda")

    def call(self, backend: str) -> torch.Tensor:
        return (self.leaves["x"] * self.leaves["y"]).tanh()


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_a_replay_gives_what_the_calls_give(direction):
    eager = EagerRun(Products(), "torch")
    expected = {name: x.clone() for name, x in eager.results(direction).items()}
    replayed = ReplayedRun(eager, direction)
    for _ in range(2):
        found = replayed.results(direction)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    timing = interleaved({"one": replayed.steps(direction)}, torch.device("cuda"), 2, 5, 0)["one"]
    assert 0 < timing.lower <= timing.median <= timing.upper < 100


def test_memory():
    device, run = torch.device("cuda"), EagerRun(Products(), "torch")
    run.both()
    forward, both = (Memory.of(run, direction, device) for direction in ("forward", "forward+backward"))
    assert forward.kept is None and forward.peak == 2 * 4 * MIB
    assert both.kept == 0  # its only saved tensor beside the inputs is the output
    assert both.peak >= 3 * 4 * MIB


@pytest.mark.parametrize("shape", ["2x300 2/4 64/64", "300 packed3 2/4 64/64"])
def test_rows(shape, ceilings):
    grid = GridConfig(backends=["torch"], baseline="torch", dtype="bfloat16")
    bench = BenchConfig(repeats=5, warmup=1)
    rows = measure_shape("gated_delta_rule", parse_shape(shape), grid, bench, torch.device("cuda"), ceilings)
    assert [row.status for row in rows] == ["ok"] * 3
    forward, backward, both = rows
    assert all(row.milliseconds > 0 and row.peak_bytes > 0 for row in rows)
    assert forward.kept_bytes is None and backward.kept_bytes == both.kept_bytes > 0
    assert both.milliseconds > 0.5 * (forward.milliseconds + backward.milliseconds)
