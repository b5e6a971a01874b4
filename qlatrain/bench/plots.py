"""`speed.png` and `roofline.png`: a benchmark at first sight."""

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from qlatrain.bench.floors import Ceilings
from qlatrain.bench.results import Results, Row

COLORS = {"tilelang": "#d1495b", "flash_qla": "#1f6fb4", "fla": "#7b4ea3", "torch": "#8a8a8a"}
OTHER, DARK, WRONG, GRID = "#2a8c6a", "#222222", "#b00020", "#e6e6e6"
MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_speed(results: Results, path: Path) -> None:
    """Grouped bars: the speed of every backend at every shape in percent of its limit, a panel for each direction.

    The limit of a shape is FLOPs and bytes by formula over the measured ceilings, so that shapes of all sizes fit one
    axis. Milliseconds stand over the bars, and the status in place of a bar where there is no right result.
    """
    directions = list(dict.fromkeys(row.direction for row in results.rows))
    shapes = list(dict.fromkeys(row.shape for row in results.rows))
    backends = list(dict.fromkeys(row.backend for row in results.rows))
    width = max(9.0, 2.0 + len(shapes) * (0.4 + 0.26 * len(backends)))
    figure = Figure(figsize=(width, 1.8 + 2.7 * len(directions)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(directions), 1, sharex=True, squeeze=False)[:, 0]
    for axes, direction in zip(panels, directions, strict=True):
        rows = [row for row in results.rows if row.direction == direction]
        _speed_panel(axes, rows, shapes, backends)
        axes.set_ylabel(f"{direction}\n% of the limit")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(backends), frameon=False)
    panels[-1].set_xticks(range(len(shapes)), [_two_lines(shape) for shape in shapes], fontsize=9)
    panels[-1].set_xlim(-0.6, len(shapes) - 0.4)
    panels[-1].set_xlabel(
        "batch × tokens (or tokens and packed documents), key / value heads, head sizes K / V if not 128\n"
        f"100 % is the limit: FLOPs over {_rate(results.ceilings.flops_per_second, 'FLOP/s')} or bytes over "
        f"{_rate(results.ceilings.bytes_per_second, 'B/s')}, both measured in this run; over the bars: milliseconds"
    )
    figure.suptitle(f"{_title(results)}\nhigher is faster", x=0.01, ha="left", fontsize=12, fontweight="bold")
    save_figure(figure, path)


def _speed_panel(axes: Axes, rows: list[Row], shapes: list[str], backends: list[str]) -> None:
    step = 0.84 / len(backends)
    for place, backend in enumerate(backends):
        shown = {shapes.index(row.shape) - 0.42 + step * (place + 0.5): row for row in rows if row.backend == backend}
        timed = {x: row for x, row in shown.items() if row.milliseconds is not None}
        heights = [_percent(row, row.milliseconds) for row in timed.values()]
        ends = [
            [_percent(row, row.milliseconds_upper), _percent(row, row.milliseconds_lower)] for row in timed.values()
        ]
        spread = [[h - low for h, (low, _) in zip(heights, ends, strict=True)]]
        spread += [[high - h for h, (_, high) in zip(heights, ends, strict=True)]]
        axes.bar(list(timed), heights, width=0.92 * step, color=COLORS.get(backend, OTHER), label=backend)
        axes.errorbar(list(timed), heights, yerr=spread, fmt="none", ecolor=DARK, elinewidth=0.8, capsize=1.5)
        for x, row in shown.items():
            if row.milliseconds is None:
                text, height, color = row.status, 0.0, WRONG if row.status == "wrong" else DARK
            else:
                text, height, color = f"{row.milliseconds:.3g}", _percent(row, row.milliseconds_lower), DARK
            axes.annotate(
                text,
                (x, height),
                xytext=(0, 3),
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=7.5,
                fontweight="bold" if row.best else "normal",
                color=color,
            )
    highest = max((_percent(row, row.milliseconds_lower) for row in rows if row.milliseconds is not None), default=100)
    axes.set_ylim(0, 1.35 * highest)
    _tidy(axes)


def _percent(row: Row, milliseconds: float) -> float:
    return 100 * row.floor_milliseconds / milliseconds


def plot_roofline(results: Results, path: Path) -> None:
    """What each row reaches in TFLOP/s over FLOPs per byte, under the two ceilings, a panel for each direction."""
    directions = list(dict.fromkeys(row.direction for row in results.rows))
    figure = Figure(figsize=(1.5 + 4.6 * len(directions), 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    heads = list(dict.fromkeys(_heads(row) for row in results.rows))
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(heads)}
    timed = [row for row in results.rows if row.milliseconds is not None]
    slowest = min((row.tflops_per_second for row in timed), default=results.ceilings.flops_per_second / 1e13)
    for axes, direction in zip(panels, directions, strict=True):
        _roof(axes, results.ceilings, results.rows)
        for row in timed:
            if row.direction == direction:
                axes.plot(
                    row.flops_per_byte,
                    row.tflops_per_second,
                    marker=markers[_heads(row)],
                    color=COLORS.get(row.backend, OTHER),
                    linestyle="none",
                    markersize=8,
                    alpha=0.75,
                    markeredgecolor="white",
                )
        axes.set_title(direction, fontsize=11)
        axes.set_xlabel("FLOPs per byte, by formula")
        axes.set_ylim(0.5 * slowest, 2 * results.ceilings.flops_per_second / 1e12)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].set_ylabel("TFLOP/s")
    for backend in dict.fromkeys(row.backend for row in timed):
        panels[-1].plot([], [], marker="o", linestyle="none", color=COLORS.get(backend, OTHER), label=backend)
    for name, marker in markers.items():
        panels[-1].plot([], [], marker=marker, linestyle="none", color="#555555", label=name)
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    title = f"{_title(results)}: how near to what the device can do"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    save_figure(figure, path)


def _roof(axes: Axes, ceilings: Ceilings, rows: list[Row]) -> None:
    """The slope of the memory, the plateau of the matrix product, and what they are."""
    peak, slope = ceilings.flops_per_second / 1e12, ceilings.bytes_per_second / 1e12
    ridge = peak / slope
    left = 0.5 * min([ridge, *(row.flops_per_byte for row in rows)])
    right = 2.5 * max([ridge, *(row.flops_per_byte for row in rows)])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([left, ridge, right], [left * slope, peak, peak], color=DARK, linewidth=1.6)
    axes.text(right, peak * 1.08, f"matrix product {peak:.3g} TFLOP/s ", ha="right", va="bottom", fontsize=8)
    middle = (left * ridge) ** 0.5
    axes.text(middle * 1.08, middle * slope * 0.9, f"copy {1e3 * slope:.4g} GB/s", ha="left", va="top", fontsize=8)
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _tidy(axes)


def _title(results: Results) -> str:
    row = results.rows[0]
    graph = ", CUDA graphs" if row.cuda_graph else ""
    return f"{row.operator.replace('_', ' ')} on {results.device}, {row.dtype}{graph}"


def _heads(row: Row) -> str:
    return f"{row.key_heads}/{row.value_heads} heads, K/V {row.key_dim}/{row.value_dim}"


def _two_lines(shape: str) -> str:
    """`32768 packed16 16/32 96/192` → tokens above, heads and sizes below."""
    words = shape.split(" ")
    above = 2 if words[1].startswith("packed") else 1
    return " ".join(words[:above]) + "\n" + " ".join(words[above:])


def _rate(value: float, unit: str) -> str:
    return EngFormatter(unit, places=0)(value)


def _tidy(axes: Axes) -> None:
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Aside and renamed, so that a viewer never meets half a picture."""
    aside = path.with_name(path.name + ".new")
    figure.savefig(aside, format="png")
    os.replace(aside, path)
