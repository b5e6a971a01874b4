"""Starts the process of a model, passes on what it tells, and makes a row of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qlatrain.bench.cold_start import caches_in
from qlatrain.bench.step_job import StepJob
from qlatrain.bench.step_results import StepRow

TIMEOUT = 1800  # seconds that a model may take


def measure_in_process(
    job: StepJob, peak: float, log: Path, on_event: Callable[[dict], None], empty_caches: bool = False
) -> StepRow:
    """
    Args:
        peak: FLOP/s to hold those of the step against.
        log: what the process prints goes here.
        on_event: called with each line that the process tells.
        empty_caches: the process finds nothing that was compiled before.
    """
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    variables["ACCELERATE_USE_CPU"] = "false" if job.on_gpu else "true"
    row, last, said = StepRow.of(job), {}, []
    with tempfile.TemporaryDirectory() as folder, open(log, "wb") as printed:
        if empty_caches:
            variables |= caches_in(folder)
        command = [sys.executable, "-m", "qlatrain.bench.step_process"]
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, text=True
        )
        late = threading.Event()
        timer = threading.Timer(TIMEOUT, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            with suppress(BrokenPipeError):  # gone already: what it ended with tells why
                process.stdin.write(job.to_json())
                process.stdin.close()
            for line in process.stdout:
                last = json.loads(line)
                if last["event"] == "said":
                    said.append(last["line"])
                on_event(last)
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
    event, row.backends = last.pop("event", None), "; ".join(said)
    if event == "measured":
        row.fill(last, peak)
    elif event in ("refused", "failed"):
        row.status, row.reason = event, last["reason"]
    else:
        row.status, row.reason = "failed", _ended(process.returncode, late.is_set(), log)
    return row


def _ended(code: int, late: bool, log: Path) -> str:
    """Why a process that told neither figures nor a reason is gone."""
    if late:
        return f"not done after {TIMEOUT} s"
    if code < 0:
        name = signal.Signals(-code).name
        killed = ", as when the machine is out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{killed}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"its process ended with code {code}")
