"""The benchmark of losses in half precision beside float32, run for real for a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks/half_beside_full.py"


def test_a_run_on_a_cpu(tmp_path):
    out = tmp_path / "folder/result.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--out",
        str(out),
        "--steps",
        "3",
        "validation.rows=4",
        "data.sequence_length=128",
        "schedule.warmup_steps=1",
    ]
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    full, half = result["losses"]["float32_cpu"], result["losses"]["bf16_cpu"]
    assert len(full) == len(half) == 3 and full[0] > 4
    assert full != half and half == pytest.approx(full, rel=0.02)
    assert result["largest_difference"] == max(abs(a - b) / b for a, b in zip(half, full, strict=True)) < 0.02
    assert (tmp_path / "folder/result.png").stat().st_size > 10_000
    assert "largest difference of a step" in done.stdout


def test_a_run_that_fails_is_one_sentence(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "x.json"), "train.stepz=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.startswith("error: ") and "stepz" in done.stderr
    assert not (tmp_path / "x.json").exists()
