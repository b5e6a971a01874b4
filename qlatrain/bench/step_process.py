"""One model of `bench_step`, measured in a process of its own, so that memory and start-up are its own.

    python -m qlatrain.bench.step_process < JOB

reads a `StepJob` as JSON and prints a JSON object a line, its kind under `event`: what is done so far, what our
packages log (`said`), and at the end the figures of the row (`measured`), or why there are none (`refused`, `failed`).
What libraries print goes to standard error.

The clock for the first and the fifth step starts with the building of the model. The imports before it and the start of
CUDA are not in it, nor is the making of the batches; what a library imports or compiles later is.
"""

import json
import logging
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise

START = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from qlatrain.bench.step_job import FIFTH, StepJob, random_batch  # noqa: E402
from qlatrain.bench.step_models import MODELS, Refused, load_packages  # noqa: E402
from qlatrain.metrics.kernel_times import FAMILIES, StepProfiler  # noqa: E402


def measure(job: StepJob, tell: Callable[..., None]) -> dict:
    """The figures of a row. `tell(event, **figures)` is called as things get done.

    Raises:
        Refused: the model cannot run this.
        RuntimeError: the loss was not finite.
    """
    load_packages(job)
    imported = time.perf_counter() - START
    if job.on_gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    count = job.warmup + job.steps + job.profiled_steps
    batches = [random_batch(job.batch_shape, job.model.vocab_size, job.seed + i) for i in range(count)]

    # ---------------------------------------------------------------- from nothing to the fifth step
    began = time.perf_counter()
    model = MODELS[job.name](job)
    wait(job)
    figures = {"import_seconds": imported, "build_seconds": time.perf_counter() - began, "note": model.note}
    figures |= {"parameters": model.parameters}
    tell("built", seconds=figures["build_seconds"])
    for number, batch in enumerate(batches[: job.warmup], start=1):
        result = model.step(batch)
        if number in (1, FIFTH):
            wait(job)
            name = "first_step_seconds" if number == 1 else "fifth_step_seconds"
            figures[name] = time.perf_counter() - began
            tell("first step" if number == 1 else "fifth step", seconds=figures[name])
        if number == 1:
            figures["first_loss"] = model.loss(result)
    wait(job)

    # ---------------------------------------------------------------- the timed steps
    timed = batches[job.warmup : job.warmup + job.steps]
    start = time.perf_counter()
    milliseconds, result = timed_on_gpu(model, timed) if job.on_gpu else timed_on_host(model, timed)
    figures["wall_seconds"] = time.perf_counter() - start
    figures["last_loss"] = model.loss(result)
    if not np.isfinite([figures["first_loss"], figures["last_loss"]]).all():
        raise RuntimeError(f"the loss was not finite: {figures['first_loss']} first, {figures['last_loss']} last")
    lower, median, upper = (float(x) for x in np.quantile(milliseconds, [0.25, 0.5, 0.75]))
    figures |= {"milliseconds": median, "milliseconds_lower": lower, "milliseconds_upper": upper}
    figures["step_milliseconds"] = milliseconds
    figures["flops"] = float(np.mean([model.flops.step_flops(batch.cu_seqlens_cpu.diff()) for batch in timed]))
    figures |= memory(job)
    tell("timed", **figures)

    # ---------------------------------------------------------------- where the time goes
    profiler, profiles = StepProfiler(1, model.device, is_main=True), []
    for batch in batches[job.warmup + job.steps :]:
        _, times = profiler.run(model.step, batch)
        assert times is not None, "a step in which nothing ran"
        profiles.append(times.milliseconds)
    if profiles:
        figures["families"] = {family: float(np.mean([found[family] for found in profiles])) for family in FAMILIES}
    return figures


def timed_on_gpu(model, batches: list) -> tuple[list[float], object]:
    """Milliseconds from step to step on the device, which is waited for at the end only; and the last result."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(batches) + 1)]
    marks[0].record()
    for batch, mark in zip(batches, marks[1:], strict=True):
        result = model.step(batch)
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)], result


def timed_on_host(model, batches: list) -> tuple[list[float], object]:
    """Milliseconds of each step, and the last result."""
    milliseconds = []
    for batch in batches:
        start = time.perf_counter()
        result = model.step(batch)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return milliseconds, result


def memory(job: StepJob) -> dict:
    """Bytes at the highest since the process began: of tensors and of what the allocator held for them on a GPU, of the
    process on a CPU."""
    if job.on_gpu:
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    kibibyte = 1024 if sys.platform != "darwin" else 1
    return {"peak_bytes": kibibyte * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def wait(job: StepJob) -> None:
    if job.on_gpu:
        torch.cuda.synchronize()


class Told(logging.Handler):
    """Hands on lines of our packages' loggers, such as which backend runs."""

    def __init__(self, tell: Callable[..., None]):
        super().__init__(logging.INFO)
        self._tell = tell
        for name in ("qlatrain", "qlakernels"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            logger.propagate = False
            logger.handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        self._tell("said", line=record.getMessage())


def reason(error: Exception) -> str:
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {lines[0]}"
    if isinstance(error, ValueError):  # said in words fit for a person
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"


def tell_parent(work: Callable[[Callable[..., None]], dict]) -> None:
    """Calls `work(tell)` and tells the figures it returns, or why there are none, as the last line of standard
    output."""
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed from here on is no part of what the parent reads

    def tell(event: str, **figures) -> None:
        told.write(json.dumps({"event": event} | figures) + "\n")

    Told(tell)
    try:
        tell("measured", **work(tell))
    except Refused as error:
        tell("refused", reason=str(error))
    except Exception as error:
        traceback.print_exc()
        tell("failed", reason=reason(error))


def main() -> None:
    tell_parent(lambda tell: measure(StepJob.from_json(sys.stdin.read()), tell))


if __name__ == "__main__":
    main()
