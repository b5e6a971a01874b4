"""The benchmark of a load's host memory, run for real with the tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks/load_memory.py"
MEGABYTE = 1e6


def run(*arguments):
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def test_a_load_into_the_host(tmp_path):
    out = tmp_path / "folder/result.json"
    done = run("--out", str(out), "--model-config", "tiny", "--max-shard-bytes", "500000")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    checkpoint, growth, before = result["checkpoint"], result["growth_bytes"], result["before_bytes"]
    assert checkpoint["shards"] > 2 and checkpoint["largest_shard_bytes"] < checkpoint["bytes"]
    for memory in (growth, before):
        kinds = memory["own"] + memory["mapped_files"] + memory["page_locked_or_shared"]
        assert abs(kinds - memory["resident"]) < MEGABYTE
    assert checkpoint["bytes"] < growth["resident"] < 200 * MEGABYTE
    assert "MB more at the peak, the largest shard has" in done.stdout


def test_a_model_that_is_not_there(tmp_path):
    done = run("--out", str(tmp_path / "result.json"), "--model-config", "none")
    assert done.returncode == 2 and "--model-config=none is not there" in done.stderr
    assert not (tmp_path / "result.json").exists()
