import numpy as np
import pytest
from bench_helpers import made_up_results, made_up_row
from matplotlib.image import imread

from qlatrain.bench.plots import plot_roofline, plot_speed


@pytest.mark.parametrize("plot", [plot_speed, plot_roofline])
def test_a_picture_with_every_backend_in_it(plot, tmp_path):
    path = tmp_path / "picture.png"
    plot(made_up_results(), path)
    picture = imread(path)[..., :3]
    assert picture.shape[0] > 500 and picture.shape[1] > 800
    for color in ((0xD1, 0x49, 0x5B), (0x1F, 0x6F, 0xB4), (0x7B, 0x4E, 0xA3)):
        distance = np.abs(picture - np.array(color) / 255).max(-1)
        assert (distance < 0.35).sum() > 100
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("plot", [plot_speed, plot_roofline])
def test_nothing_right_is_a_picture_too(plot, tmp_path):
    results = made_up_results()
    results.rows = [made_up_row(backend=name, ms=None, status="failed") for name in ("fla", "torch")]
    plot(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
