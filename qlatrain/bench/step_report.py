"""What a person reads of `bench_step`: a line for each thing done, and the tables at the end."""

import time
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlatrain.bench.step_job import FIFTH, OURS, StepJob
from qlatrain.bench.step_results import StepResults, StepRow
from qlatrain.metrics.console import RunConsole, counted_text, flop_table
from qlatrain.metrics.flops import FlopTable
from qlatrain.metrics.kernel_times import FAMILIES
from qlatrain.metrics.throughput import format_duration

STYLES = {"failed": "bold red", "missing": "yellow", "refused": "yellow"}
NOT_IN_STARTUP = "counted from the start of building the model; the import of libraries before it is not in it"


class StepReport:
    """
    Args:
        models: how many are measured, for the estimate.
    """

    def __init__(self, console: RunConsole, models: int):
        self._console, self._models, self._done = console, models, 0
        self._start, self._first = time.monotonic(), 0.0  # of the model at hand; seconds to its first step
        self._longest = 0.0  # seconds that a model has taken

    def banner(self, name: str, run_dir: Path, results: StepResults, job: StepJob, flops: FlopTable) -> None:
        """What is measured where, and what is counted."""
        console = self._console.console
        console.rule(Text(f"qlatrain · {name}", style="bold"), align="left")
        console.print(flop_table(flops))
        console.print(counted_text(flops))
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        facts.add_row("run directory", str(run_dir))
        facts.add_row("device", results.device)
        facts.add_row("peak", f"{results.peak_flops / 1e12:,.3g} TFLOP/s, {results.peak_how}")
        facts.add_row(
            "step", f"{job.model.name}, {job.shape} = {job.batch_shape.all_tokens:,} tokens, {job.optim.name}"
        )
        facts.add_row("settings", job.train.described())
        facts.add_row("steps", f"{job.warmup} warm-up, {job.steps} timed, {job.profiled_steps} profiled")
        console.print(facts)
        console.rule()

    def event(self, job: StepJob, event: dict) -> None:
        """The line of something that a process has done."""
        kind = event["event"]
        if kind == "built":
            self._line(job.name, f"model built in {event['seconds']:.1f} s")
        elif kind == "first step":
            self._first = event["seconds"]
            self._line(job.name, f"first step after {self._first:.1f} s")
        elif kind == "fifth step":
            steps = job.warmup - FIFTH + job.steps + job.profiled_steps
            left = steps * (event["seconds"] - self._first) / (FIFTH - 1)
            self._line(
                job.name,
                f"fifth step after {event['seconds']:.1f} s",
                left=self._left(left, self._models - self._done - 1),
            )
        elif kind == "said":
            self._console.note(f"{job.name}: {event['line']}")
        elif kind == "timed":
            tokens = 1e3 * job.batch_shape.all_tokens / event["milliseconds"]
            what = f", now {job.profiled_steps} under the profiler" if job.profiled_steps else ""
            self._line(job.name, f"{job.steps} steps, {tokens:,.0f} tokens/s{what}")

    def done(self, row: StepRow) -> None:
        """The line of a model that is done, with the time left if the others take as long as the slowest so far."""
        self._done += 1
        self._longest = max(self._longest, time.monotonic() - self._start)
        said = row.reason and f"{row.status}: {row.reason}"
        if row.status == "ok":
            said = f"{row.tokens_per_second:,.0f} tokens/s, MFU {100 * row.mfu:.1f} %, peak {_bytes(row.peak_bytes)}"
        self._line(
            row.model, said, STYLES.get(row.status, "green"), self._left(0.0, self._models - self._done), self._done
        )
        self._start = time.monotonic()

    def _left(self, seconds: float, behind: int) -> str:
        """seconds: that the model at hand still takes; behind: how many follow, each as long as the slowest so far."""
        in_all = max(self._longest, time.monotonic() - self._start + seconds)
        return f"  left {format_duration(seconds + behind * in_all)}"

    def _line(self, model: str, said: str, style: str = "not bold", left: str = "", number: int | None = None) -> None:
        line = Text(f"{number or self._done + 1}/{self._models}  {model:<12}", style="bold")
        line.append(f"  {said}", style=style)
        line.append(left, style="not bold dim")
        self._console.console.print(line, soft_wrap=True)

    def tables(self, results: StepResults) -> None:
        """Speed and memory; the time by family; reasons and notes."""
        console, rows = self._console.console, results.rows
        console.print(step_table(rows))
        console.print(Text(f"first and fifth step: {NOT_IN_STARTUP}", style="dim"), soft_wrap=True)
        if any(row.families for row in rows):
            console.print(family_table(rows))
        for row in rows:
            if row.reason:
                console.print(Text(f"{row.model} {row.status}: {row.reason}", style="yellow"), soft_wrap=True)
            if row.note:
                self._console.note(f"{row.model}: {row.note}")

    def files(self, files: dict[str, Path]) -> None:
        for what, path in files.items():
            self._console.note(f"{what:<10} {path}")


def step_table(rows: list[StepRow]) -> Table:
    """A line for each model."""
    table = _table(f"a training step of {rows[0].sizes} at {escape(rows[0].shape)}: the median, quartiles beside it")
    table.add_column("model", no_wrap=True)
    headings = ("parameters", "ms", "quartiles", "tokens/s", f"{OURS} is", "MFU", "peak", "1st step", "5th step")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.milliseconds is None:
            table.add_row(row.model, Text(row.status, style=STYLES[row.status]))
            continue
        table.add_row(
            row.model,
            f"{row.parameters / 1e6:,.4g} M",
            f"{row.milliseconds:.4g}",
            f"{row.milliseconds_lower:.4g}–{row.milliseconds_upper:.4g}",
            f"{row.tokens_per_second:,.0f}",
            "" if row.ours_is is None or row.model == OURS else f"{row.ours_is:.2f}×",
            f"{100 * row.mfu:.1f} %",
            _bytes(row.peak_bytes),
            f"{row.first_step_seconds:.1f} s",
            f"{row.fifth_step_seconds:.1f} s",
            style="bold green" if row.model == OURS else "",
        )
    return table


def family_table(rows: list[StepRow]) -> Table:
    """Milliseconds and share of each family, a column for each model that was profiled."""
    rows = [row for row in rows if row.families]
    table = _table(
        "time by family of kernels, in steps under the profiler, which slows the host: idle is the most it can be"
    )
    table.add_column("family", no_wrap=True)
    for row in rows:
        table.add_column(f"{row.model} ms", justify="right", no_wrap=True)
        table.add_column("share", justify="right", no_wrap=True)
    for family, words in FAMILIES.items():
        if any(row.families[family] for row in rows):
            table.add_row(words, *(cell for row in rows for cell in _with_share(row, row.families[family])))
    table.add_section()
    table.add_row("step", *(cell for row in rows for cell in _with_share(row, row.profiled_milliseconds)), style="bold")
    table.add_row("timed step", *(cell for row in rows for cell in (f"{row.milliseconds:,.4g}", "")))
    return table


def _with_share(row: StepRow, milliseconds: float) -> tuple[str, str]:
    return f"{milliseconds:,.4g}", f"{100 * milliseconds / row.profiled_milliseconds:.1f} %"


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
