"""What a person reads of a benchmark: a line for each backend while it runs, and the tables at the end.

Plain lines and no moving bars, as everywhere here: a log file reads like the terminal did.
"""

import time
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlatrain.bench.floors import Ceilings
from qlatrain.bench.results import SHORT_DIRECTIONS, Row
from qlatrain.metrics.console import RunConsole
from qlatrain.metrics.throughput import format_duration

STATUS_STYLES = {"wrong": "bold red", "failed": "yellow", "refused": "dim"}


class BenchReport:
    """
    Args:
        shapes, backends: how many there are, for the estimate.
    """

    def __init__(self, console: RunConsole, shapes: int, backends: int):
        self._console, self._shapes, self._backends = console, shapes, backends
        self._done, self._start = 0, time.monotonic()

    def banner(self, name: str, run_dir: Path, device: str, ceilings: Ceilings) -> None:
        """Where it runs and what the device reaches."""
        console = self._console.console
        console.rule(Text(f"qlatrain · {name}", style="bold"), align="left")
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_row("run directory", str(run_dir))
        facts.add_row("device", device)
        facts.add_row("ceiling", f"{ceilings.flops_per_second / 1e12:,.3g} TFLOP/s, {ceilings.flops_how}")
        facts.add_row("ceiling", f"{ceilings.bytes_per_second / 1e9:,.4g} GB/s, {ceilings.bytes_how}")
        console.print(facts)
        console.rule()

    def checked(self, rows: list[Row]) -> None:
        """The line of a backend that was run and checked at a shape; rows: of every direction."""
        reasons = {row.reason for row in rows}
        if reasons == {""}:
            worst = max(rows, key=lambda row: row.worst_error[1] / row.bars[row.worst_error[0]])
            name, error = worst.worst_error
            said = f"right, {name} off by {error:.1e} (bar {worst.bars[name]:.1e})"
        elif len(reasons) == 1:
            said = _told(rows[0])
        else:
            said = "; ".join(f"{SHORT_DIRECTIONS[row.direction]} {_told(row)}" for row in rows)
        style = "bold red" if any(row.status == "wrong" for row in rows) else "not bold"
        self._line(rows[0].shape, f"{rows[0].backend:<9} {said}", style)

    def timed(self, rows: list[Row]) -> None:
        """The line of a shape that is done: the fastest in each direction."""
        best = [row for row in rows if row.best]
        parts = [f"{SHORT_DIRECTIONS[row.direction]} {row.backend} {row.milliseconds:.4g} ms" for row in best]
        self._line(rows[0].shape, f"fastest: {', '.join(parts) or 'none'}", "green")

    def _line(self, shape: str, said: str, style: str) -> None:
        self._done += 1
        steps = self._shapes * (self._backends + 1)
        left = (time.monotonic() - self._start) / self._done * (steps - self._done)
        line = Text(f"{self._done:>{len(str(steps))}}/{steps}  {shape:<22}", style="bold")
        line.append(f"  {said}", style=style)
        line.append(f"  left {format_duration(left)}", style="not bold dim")
        self._console.console.print(line, soft_wrap=True)

    def tables(self, rows: list[Row], baseline: str, cold_starts: list[dict]) -> None:
        """Speed; memory and correctness; reasons and notes, each said once."""
        console = self._console.console
        console.print(speed_table(rows, baseline))
        console.print(check_table(rows))
        if cold_starts:
            console.print(cold_start_table(cold_starts))
        for reason, shapes in _reasons(rows).items():
            console.print(Text(f"{reason}  ({', '.join(shapes)})", style="yellow"), soft_wrap=True)
        for note in dict.fromkeys(f"{row.backend}: {row.note}" for row in rows if row.note):
            self._console.note(note)

    def files(self, files: dict[str, Path]) -> None:
        for what, path in files.items():
            self._console.note(f"{what:<10} {path}")


