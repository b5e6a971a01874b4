import json
import math

import numpy as np
import pytest
import torch

from qlatrain.metrics.recorder import MetricsWriter, read_metrics


def write(path, steps, resumed_step=None, **values):
    with MetricsWriter(path, resumed_step) as writer:
        for step in steps:
            writer.write({"step": step, **values})


def test_rows_come_back(tmp_path):
    path = tmp_path / "new folder" / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.5, "note": "größer\nzwei"}, {"step": 2, "loss": 2.0, "mfu": None, "ok": True}]
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.write(row)
            assert read_metrics(path)[-1] == row  # flushed at once
    assert read_metrics(path) == rows
    assert len(path.read_text().splitlines()) == 2


def test_resume_drops_later_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8), life=1)
    write(path, [5, 6], resumed_step=4, life=2)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["life"] for row in rows] == [1, 1, 1, 1, 2, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_new_run_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 1, 2])
    write(path, [1])
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_resume_without_a_file(tmp_path):
    write(tmp_path / "metrics.jsonl", [9], resumed_step=8)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_torn_last_line(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3], name="ü")
    path.write_bytes(path.read_bytes()[:-cut])
    # without its newline the last row is whole; without more of it, it is gone
    kept = [1, 2, 3] if cut == 1 else [1, 2]
    assert [row["step"] for row in read_metrics(path)] == kept
    write(path, [4], resumed_step=3, name="ü")
    assert [row["step"] for row in read_metrics(path)] == [*kept, 4]


def test_every_tear_is_survived(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2], name="日本", loss=1.25)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert [row["step"] for row in read_metrics(path)] in ([], [1], [1, 2])


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_nonfinite_numbers_are_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": float("nan"), "grad_norm": torch.tensor(float("inf")), "lr": 0.1})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.1,
        "nonfinite": {"loss": "nan", "grad_norm": "inf"},
    }
    (row,) = read_metrics(path)
    assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf and "nonfinite" not in row
    # and they pass a resume unchanged
    MetricsWriter(path, resumed_step=1).close()
    assert json.loads(path.read_text(), parse_constant=refuse) == raw


def test_scalars_of_numpy_and_torch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": np.int64(3), "loss": torch.tensor(0.5), "tokens": np.int32(7)})
    assert read_metrics(path) == [{"step": 3, "loss": 0.5, "tokens": 7}]


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": 1.5}, {"step": True}, {"step": 1, "x": [1, 2]}])
def test_bad_rows(tmp_path, row):
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="metric"):
        writer.write(row)
    assert read_metrics(tmp_path / "m.jsonl") == []
