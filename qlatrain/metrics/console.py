"""What a person reads while a run goes on: a banner, a line a step, a summary.

Plain lines and no moving bars, so that a log file reads like the terminal did; colours on a terminal only.
"""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlatrain.metrics.flops import FlopTable, ParameterCounts
from qlatrain.metrics.kernel_times import FAMILIES
from qlatrain.metrics.throughput import ThroughputSummary, format_duration

_PIPED_WIDTH = 120  # columns where there is no terminal to ask


class RunConsole:
    """Prints a run. On every process but the main one all methods do nothing."""

    def __init__(self, is_main_process: bool = True, console: Console | None = None):
        self._on = is_main_process
        if console is None:
            console = Console(highlight=False)
            if not console.is_terminal:
                console = Console(highlight=False, width=_PIPED_WIDTH)
        self.console = console

    def banner(
        self,
        run_name: str,
        run_dir: str | Path,
        parameters: ParameterCounts,
        flops: FlopTable,
        backends: Iterable[str],
        settings: str,
        peak: tuple[float, str],
        devices: int = 1,
    ) -> None:
        """The start of a run. `backends`: a line for each operator, saying what runs it and why; `settings`: how a
        step is taken; `peak`: see `hardware.peak_flops`, of one device."""
        if not self._on:
            return
        self.console.rule(Text(f"qlatrain · {run_name}", style="bold"), align="left")
        self.console.print(flop_table(flops))
        self.console.print(counted_text(flops))
        facts = _grid()
        facts.add_row("run directory", str(run_dir))
        facts.add_row("parameters", _parameters_text(parameters))
        for line in backends:
            facts.add_row("backend", line)
        facts.add_row("settings", settings)
        rate, how = peak
        facts.add_row("peak", f"{_rate(rate)} a device, {devices} device{'s' * (devices != 1)} ({how})")
        self.console.print(facts)
        self.console.rule()

    def step(self, row: dict, total_steps: int, seconds_left: float | None) -> None:
        """The status line of a step. `row` as in `metrics.jsonl`, with what the line should show in it."""
        if not self._on:
            return
        width = len(str(total_steps))
        line = Text(f"step {row['step']:>{width}}/{total_steps}", style="bold")
        line.append(f"  loss {_number(row.get('loss'), '.4f'):>7}", style="cyan")
        line.append(f"  lr {_number(row.get('lr'), '.2e')}", style="not bold")
        line.append(f"  grad norm {_number(row.get('grad_norm'), '.3f'):>6}", style="not bold")
        line.append(f"  {_number(row.get('tokens_per_second'), ',.0f'):>9} tok/s", style="not bold green")
        mfu = row.get("mfu")
        if mfu is not None:
            line.append(f"  MFU {100 * mfu:>5.1f} %", style="not bold green")
        line.append(f"  left {format_duration(seconds_left)}", style="not bold")
        self._line(line)

    def validation(self, row: dict) -> None:
        """The line of a validation: loss, bits per byte, and how far that is from the bigram baseline."""
        if not self._on:
            return
        line = Text(f"validation at step {row['step']}", style="bold")
        line.append(f"  loss {_number(row.get('validation_loss'), '.4f')}", style="cyan")
        bits, bigram = row.get("validation_bits_per_byte"), row.get("bigram_bits_per_byte")
        if bits is not None:
            line.append(f"  {bits:.4f} bits per byte", style="cyan")
        if bigram is not None:
            line.append(f"  byte bigram {bigram:.4f}", style="not bold")
            if bits is not None:
                verdict = "below it" if bits < bigram else "not below it yet"
                line.append(f" ({verdict})", style="not bold green" if bits < bigram else "not bold yellow")
        self._line(line)

    def kernel_times(self, row: dict) -> None:
        """The line of a profiled step: its time, and the shares of the families that have any."""
        if not self._on:
            return
        line = Text(f"kernel times at step {row['step']}", style="bold")
        line.append(f"  {row['kernel_times/step_ms']:,.1f} ms", style="cyan")
        for family, words in FAMILIES.items():
            share = row[f"kernel_times/{family}"]
            if share > 0:
                line.append(f"  {words} {100 * share:.1f} %", style="not bold")
        self._line(line)

    def note(self, message: str) -> None:
        """A line of plain text: where a run resumed from, what a tracker does, which checkpoint was written."""
        if self._on:
            self._line(Text(message, style="dim"))

    def warning(self, message: str) -> None:
        """A line that should not be overlooked: a skipped step, a slow fallback."""
        if self._on:
            self._line(Text(f"warning: {message}", style="bold yellow"))

    def summary(
        self,
        throughput: ThroughputSummary,
        final_step: int,
        validations: Iterable[dict],
        skipped_steps: int,
        files: dict[str, str | Path],
    ) -> None:
        """The end of a run. `validations`: the rows of `metrics.jsonl` that hold `validation_loss`; `files`: what lies
        where, in the order to print."""
        if not self._on:
            return
        rows = _grid()
        resumed = final_step - throughput.steps
        steps = f"{final_step:,}"
        rows.add_row("steps", steps + (f" ({throughput.steps:,} since the resume)" if resumed > 0 else ""))
        rows.add_row("tokens", f"{throughput.tokens:,}")
        time_text = f"{format_duration(throughput.train_seconds)} training"
        paused = "validation, checkpoints and profiles" if throughput.untimed_steps else "validation and checkpoints"
        rows.add_row("time", f"{time_text}, {format_duration(throughput.paused_seconds)} {paused}")
        speed = f"{throughput.tokens_per_second:,.0f} tokens/s"
        if throughput.mfu is not None:
            speed += f", MFU {100 * throughput.mfu:.1f} %"
        left_out = [f"the first {throughput.excluded_steps} steps"] if throughput.excluded_steps else []
        if throughput.untimed_steps:
            left_out.append(f"{throughput.untimed_steps} profiled")
        if left_out:
            speed += f" (without {' and '.join(left_out)})"
        if throughput.untimed_steps == throughput.steps:
            speed = "not measured, as every step was profiled"
        rows.add_row("speed", speed)
        validations = [v for v in validations if v.get("validation_loss") is not None]
        if validations:
            # NaN compares as no less than anything, and would be the best if it came first
            best = min(validations, key=lambda v: (v["validation_loss"] != v["validation_loss"], v["validation_loss"]))
            rows.add_row("validation", f"last {_validation_text(validations[-1])}")
            rows.add_row("", f"best {_validation_text(best)}")
        rows.add_row("skipped steps", str(skipped_steps))
        for what, path in files.items():
            rows.add_row(what, str(path))
        self.console.print(Panel(rows, title="run complete", title_align="left", expand=False))

    def _line(self, text: Text) -> None:
        # one line whatever the width: a wrapped status line cannot be searched for
        self.console.print(text, soft_wrap=True)