def speed_table(rows: list[Row], baseline: str) -> Table:
    """A line for each row; the fastest right one of a shape and direction is marked."""
    table = _table("speed: median of the timed calls, quartiles beside it; * marks the fastest")
    for heading in ("shape", "", "backend"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "quartiles", "host ms", "tokens/s", "TFLOP/s", "GB/s", "of floor", f"× {baseline}"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        new_shape = before is None or row.shape != before.shape
        new_direction = new_shape or row.direction != before.direction
        if new_shape and before is not None:
            table.add_section()
        before = row
        head = [escape(row.shape) if new_shape else "", SHORT_DIRECTIONS[row.direction] if new_direction else ""]
        if row.milliseconds is None:
            table.add_row(*head, row.backend, Text(row.status, style=STATUS_STYLES[row.status]))
            continue
        table.add_row(
            *head,
            f"{row.backend} *" if row.best else row.backend,
            f"{row.milliseconds:.4g}",
            f"{row.milliseconds_lower:.4g}–{row.milliseconds_upper:.4g}",
            "" if row.host_milliseconds is None else f"{row.host_milliseconds:.3g}",
            _short(row.tokens_per_second),
            f"{row.tflops_per_second:.3g}",
            f"{row.gbytes_per_second:.4g}",
            f"{100 * row.fraction_of_floor:.1f} %",
            "" if row.ratio_to_baseline is None else f"{row.ratio_to_baseline:.2f}",
            style="bold green" if row.best else "",
        )
    return table


def check_table(rows: list[Row]) -> Table:
    """A line for each shape and backend that ran: its last direction, or the first in which it is not right."""
    table = _table("checks and memory")
    for heading in ("shape", "backend"):
        table.add_column(heading, no_wrap=True)
    for heading in ("worst error", "its bar", "peak", "kept for backward", "first calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown: dict[tuple[str, str], Row] = {}
    first_calls: dict[tuple[str, str], float] = {}  # of all directions: the first one compiles for the others
    for row in rows:
        place = (row.shape, row.backend)
        if row.first_call_seconds is not None:
            first_calls[place] = first_calls.get(place, 0.0) + row.first_call_seconds
        if place not in shown or shown[place].status == "ok":  # a row that is not right stays
            shown[place] = row
    for place, row in shown.items():
        if not row.errors:
            continue
        name, error = row.worst_error
        kept = row.kept_bytes_per_token_and_value_head
        table.add_row(
            escape(row.shape),
            row.backend,
            f"{name} {error:.1e}",
            f"{row.bars[name]:.1e}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f} MiB",
            "" if kept is None else f"{kept:,.0f} B a token and head",
            f"{first_calls[place]:.2f} s" if place in first_calls else "",
            style=STATUS_STYLES.get(row.status, ""),
        )
    return table


def cold_start_table(cold_starts: list[dict]) -> Table:
    table = _table("first forward and backward of a fresh process, in seconds")
    for heading in ("shape", "backend", "empty cache", "full cache", "why not"):
        table.add_column(heading)
    for start in cold_starts:
        seconds = [start.get(f"{cache}_cache_seconds") for cache in ("empty", "full")]
        shown = ["" if value is None else f"{value:.2f}" for value in seconds]
        table.add_row(escape(start["shape"]), start["backend"], *shown, escape(start.get("reason", "")))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _reasons(rows: list[Row]) -> dict[str, list[str]]:
    """Why rows have no speed → the shapes; a reason that holds in every direction is told once."""
    directions = len({row.direction for row in rows})
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            alike.setdefault((row.backend, _told(row), row.shape), []).append(SHORT_DIRECTIONS[row.direction])
    found: dict[str, list[str]] = {}
    for (backend, told, shape), where in alike.items():
        only = "" if len(where) == directions else f" {', '.join(where)}"
        found.setdefault(f"{backend}{only} {told}", []).append(shape)
    return found


def _told(row: Row) -> str:
    """Whether a row is right, and why not; the reason of a wrong one says so itself."""
    if row.status == "ok":
        return "right"
    return row.reason if row.status == "wrong" else f"{row.status}: {row.reason}"


def _short(value: float) -> str:
    """1234567 → 1.23 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"
