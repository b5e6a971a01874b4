"""The correctness gate: what is wrong is caught, has no speed, and does not win."""

import math

import pytest
import torch

from qlakernels.backends import Backend, register
from qlatrain.bench.config import BenchConfig, GridConfig
from qlatrain.bench.correctness import errors, verdict
from qlatrain.bench.gated_delta_rule import FLOAT32_BAR, HALF_BARS, GatedDeltaRule
from qlatrain.bench.measure import measure_shape
from qlatrain.bench.shapes import parse_shape

OPERATOR, CPU = "gated_delta_rule", torch.device("cpu")


def measured(ceilings, backends: list[str], shape: str = "1x40 1/2 8/8", dtype: str = "float32", **bench):
    """(direction, backend) → row."""
    grid = GridConfig(backends=backends, baseline="torch", dtype=dtype)
    settings = BenchConfig(repeats=2, warmup=0, **bench)
    rows = measure_shape(OPERATOR, parse_shape(shape), grid, settings, CPU, ceilings)
    return {(row.direction, row.backend): row for row in rows}


def test_a_right_backend_has_a_speed(ceilings):
    row = measured(ceilings, ["torch"])["forward+backward", "torch"]
    assert row.status == "ok" and row.best and row.ratio_to_baseline == 1
    assert 0 < row.milliseconds_lower <= row.milliseconds <= row.milliseconds_upper and row.repeats == 2
    assert row.tokens_per_second == pytest.approx(40e3 / row.milliseconds)
    assert row.fraction_of_floor == pytest.approx(row.floor_milliseconds / row.milliseconds)
    assert row.errors.keys() == {"o", "dq", "dk", "dv", "dg", "dbeta"}
    assert all(error < 1e-5 for error in row.errors.values())
    assert row.reference == "token by token in float64"


@pytest.mark.parametrize("change", [lambda o: 1.001 * o, lambda o: o * float("nan"), lambda o: 0 * o])
def test_a_wrong_output_is_caught_and_not_ranked(ceilings, altered_backend, change):
    altered_backend("tilelang", output=change)
    rows = measured(ceilings, ["tilelang", "torch"])
    for direction in ("forward", "backward", "forward+backward"):
        row = rows[direction, "tilelang"]
        assert row.status == "wrong" and "o is off by" in row.reason
        assert row.milliseconds is None and row.tokens_per_second is None and row.fraction_of_floor is None
        assert not row.best and row.ratio_to_baseline is None
        assert rows[direction, "torch"].best


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_a_wrong_gradient_is_caught(ceilings, altered_backend, name):
    altered_backend("fla", leaf=(name, lambda gradient: 1.001 * gradient))
    rows = measured(ceilings, ["fla", "torch"])
    assert rows["forward", "fla"].status == "ok" and rows["forward", "fla"].milliseconds is not None
    for direction in ("backward", "forward+backward"):
        row = rows[direction, "fla"]
        assert row.status == "wrong" and row.reason.startswith(f"wrong: d{name} is off by 1.0e-03, bar")
        assert row.milliseconds is None and rows[direction, "torch"].best


def test_wrong_in_one_head_alone(ceilings, altered_backend):
    def last_head_scaled(o: torch.Tensor) -> torch.Tensor:
        return torch.cat([o[:, :, :-1], 1.02 * o[:, :, -1:]], dim=2)

    altered_backend("fla", output=last_head_scaled)
    assert measured(ceilings, ["fla", "torch"], "1x40 4/8 8/8")["forward", "fla"].status == "wrong"


def test_a_refusal_and_a_crash_are_rows(ceilings, altered_backend):
    def run(**arguments):
        raise RuntimeError("first line\nsecond line")

    altered_backend("fla")
    register(OPERATOR, Backend("flash_qla", lambda call: None, run))
    rows = measured(ceilings, ["tilelang", "flash_qla", "fla", "torch"])
    row = rows["backward", "tilelang"]
    assert row.status == "refused" and row.reason == "needs a Hopper GPU, the tensors are on cpu"
    row = rows["backward", "flash_qla"]
    assert row.status == "failed" and row.reason == "RuntimeError: first line"
    assert {rows["backward", name].status for name in ("fla", "torch")} == {"ok"}


def test_a_backend_without_a_backward_keeps_its_forward(ceilings, altered_backend):
    altered_backend("fla", output=lambda o: o.detach())
    rows = measured(ceilings, ["fla", "torch"])
    assert rows["forward", "fla"].status == "ok" and rows["backward", "fla"].status == "failed"


@pytest.mark.parametrize("shape", ["2x70 2/4 8/16", "70 packed4 2/4 8/16"])
def test_bfloat16_stays_under_the_bars(ceilings, shape):
    row = measured(ceilings, ["torch"], shape, "bfloat16", directions=["backward"])["backward", "torch"]
    assert row.status == "ok" and row.bars == HALF_BARS and row.errors["o"] > 1e-4


def test_the_reference_in_chunks_is_that_of_the_recurrence(monkeypatch):
    problem = GatedDeltaRule(parse_shape("1x150 4/8 8/16"), 0, torch.float32, CPU)
    whole, how = problem.reference(2)
    assert how == "token by token in float64" and whole["dq"].shape[2] == 4
    monkeypatch.setattr("qlatrain.bench.gated_delta_rule.RECURRENCE_ELEMENTS", 0)
    for count, heads in ((2, [0, 3]), (3, [0, 2, 3]), (1, [0]), (0, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        part, how = problem.reference(count)
        assert ("all key heads" if len(heads) == 4 else f"{len(heads)} of 4 key heads") in how
        assert part["dk"].shape[2] == len(heads) and part["o"].shape[2] == 2 * len(heads)
        assert all(error < 1e-5 for error in errors(problem, whole, part).values())


def test_verdict():
    bars = {"o": 4e-3, "dg": 8e-3}
    assert verdict({"o": 4e-3, "dg": 0.0}, bars) is None
    assert verdict({"o": 5e-3, "dg": 0.08}, bars) == (
        "wrong: dg is off by 8.0e-02, bar 8.0e-03, o is off by 5.0e-03, bar 4.0e-03"
    )
    assert verdict({"o": 5e-3, "dg": math.nan}, bars).startswith("wrong: dg is off by nan")


def test_bars():
    half = GatedDeltaRule(parse_shape("1x2 1/1 4/4"), 0, torch.bfloat16, CPU)
    assert half.bars("tilelang") == half.bars("torch") == HALF_BARS
    assert half.bars("fla") == half.bars("flash_qla") == {name: 2 * bar for name, bar in HALF_BARS.items()}
    full = GatedDeltaRule(parse_shape("1x2 1/1 4/4"), 0, torch.float32, CPU)
    assert set(full.bars("fla").values()) == {FLOAT32_BAR}
