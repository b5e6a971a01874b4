"""`step.png`: ours and its peers at first sight."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlatrain.bench.plots import DARK, GRID, WRONG, save_figure
from qlatrain.bench.step_job import OURS
from qlatrain.bench.step_results import StepResults, StepRow
from qlatrain.metrics.kernel_times import FAMILIES

COLORS = {OURS: "#d1495b", "fla": "#7b4ea3", "transformers": "#e0a030"}
FAMILY_COLORS = {
    "gdn": "#d1495b",
    "attention": "#e0a030",
    "matrix_products": "#1f6fb4",
    "norms_and_elementwise": "#2a8c6a",
    "optimizer": "#7b4ea3",
    "communication": "#50b4c8",
    "idle": "#c8c8c8",
}


def plot_step(results: StepResults, path: Path) -> None:
    """Tokens a second of each model on the left; on the right the milliseconds of its step by family of kernels."""
    rows = results.rows
    figure = Figure(figsize=(11.0, 2.6 + 0.75 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    speed, families = figure.subplots(1, 2, sharey=True)
    _speed(speed, rows)
    _families(families, rows)
    speed.set_yticks(range(len(rows)), [row.model for row in rows])
    speed.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    row = rows[0]
    precision = "bf16" if row.mixed_precision == "bf16" else "float32"
    title = f"a training step of {row.sizes}, {row.shape} tokens, {precision}, on {results.device}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    handles, labels = families.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    save_figure(figure, path)


def _speed(axes: Axes, rows: list[StepRow]) -> None:
    timed = {i: row for i, row in enumerate(rows) if row.tokens_per_second}
    speeds = [row.tokens_per_second for row in timed.values()]
    axes.barh(list(timed), speeds, height=0.62, color=[COLORS[row.model] for row in timed.values()])
    for i, row in enumerate(rows):
        if i not in timed:
            axes.text(0, i, f" {row.status}", va="center", fontsize=9, color=WRONG)
            continue
        ratio = f"  ({OURS} is {row.ours_is:.2f}×)" if row.model != OURS and row.ours_is else ""
        axes.text(
            row.tokens_per_second, i, f" {row.tokens_per_second:,.0f}{ratio}", va="center", fontsize=9, color=DARK
        )
    axes.set_xlim(0, 1.55 * max(speeds, default=1.0))
    axes.set_xlabel("tokens per second, higher is faster")
    _tidy(axes)


def _families(axes: Axes, rows: list[StepRow]) -> None:
    profiled = {i: row for i, row in enumerate(rows) if row.families}
    left = dict.fromkeys(profiled, 0.0)
    for family, words in FAMILIES.items():
        widths = [row.families[family] for row in profiled.values()]
        if any(widths):
            color = FAMILY_COLORS[family]
            axes.barh(list(profiled), widths, left=list(left.values()), height=0.62, color=color, label=words)
            left = {i: start + width for (i, start), width in zip(left.items(), widths, strict=True)}
    axes.set_xlabel("milliseconds of a step under the profiler, by family of kernels")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
