import math
import random

import matplotlib.image
import numpy as np
import pytest

from qlatrain.metrics.plots import plot_run, smoothed
from qlatrain.metrics.recorder import MetricsWriter


def write_run(path, steps=300, validation=True) -> None:
    rng = random.Random(0)
    with MetricsWriter(path) as writer:
        for step in range(1, steps + 1):
            loss = 1.1 + 4.4 * math.exp(-step / 60) + rng.gauss(0, 0.06)
            row = {"step": step, "loss": loss, "lr": 1e-3 * min(1, step / 20) * (1 - 0.9 * step / steps)}
            row |= {"grad_norm": 0.4 + 3 * math.exp(-step / 30) * rng.random(), "mfu": 0.41}
            row["tokens_per_second"] = 45e3 + rng.gauss(0, 900) if step > 1 else 4e3
            if step == steps // 2:
                row |= {"loss": float("nan"), "grad_norm": float("inf")}
            if step == steps // 3:
                row["loss"] = 40.0
            writer.write(row)
            if validation and step % 50 == 0:
                held_out = 1.2 + 4.4 * math.exp(-step / 60)
                bits = held_out / math.log(2)
                writer.write(
                    {
                        "step": step,
                        "validation_loss": held_out,
                        "validation_bits_per_byte": bits,
                        "bigram_bits_per_byte": 3.55,
                    }
                )


def picture(path) -> np.ndarray:
    return matplotlib.image.imread(path)[..., :3]


def has_colour(image: np.ndarray, hex_colour: str) -> bool:
    colour = np.array([int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool((np.abs(image - colour).max(axis=-1) < 0.02).sum() > 20)


def test_whole_picture(tmp_path):
    from qlatrain.metrics import plots

    write_run(tmp_path / "metrics.jsonl")
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "byte hybrid")
    image = picture(tmp_path / "loss.png")
    assert image.shape[:2] == (1040, 1300)
    for colour in (plots.TRAIN, plots.VALIDATION, plots.SECOND, plots.FAINT, plots.BASELINE):
        assert has_colour(image, colour), colour
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_baseline_is_drawn_only_when_given(tmp_path):
    from qlatrain.metrics import plots

    write_run(tmp_path / "metrics.jsonl", validation=False)
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "x")
    assert not has_colour(picture(tmp_path / "loss.png"), plots.BASELINE)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_hardly_any_rows(tmp_path, steps):
    write_run(tmp_path / "metrics.jsonl", steps=steps)
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "$unclosed")
    assert picture(tmp_path / "loss.png").std() > 0


def test_running_median():
    positions = np.arange(1000)
    falling = np.exp(-positions / 100)
    spiked = falling.copy()
    spiked[[300, 301, 700]] = 50
    # no trail behind a spike, no lag behind the curve
    assert smoothed(spiked, positions) == pytest.approx(falling, abs=0.05)
    noisy = 3 + np.random.default_rng(0).normal(size=5000)
    assert smoothed(noisy, np.arange(5000))[500:4990].std() < 0.25
