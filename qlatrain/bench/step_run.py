"""Starts a process that measures, passes on what it tells, and makes a row of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
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
    said = []

    def heard(event: dict) -> None:
        if event["event"] == "said":
            said.append(event["line"])
        on_event(event)

    row = StepRow.of(job)
    with tempfile.TemporaryDirectory() as folder:
        caches = caches_in(folder) if empty_caches else {}
        last = last_event("qlatrain.bench.step_process", (), job.to_json(), job.on_gpu, log, heard, caches)
    event, row.backends = last.pop("event"), "; ".join(said)
    if event == "measured":
        row.fill(last, peak)
    else:
        row.status, row.reason = event, last["reason"]
    return row


def last_event(
    module: str,
    arguments: Sequence[str],
    told: str,
    on_gpu: bool,
    log: Path,
    on_event: Callable[[dict], None],
    variables: dict[str, str],
) -> dict:
    """Runs a module as a process of its own that ends with `tell_parent`: `measured`, `refused` or `failed`.

    Args:
        module, arguments: `python -m module arguments`.
        told: its standard input.
        on_gpu: whether accelerate and transformers' Trainer may take a GPU.
        log: what the process prints goes here.
        on_event: called with each line that the process tells.
        variables: of its environment, beside ours.
    """
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | variables
    variables["ACCELERATE_USE_CPU"] = "false" if on_gpu else "true"
    last = {}
    with open(log, "wb") as printed:
        command = [sys.executable, "-m", module, *arguments]
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, text=True
        )
        late = threading.Event()
        timer = threading.Timer(TIMEOUT, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            with suppress(BrokenPipeError):  # gone already: what it ended with tells why
                process.stdin.write(told)
                process.stdin.close()
            for line in process.stdout:
                last = json.loads(line)
                on_event(last)
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
    if last.get("event") in ("measured", "refused", "failed"):
        return last
    return {"event": "failed", "reason": _ended(process.returncode, late.is_set(), log)}


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
