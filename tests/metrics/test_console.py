import io

import pytest
from rich.console import Console

from qlatrain.metrics.console import RunConsole
from qlatrain.metrics.flops import FlopCounter
from qlatrain.metrics.kernel_times import FAMILIES, KernelTimes
from qlatrain.metrics.throughput import ThroughputSummary


def piped() -> tuple[RunConsole, io.StringIO]:
    out = io.StringIO()
    return RunConsole(console=Console(file=out, width=120, highlight=False)), out


ROW = {"step": 7, "loss": 2.34567, "lr": 3e-4, "grad_norm": 0.5, "tokens_per_second": 12345.6, "mfu": 0.4321}
VALIDATIONS = [
    {"step": 5, "validation_loss": float("nan")},
    {"step": 10, "validation_loss": 1.5, "validation_bits_per_byte": 2.1, "bigram_bits_per_byte": 3.4},
    {"step": 20, "validation_loss": 1.75, "validation_bits_per_byte": 2.5},
]


def say_everything(run: RunConsole, config) -> None:
    counter = FlopCounter(config)
    run.banner(
        "a run",
        "runs/a",
        counter.parameters,
        counter.table(512),
        ["gated_delta_rule: torch (no GPU)"],
        "mixed precision bf16, compiled",
        (5e10, "measured"),
    )
    run.step(ROW, 1000, 3725)
    run.validation(VALIDATIONS[1])
    run.kernel_times({"step": 8} | KernelTimes(dict.fromkeys(FAMILIES, 0.0) | {"gdn": 300.5, "idle": 901.5}).row())
    run.note("resumed from step 3")
    run.warning("step 9 skipped")
    summary = ThroughputSummary(15, 15000, 60, 5, 250.0, 0.25, 5)
    run.summary(summary, 20, VALIDATIONS, 1, {"metrics": "runs/a/metrics.jsonl"})


def test_step_line():
    run, out = piped()
    run.step(ROW, 1000, 3725)
    line = out.getvalue()
    assert line.count("\n") == 1
    for part in (
        "step    7/1000",
        "loss  2.3457",
        "lr 3.00e-04",
        "0.500",
        "12,346 tok/s",
        "MFU  43.2 %",
        "left 1:02:05",
    ):
        assert part in line, part


def test_step_line_is_one_line_when_narrow_or_incomplete():
    out = io.StringIO()
    run = RunConsole(console=Console(file=out, width=30))
    run.step({"step": 1, "loss": float("nan"), "mfu": None}, 10, None)
    assert out.getvalue().count("\n") == 1
    assert "nan" in out.getvalue() and "MFU" not in out.getvalue() and "left -" in out.getvalue()


def test_a_whole_run_without_escape_codes(small_config):
    run, out = piped()
    say_everything(run, small_config)
    text = out.getvalue()
    assert "\x1b" not in text
    counter = FlopCounter(small_config)
    expected = [
        f"{counter.parameters.total:,}",
        "GDN operator",
        "not counted",
        "torch (no GPU)",
        "50.0 GFLOP/s",
        "2.1000 bits per byte  byte bigram 3.4000 (below it)",
        "kernel times at step 8  1,202.0 ms  GDN 25.0 %  idle 75.0 %\n",
        "step 9 skipped",
        "20 (15 since the resume)",
        "last loss 1.7500, 2.5000 bits per byte at step 20",
        "best loss 1.5000, 2.1000 bits per byte (byte bigram 3.4000) at step 10",
        "250 tokens/s, MFU 25.0 % (without the first 5 steps)",
        "runs/a/metrics.jsonl",
    ]
    for part in expected:
        assert part in text, part


@pytest.mark.parametrize(
    ("excluded", "untimed", "said"),
    [
        (5, 2, "MFU 25.0 % (without the first 5 steps and 2 profiled)"),
        (0, 2, "MFU 25.0 % (without 2 profiled)"),
        (0, 0, "MFU 25.0 %  "),
        (0, 15, "speed          not measured, as every step was profiled"),
    ],
)
def test_a_summary_says_what_its_speed_leaves_out(excluded, untimed, said):
    run, out = piped()
    run.summary(ThroughputSummary(15, 15000, 60, 5, 250.0, 0.25, excluded, untimed), 15, [], 0, {})
    assert said in out.getvalue()
    assert (
        f"0:05 {'validation, checkpoints and profiles' if untimed else 'validation and checkpoints'}" in out.getvalue()
    )


def test_names_are_not_markup():
    run, out = piped()
    run.note("[bold]seen[/bold] in runs/[a]")
    assert "[bold]seen[/bold] in runs/[a]" in out.getvalue()


def test_other_processes_are_silent(small_config):
    out = io.StringIO()
    say_everything(RunConsole(is_main_process=False, console=Console(file=out)), small_config)
    assert out.getvalue() == ""
