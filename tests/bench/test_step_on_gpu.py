"""bench_step as it is called on a machine with a GPU, at a shape that is done in a minute or two."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SMALL = ("model=hybrid_340m", "model.num_hidden_layers=4", "bench.steps=6", "bench.profiled_steps=2")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["2x1024", "2048 packed4"])
def test_ours_and_peers(shape, tmp_path):
    arguments = [*SMALL, f"bench.shape={shape}", "bench.peers=[fla,transformers]", f"run.dir={tmp_path}/run"]
    command = [sys.executable, str(ROOT / "train.py"), "--config-name", "bench_step", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "run/results.json").read_text())
    ours, fla, transformers = content["rows"]
    assert ours["status"] == "ok", ours["reason"]
    assert fla["status"] in ("ok", "missing"), fla["reason"]
    assert transformers["status"] in ("ok", "refused"), transformers["reason"]
    assert transformers["status"] == "ok" or fla["status"] == "missing"
    for row in (row for row in content["rows"] if row["status"] == "ok"):
        assert row["mixed_precision"] == "bf16" and row["shape"] == shape
        assert row["first_loss"] == pytest.approx(math.log(32000), abs=0.5)
        assert row["tokens_per_second"] == pytest.approx(2048e3 / row["milliseconds"]) and 0 < row["mfu"] < 1
        # float32 weights, their gradients and two moments at the least
        assert 16 * row["parameters"] < row["peak_bytes"] <= row["reserved_bytes"]
        assert sum(row["step_milliseconds"]) == pytest.approx(1e3 * row["wall_seconds"], rel=0.3)
        assert row["first_step_seconds"] < row["fifth_step_seconds"]
        assert all(row["families"][name] > 0 for name in ("attention", "matrix_products", "optimizer"))
        # without fla, transformers' rule is made of matrix products and elementwise kernels
        assert row["families"]["gdn"] > 0 or (row is transformers and fla["status"] == "missing")
