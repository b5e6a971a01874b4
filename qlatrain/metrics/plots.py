"""`loss.png`: a run at first sight, drawn from `metrics.jsonl`."""

import math
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from qlatrain.metrics.recorder import read_metrics

TRAIN, VALIDATION, BASELINE, SECOND = "#1f6fb4", "#d1495b", "#7b4ea3", "#2a8c6a"
FAINT = "#9cc3e3"


def plot_run(metrics_path: str | Path, picture_path: str | Path, run_name: str) -> None:
    """Draws the rows of `metrics_path` (keys: see `recorder`) as a PNG at `picture_path`.

    Upper panel: training loss, each row thin and smoothed thick, and validation loss as points; a right-hand axis in
    bits per byte and the bigram baseline as a dotted line where validation rows hold them. Lower panels: learning
    rate with gradient norm, and tokens per second. Written aside and renamed, so that a viewer never meets half a
    picture. An empty file gives a picture that says so.
    """
    rows = read_metrics(metrics_path)
    figure = Figure(figsize=(10, 8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    loss, optimiser, speed = figure.subplots(3, 1, sharex=True, height_ratios=[3.2, 1.2, 1])
    _loss_panel(loss, rows)
    _optimiser_panel(optimiser, rows)
    _speed_panel(speed, rows)
    for axes in (loss, optimiser, speed):
        axes.grid(True, color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    loss.set_title(_title(run_name, rows), loc="left", fontsize=13, fontweight="bold")
    speed.set_xlabel("optimizer step")
    speed.xaxis.set_major_locator(MaxNLocator(integer=True))

    picture_path = Path(picture_path)
    aside = picture_path.with_name(picture_path.name + ".new")
    figure.savefig(aside, format="png")
    os.replace(aside, picture_path)


def _title(run_name: str, rows: list[dict]) -> str:
    """Run name, and the last figures."""
    parts = [run_name]
    for key, words in (("loss", "train loss"), ("validation_loss", "validation loss")):
        values = _series(rows, key)[1]
        if len(values):
            parts.append(f"{words} {values[-1]:.3f}")
    return "  ·  ".join(parts)


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of the rows that hold `key`, float64."""
    points = [(row["step"], row[key]) for row in rows if _finite(row.get(key))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def smoothed(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Median of about a fiftieth of `values` around each of `positions` (indices), float64.

    A median, because a spike should leave no trail behind it; centred, because an average over the past alone lies
    above a falling curve. Near the start, where loss falls fastest, the window shrinks to stay centred.
    """
    half = len(values) // 100 + 1
    windows = (values[i - min(half, i) : i + min(half, i) + 1] for i in positions)
    return np.array([np.median(window) for window in windows])


def _loss_panel(axes: Axes, rows: list[dict]) -> None:
    steps, losses = _series(rows, "loss")
    validation_steps, validation_losses = _series(rows, "validation_loss")
    axes.set_ylabel("loss (nats per token)")
    if not len(losses) and not len(validation_losses):
        axes.text(0.5, 0.5, "no steps recorded yet", transform=axes.transAxes, ha="center", color=BASELINE)
        return
    if len(losses):
        _train_curve(axes, steps, losses)
    if len(validation_losses):
        axes.plot(
            validation_steps,
            validation_losses,
            color=VALIDATION,
            marker="o",
            markersize=5,
            linewidth=1.2,
            label="validation",
        )

    factor = _bits_per_byte_factor(rows)
    bigram = _series(rows, "bigram_bits_per_byte")[1]
    if factor is not None:
        right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        right.set_ylabel("bits per byte")
        if len(bigram):
            level = bigram[-1] / factor
            label = f"byte bigram, {bigram[-1]:.2f} bits per byte"
            axes.axhline(level, color=BASELINE, linestyle=":", linewidth=1.8, label=label)
    _limit_loss_axis(axes, steps, losses, validation_losses)
    axes.legend(loc="upper right", frameon=False)


def _train_curve(axes: Axes, steps: np.ndarray, losses: np.ndarray) -> None:
    """Thin line through every row, thick line through their running median; one line while there are few rows."""
    if len(losses) < 20:
        axes.plot(steps, losses, color=TRAIN, linewidth=2, marker=".", label="train")
        return
    positions = np.unique(np.linspace(0, len(losses) - 1, 1000).astype(int))
    axes.plot(steps, losses, color=FAINT, linewidth=0.8, label="train")
    axes.plot(steps[positions], smoothed(losses, positions), color=TRAIN, linewidth=2, label="train, running median")


def _bits_per_byte_factor(rows: list[dict]) -> float | None:
    """Bits per byte for each nat per token, from the validation rows; None where they do not hold both."""
    ratios = [
        row["validation_bits_per_byte"] / row["validation_loss"]
        for row in rows
        if _finite(row.get("validation_bits_per_byte")) and _finite(row.get("validation_loss"))
        if row["validation_loss"] > 0 and row["validation_bits_per_byte"] > 0
    ]
    return float(np.median(ratios)) if ratios else None


def _limit_loss_axis(axes: Axes, steps: np.ndarray, losses: np.ndarray, validation_losses: np.ndarray) -> None:
    """Keeps a few spikes from flattening the curve: rows above the axis become triangles at its upper edge."""
    if len(losses) < 20:
        return
    # the first rows are the highest of a healthy run and must stay in
    top = max([np.quantile(losses, 0.98), np.median(losses[:5]), *validation_losses])
    bottom = min([losses.min(), *validation_losses])
    if losses.max() <= top + 0.25 * (top - bottom):
        return
    top += 0.08 * (top - bottom)
    axes.set_ylim(bottom - 0.05 * (top - bottom), top)
    spikes = losses > top
    axes.plot(
        steps[spikes],
        np.full(spikes.sum(), top),
        linestyle="none",
        marker="^",
        color=TRAIN,
        clip_on=False,
        label=f"train above the axis, highest {losses.max():.3g}",
    )


def _optimiser_panel(axes: Axes, rows: list[dict]) -> None:
    lr_steps, rates = _series(rows, "lr")
    norm_steps, norms = _series(rows, "grad_norm")
    axes.set_ylabel("learning rate", color=TRAIN)
    axes.plot(lr_steps, rates, color=TRAIN, linewidth=1.6)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.spines[["top", "left"]].set_visible(False)
    positive = norms > 0
    right.plot(norm_steps[positive], norms[positive], color=VALIDATION, linewidth=0.9, alpha=0.8)
    right.set_ylabel("gradient norm", color=VALIDATION)
    if positive.any() and norms[positive].max() > 4 * norms[positive].min():
        right.set_ylabel("gradient norm (log)", color=VALIDATION)
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        right.yaxis.set_minor_formatter(NullFormatter())


def _speed_panel(axes: Axes, rows: list[dict]) -> None:
    steps, speeds = _series(rows, "tokens_per_second")
    axes.set_ylabel("tokens/s")
    axes.plot(steps, speeds, color=SECOND, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    mfu = _series(rows, "mfu")[1]
    if len(speeds):
        label = f"median {np.median(speeds):,.0f} tokens/s"
        if len(mfu):
            label += f", MFU {100 * np.median(mfu):.1f} %"
        axes.text(0.99, 0.08, label, transform=axes.transAxes, ha="right", color=SECOND)