def flop_table(flops: FlopTable) -> Table:
    """Parameters and FLOPs by part of the model, the total last."""
    table = Table(
        title=f"training FLOPs per token, documents of {flops.mean_document_length:,.0f} tokens", title_justify="left"
    )
    table.add_column("part")
    for heading in ("layers", "parameters", "forward MFLOP", "forward + backward MFLOP", "share"):
        table.add_column(heading, justify="right")
    for row in flops.rows:
        table.add_row(
            row.part,
            str(row.layers),
            f"{row.parameters:,}",
            f"{row.forward_flops_per_token / 1e6:,.3f}",
            f"{row.train_flops_per_token / 1e6:,.3f}",
            f"{100 * row.share:.1f} %",
        )
    table.add_section()
    table.add_row(
        "total",
        "",
        f"{sum(row.parameters for row in flops.rows):,}",
        f"{flops.forward_flops_per_token / 1e6:,.3f}",
        f"{flops.train_flops_per_token / 1e6:,.3f}",
        "100.0 %",
        style="bold",
    )
    return table


def counted_text(flops: FlopTable) -> Text:
    """What the FLOPs hold and what they leave out, a line each."""
    lines = [f"  counted      {line}" for line in flops.counted]
    lines += [f"  not counted  {line}" for line in flops.not_counted]
    return Text("\n".join(lines), style="dim")


def _parameters_text(parameters: ParameterCounts) -> str:
    head = f"{parameters.head:,} output head" if parameters.head else "output head tied to it"
    return f"{parameters.total:,} = {parameters.non_embedding:,} + {parameters.embedding:,} embedding, {head}"


def _validation_text(row: dict) -> str:
    text = f"loss {row['validation_loss']:.4f}"
    if row.get("validation_bits_per_byte") is not None:
        text += f", {row['validation_bits_per_byte']:.4f} bits per byte"
    if row.get("bigram_bits_per_byte") is not None:
        text += f" (byte bigram {row['bigram_bits_per_byte']:.4f})"
    return f"{text} at step {row['step']:,}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rate(flops_per_second: float) -> str:
    if flops_per_second >= 1e12:
        return f"{flops_per_second / 1e12:,.1f} TFLOP/s"
    return f"{flops_per_second / 1e9:,.1f} GFLOP/s"


def _grid() -> Table:
    """Two columns without a frame: a name and what it is."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid
