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
OTHER, FLOOR, GRID = "#2a8c6a", "#222222", "#e6e6e6"
MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_speed(results: Results, path: Path) -> None:
    """Grouped bars: tokens per second of every backend at every shape, a panel for each direction.

    Milliseconds stand over the bars, a dash over each group is what the device could do, and a backend without a
    right result has its reason's first word in place of a bar.
    """
    directions = list(dict.fromkeys(row.direction for row in results.rows))
    shapes = list(dict.fromkeys(row.shape for row in results.rows))
    backends = list(dict.fromkeys(row.backend for row in results.rows))
    width = max(9.0, 2.2 + len(shapes) * (0.45 + 0.42 * len(backends)))
    figure = Figure(figsize=(width, 1.4 + 3.3 * len(directions)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(directions), 1, sharex=True, squeeze=False)[:, 0]
    for axes, direction in zip(panels, directions, strict=True):
        rows = {(row.shape, row.backend): row for row in results.rows if row.direction == direction}
        _speed_panel(axes, rows, shapes, backends)
        axes.set_ylabel(f"{direction}\ntokens per second")
    panels[0].legend(
        *_legend(panels),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(backends) + 1,
        frameon=False,
        borderaxespad=0.2,
    )
    panels[-1].set_xticks(range(len(shapes)), [_two_lines(shape) for shape in shapes], fontsize=9)
    panels[-1].set_xlabel(
        "shape: batch × tokens (or tokens, packed documents), key heads / value heads, K / V if not 128"
    )
    figure.suptitle(f"{_title(results)}: higher is faster", x=0.01, ha="left", fontsize=13, fontweight="bold")
    _save(figure, path)


def _speed_panel(axes: Axes, rows: dict[tuple[str, str], Row], shapes: list[str], backends: list[str]) -> None:
    step = 0.8 / len(backends)
    for place, backend in enumerate(backends):
        shift = -0.4 + step * (place + 0.5)
        shown = [(i, rows[shape, backend]) for i, shape in enumerate(shapes)]
        timed = [(i, row) for i, row in shown if row.milliseconds is not None]
        speeds = [row.tokens_per_second for _, row in timed]
        spread = [
            [row.tokens_per_second * (1 - row.milliseconds / row.milliseconds_upper) for _, row in timed],
            [row.tokens_per_second * (row.milliseconds / row.milliseconds_lower - 1) for _, row in timed],
        ]
        places = [i + shift for i, _ in timed]
        axes.bar(places, speeds, width=0.92 * step, color=COLORS.get(backend, OTHER), label=backend)
        axes.errorbar(places, speeds, yerr=spread, fmt="none", ecolor=FLOOR, elinewidth=0.8, capsize=1.5)
        for i, row in shown:
            height = row.tokens_per_second or 0
            text = f" {row.milliseconds:.3g} ms" if row.milliseconds is not None else f" {row.status}"
            weight = "bold" if row.best else "normal"
            axes.text(i + shift, height, text, rotation=90, ha="center", va="bottom", fontsize=7.5, fontweight=weight)
    floors = [next(row for (shape, _), row in rows.items() if shape == wanted) for wanted in shapes]
    limits = [row.batch * row.tokens / row.floor_milliseconds * 1e3 for row in floors]
    axes.hlines(
        limits,
        [i - 0.42 for i in range(len(shapes))],
        [i + 0.42 for i in range(len(shapes))],
        color=FLOOR,
        linestyle=(0, (4, 2)),
        linewidth=1.3,
        label="limit: FLOPs and bytes over the measured ceilings",
    )
    highest = max([*limits, *(row.tokens_per_second or 0 for row in rows.values())])
    axes.set_ylim(0, 1.3 * highest)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _tidy(axes)


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
    _save(figure, path)


def _roof(axes: Axes, ceilings: Ceilings, rows: list[Row]) -> None:
    """The slope of the memory, the plateau of the matrix product, and what they are."""
    peak, slope = ceilings.flops_per_second / 1e12, ceilings.bytes_per_second / 1e12
    ridge = peak / slope
    left = 0.5 * min([ridge, *(row.flops_per_byte for row in rows)])
    right = 2.5 * max([ridge, *(row.flops_per_byte for row in rows)])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([left, ridge, right], [left * slope, peak, peak], color=FLOOR, linewidth=1.6)
    axes.text(right, peak * 1.08, f"matrix product {peak:.3g} TFLOP/s ", ha="right", va="bottom", fontsize=8)
    axes.text(
        (left * ridge) ** 0.5,
        (left * ridge) ** 0.5 * slope * 1.12,
        f"copy {1e3 * slope:.4g} GB/s",
        ha="right",
        va="bottom",
        fontsize=8,
    )
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


def _legend(panels) -> tuple[list, list]:
    """Every label of the panels once."""
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _tidy(axes: Axes) -> None:
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    """Aside and renamed, so that a viewer never meets half a picture."""
    aside = path.with_name(path.name + ".new")
    figure.savefig(aside, format="png")
    os.replace(aside, path)
