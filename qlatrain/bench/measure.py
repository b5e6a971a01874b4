"""One shape: every backend is run and checked, those that are right are timed in turns, and rows come out."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qlakernels.backends import BackendRefused
from qlatrain.bench.config import BenchConfig, GridConfig
from qlatrain.bench.correctness import errors, verdict
from qlatrain.bench.floors import Ceilings, Work
from qlatrain.bench.memory import Memory
from qlatrain.bench.operators import OPERATORS, Problem
from qlatrain.bench.results import Row, rank
from qlatrain.bench.runs import EagerRun, ReplayedRun
from qlatrain.bench.shapes import Shape
from qlatrain.bench.timing import Timing, interleaved


@dataclass
class Checked:
    """A backend in one direction: whether it may be timed, or why not. status: see `Row`."""

    status: str = "ok"
    reason: str = ""
    run: EagerRun | ReplayedRun | None = None
    first_call_seconds: float | None = None
    memory: Memory = field(default_factory=Memory)
    errors: dict[str, float] = field(default_factory=dict)


def measure_shape(
    operator: str,
    shape: Shape,
    grid: GridConfig,
    bench: BenchConfig,
    device: torch.device,
    ceilings: Ceilings,
    on_checked: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The rows of every backend of `grid` in every direction, those of a direction together.

    on_checked: is told the rows of a backend as soon as it has been checked, before they have times.
    """
    problem = OPERATORS[operator](shape, bench.seed, getattr(torch, grid.dtype), device)
    reference, how = problem.reference(bench.check_key_heads)
    rows: dict[str, list[Row]] = {direction: [] for direction in bench.directions}
    runs: dict[str, dict[str, EagerRun | ReplayedRun]] = {direction: {} for direction in bench.directions}
    for backend in grid.backends:
        for direction in bench.directions:
            checked = _check(problem, backend, direction, reference, bench.cuda_graph, device)
            rows[direction].append(_row(operator, problem, direction, backend, checked, grid, bench, how))
            if checked.status == "ok":
                runs[direction][backend] = checked.run
        on_checked([rows[direction][-1] for direction in bench.directions])
    del reference
    for direction in bench.directions:
        work = problem.work(shape, direction, problem.cotangent.element_size())
        steps = {backend: run.steps(direction) for backend, run in runs[direction].items()}
        timings = interleaved(steps, device, bench.warmup, bench.repeats, bench.seed)
        for row in rows[direction]:
            _fill_in(row, timings.get(row.backend), work, ceilings)
        rank(rows[direction], grid.baseline)
    return [row for direction in bench.directions for row in rows[direction]]


def _check(
    problem: Problem,
    backend: str,
    direction: str,
    reference: dict[str, torch.Tensor],
    cuda_graph: bool,
    device: torch.device,
) -> Checked:
    """Runs a backend and holds what it gives against the reference.

    Whatever a backend raises becomes the reason in its row: the others are to be measured all the same.
    """
    checked, eager = Checked(), EagerRun(problem, backend)
    try:
        start = time.perf_counter()
        eager.results(direction)
        _wait(device)
        checked.first_call_seconds = time.perf_counter() - start
        checked.memory = Memory.of(eager, direction, device)
        checked.run = ReplayedRun(eager, direction) if cuda_graph else eager
        checked.errors = errors(problem, checked.run.results(direction), reference)
        wrong = verdict(checked.errors, problem.bars(backend))
        if wrong is not None:
            checked.status, checked.reason = "wrong", wrong
    except BackendRefused as error:
        checked.status, checked.reason = "refused", error.reason
    except Exception as error:
        checked.status, checked.reason = "failed", _first_line(error)
    if checked.status != "ok":
        checked.run = eager = None
        _free(device)
    return checked


def _row(
    operator: str,
    problem: Problem,
    direction: str,
    backend: str,
    checked: Checked,
    grid: GridConfig,
    bench: BenchConfig,
    reference: str,
) -> Row:
    """All of a row but its speed."""
    heads = problem.shape.all_tokens * problem.shape.value_heads
    kept = checked.memory.kept
    return Row.of(
        operator,
        problem.short,
        problem.shape,
        direction,
        backend,
        dtype=grid.dtype,
        cuda_graph=bench.cuda_graph,
        status=checked.status,
        reason=checked.reason,
        note=problem.note(backend) if checked.errors else "",
        peak_bytes=checked.memory.peak,
        kept_bytes=kept,
        kept_bytes_per_token_and_value_head=None if kept is None else kept / heads,
        first_call_seconds=checked.first_call_seconds,
        reference=reference if checked.errors else "",
        errors=checked.errors,
        bars=problem.bars(backend),
    )


def _fill_in(row: Row, timing: Timing | None, work: Work, ceilings: Ceilings) -> None:
    """The floor, and the speed if there is one."""
    row.floor_milliseconds, row.floor_bound = 1e3 * ceilings.seconds(work), ceilings.bound(work)
    row.flops_per_byte = work.flops / work.bytes
    if timing is None:
        return
    seconds = timing.median / 1e3
    row.milliseconds, row.repeats = timing.median, timing.repeats
    row.milliseconds_lower, row.milliseconds_upper = timing.lower, timing.upper
    row.host_milliseconds = timing.host
    row.tokens_per_second = row.batch * row.tokens / seconds
    row.tflops_per_second = work.flops / seconds / 1e12
    row.gbytes_per_second = work.bytes / seconds / 1e9
    row.fraction_of_floor = row.floor_milliseconds / timing.median


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    """What a failed backend held, so that the next one finds the memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
