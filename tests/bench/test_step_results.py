"""Rows of a step with made-up figures: ratios, files, tables, picture; and processes that end without a word."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from qlatrain.bench import step_run
from qlatrain.bench.model_options import read_model
from qlatrain.bench.step_job import StepJob
from qlatrain.bench.step_plot import plot_step
from qlatrain.bench.step_process import reason
from qlatrain.bench.step_report import StepReport
from qlatrain.bench.step_results import StepResults, StepRow, compare
from qlatrain.bench.tracking import Tracked
from qlatrain.metrics.console import RunConsole
from qlatrain.metrics.kernel_times import FAMILIES

MODEL = read_model(Path(__file__).parent.parent.parent / "configs" / "model", "hybrid_1b6", "model")


def made_up_row(name: str, milliseconds: float | None = None, shape: str = "2x4096", **changes) -> StepRow:
    """A row whose time is spent half in GDN, a quarter in matrix products, a quarter idle."""
    row = StepRow.of(StepJob(name, on_gpu=True, shape=shape, model=MODEL), **changes)
    if milliseconds is not None:
        parts = {"gdn": 0.5, "matrix_products": 0.25, "idle": 0.25}
        figures = {"milliseconds": milliseconds, "flops": 9e13, "peak_bytes": 4e10, "parameters": 1_650_000_000}
        figures |= {"milliseconds_lower": 0.9 * milliseconds, "milliseconds_upper": 1.1 * milliseconds}
        figures |= {"first_step_seconds": 3.0, "fifth_step_seconds": 9.0}
        figures["families"] = {family: parts.get(family, 0.0) * milliseconds for family in FAMILIES}
        row.fill(figures | {"step_milliseconds": [milliseconds] * 3}, peak=1e15)
    return row


@pytest.fixture
def results() -> StepResults:
    rows = [
        made_up_row("qlatrain", 200.0),
        made_up_row("fla", 300.0, note="nearest sizes"),
        made_up_row("transformers", status="failed", reason="out of memory: tried to allocate [a lot]"),
    ]
    compare(rows)
    return StepResults("Some GPU", rows, 1e15, "data sheet", {"versions": {"torch": "2.11"}}, {})


def printed(results: StepResults) -> str:
    text = io.StringIO()
    console = RunConsole(console=Console(file=text, width=140))
    StepReport(console, len(results.rows)).tables(results)
    return text.getvalue()


def test_figures_that_follow(results):
    ours, fla, transformers = results.rows
    assert ours.tokens_per_second == pytest.approx(8192 / 0.2) and ours.mfu == pytest.approx(9e13 / 0.2 / 1e15)
    assert (ours.steps, ours.profiled_milliseconds, ours.ours_is) == (3, pytest.approx(200.0), 1.0)
    assert fla.ours_is == pytest.approx(1.5) and transformers.ours_is is None
    assert ours.key == "step/hybrid_1b6/2x4096/qlatrain"
    assert made_up_row("fla", shape="32768 packed16").key == "step/hybrid_1b6/32768_packed16/fla"


def test_without_ours_there_is_no_ratio():
    rows = [made_up_row("qlatrain", status="failed", reason="x"), made_up_row("fla", 300.0)]
    compare(rows)
    assert [row.ours_is for row in rows] == [None, None]


def test_files(results, tmp_path):
    results.write(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["kind"] == "qlatrain bench_step" and content["rows"][1]["families"]["gdn"] == 150.0
    table = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert table[0]["gdn_milliseconds"] == "100.0" and table[2]["gdn_milliseconds"] == ""
    assert table[2]["reason"] == "out of memory: tried to allocate [a lot]"


def test_tables(results):
    out = printed(results)
    assert "40,960" in out and "45.0 %" in out and "1.50×" in out and "40 GB" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "GDN 100 50.0 % 150 50.0 %" in lines and "step 200 100.0 % 300 100.0 %" in lines
    assert "communication" not in out  # which took no time
    assert "transformers failed: out of memory: tried to allocate [a lot]" in out and "fla: nearest sizes" in out


def test_tables_and_picture_of_nothing_measured(results, tmp_path):
    results.rows = [made_up_row("qlatrain", status="failed", reason="x")]
    assert "qlatrain failed: x" in printed(results)
    plot_step(results, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_picture(results, tmp_path):
    plot_step(results, tmp_path / "step.png")
    picture = imread(tmp_path / "step.png")[..., :3]
    for color in ((0xD1, 0x49, 0x5B), (0x7B, 0x4E, 0xA3), (0x1F, 0x6F, 0xB4)):
        assert (np.abs(picture - np.array(color) / 255).max(-1) < 0.02).sum() > 1000
    assert list(tmp_path.iterdir()) == [tmp_path / "step.png"]


def test_summary_for_wandb(results):
    summary = Tracked.step(results).summary
    assert summary["step/hybrid_1b6/2x4096/fla/ours_is"] == pytest.approx(1.5)
    assert summary["step/hybrid_1b6/2x4096/qlatrain/kernel_times/gdn_ms"] == 100.0
    assert not any("/transformers/" in key for key in summary)


def test_estimate():
    """After the fifth step: what is left of this model, and as much again as it takes for each one behind."""
    text = io.StringIO()
    report = StepReport(RunConsole(console=Console(file=text, width=140)), models=2)
    report._start -= 50  # seconds ago
    job = StepJob(model=MODEL, warmup=5, steps=20, profiled_steps=5)
    report.event(job, {"event": "first step", "seconds": 10.0})
    report.event(job, {"event": "fifth step", "seconds": 50.0})
    assert text.getvalue().splitlines()[-1].endswith("fifth step after 50.0 s  left 9:10")  # 25 steps of 10 s; 50 + 250


def test_estimate_when_a_model_is_done():
    """A peer that is missing took no time, and says nothing of the next one."""
    text = io.StringIO()
    report = StepReport(RunConsole(console=Console(file=text, width=140)), models=3)
    report._start -= 60
    report.done(made_up_row("qlatrain", 200.0))
    report.done(made_up_row("fla", status="missing", reason="not installed"))
    first, second = text.getvalue().splitlines()
    assert first.startswith("1/3  qlatrain") and first.endswith("left 2:00")
    assert second.startswith("2/3  fla") and second.endswith("missing: not installed  left 1:00")


ENDS = {
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "its process was ended by SIGKILL, as when the machine",
    "import sys; print('something', file=sys.stderr); sys.exit('the last line')": "the last line",
    "import sys; sys.exit(3)": "its process ended with code 3",
    "import time; time.sleep(60)": "not done after 0.5 s",
}


@pytest.mark.parametrize("program", ENDS)
def test_a_process_that_ends_without_a_word(program, monkeypatch, tmp_path):
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: start([sys.executable, "-c", program], **rest))
    if "sleep" in program:
        monkeypatch.setattr(step_run, "TIMEOUT", 0.5)
    job = StepJob("fla", shape="2x48", model=MODEL)
    row = step_run.measure_in_process(job, 1e12, tmp_path / "fla.log", lambda event: None)
    assert row.status == "failed" and row.reason.startswith(ENDS[program]) and row.milliseconds is None


@pytest.mark.parametrize("empty", [False, True])
def test_empty_caches_are_folders_that_go_away(empty, monkeypatch, tmp_path):
    start = subprocess.Popen
    names = ("HOME", "TRITON_CACHE_DIR", "TILELANG_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    program = f"import json, os; print(json.dumps(dict(event='failed', reason=[os.environ.get(n) for n in {names}])))"
    monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: start([sys.executable, "-c", program], **rest))
    monkeypatch.setenv("HOME", str(tmp_path))
    job = StepJob("fla", shape="2x48", model=MODEL)
    found = step_run.measure_in_process(job, 1e12, tmp_path / "log", lambda event: None, empty_caches=empty).reason
    if empty:
        assert len(set(found)) == 4 and not any(Path(folder).exists() for folder in found)
        assert all(Path(folder).is_relative_to(found[0]) for folder in found)
    else:
        assert found[0] == str(tmp_path)


def test_a_reason_is_one_line():
    assert reason(ValueError("use backend='auto'\nor not")) == "use backend='auto'"
    assert reason(TypeError("'NoneType' object is not callable")) == "TypeError: 'NoneType' object is not callable"
    assert reason(RuntimeError()) == "RuntimeError: no message"
