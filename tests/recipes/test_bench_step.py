"""The benchmark of a step as it is called on a machine without a GPU: what it prints, the files, wandb, mistakes."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from training_runs import ROOT, Finished, Running
from wandb_file import read_wandb_file, read_wandb_summary

from qlatrain.bench.tracking import STEP_COLUMNS
from qlatrain.config import ModelConfig
from qlatrain.metrics.flops import FlopCounter
from qlatrain.metrics.kernel_times import FAMILIES

SMALL = ("bench.cpu.shape=2x64", "bench.steps=4", "bench.profiled_steps=2", "bench.peers=[fla,transformers]")
TOKENS = 2 * 64


@pytest.fixture
def bench(tmp_path):
    """Runs the recipe in a process that has torch already, and no GPU."""

    def run(*arguments: str, **variables: str) -> Finished:
        variables["CUDA_VISIBLE_DEVICES"] = ""
        return Running(["--config-name", "bench_step", *arguments], tmp_path / "output", variables, None).wait()

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run directory, what was printed) of the tiny model, beside a peer that is there and one that is not."""
    folder = tmp_path_factory.mktemp("bench")
    home = folder / "home"  # where nobody has logged in
    home.mkdir()
    arguments = ["--config-name", "bench_step", *SMALL, "track=wandb", f"run.dir={folder / 'run'}"]
    done = Running(arguments, folder / "output", {"HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}, None).wait()
    assert done.code == 0 and done.err == "", done.err
    return folder / "run", done.out


@pytest.fixture(scope="module")
def content(run) -> dict:
    return json.loads((run[0] / "results.json").read_text())


@pytest.fixture(scope="module")
def rows(content) -> dict[str, dict]:
    return {row["model"]: row for row in content["rows"]}


def test_run_directory_holds_all(run):
    names = {path.name for path in run[0].iterdir()}
    logs = {"qlatrain.log", "transformers.log"}
    assert names == {"config.yaml", "results.json", "results.csv", "step.png", "wandb"} | logs
    assert (run[0] / "step.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((run[0] / "config.yaml").read_text())
    assert config["bench"]["steps"] == 4 and config["bench"]["peers"] == ["fla", "transformers"]


def test_figures_hold_together(content, rows):
    """The rows of ours and of transformers, which is the same model."""
    model = ModelConfig(**yaml.safe_load((ROOT / "configs/model/tiny.yaml").read_text()))
    counter = FlopCounter(model)
    for name in ("qlatrain", "transformers"):
        row = rows[name]
        assert row["status"] == "ok" and row["shape"] == "2x64" and row["mixed_precision"] == "no"
        assert row["parameters"] == counter.parameters.total and row["flops"] == counter.step_flops([64, 64])
        assert row["tokens_per_second"] == pytest.approx(TOKENS / row["milliseconds"] * 1e3)
        assert row["mfu"] == pytest.approx(row["flops"] / row["milliseconds"] * 1e3 / content["peak_flops"])
        assert row["milliseconds_lower"] <= row["milliseconds"] <= row["milliseconds_upper"]
        assert len(row["step_milliseconds"]) == row["steps"] == 4
        assert min(row["step_milliseconds"]) <= row["milliseconds"] <= max(row["step_milliseconds"])
        assert sum(row["step_milliseconds"]) <= 1e3 * row["wall_seconds"]
        assert 0 < row["build_seconds"] < row["first_step_seconds"] < row["fifth_step_seconds"]
        assert set(row["families"]) == set(FAMILIES)
        assert sum(row["families"].values()) == pytest.approx(row["profiled_milliseconds"])
        assert row["profiled_milliseconds"] > 0.2 * row["milliseconds"]
        assert all(row["families"][family] > 0 for family in ("attention", "matrix_products", "optimizer"))
        assert 10e6 < row["peak_bytes"] < 100e9 and row["reserved_bytes"] is None
        assert row["first_loss"] == pytest.approx(math.log(model.vocab_size), abs=0.2)  # random tokens, nothing learnt
        assert row["last_loss"] != row["first_loss"]
    assert rows["qlatrain"]["families"]["gdn"] > 0 and rows["qlatrain"]["ours_is"] == 1
    assert "gated_delta_rule: backend torch on cpu" in rows["qlatrain"]["backends"]
    ratio = rows["qlatrain"]["tokens_per_second"] / rows["transformers"]["tokens_per_second"]
    assert rows["transformers"]["ours_is"] == pytest.approx(ratio)
    assert "gated delta rule in plain PyTorch" in rows["transformers"]["note"]


def test_a_peer_that_is_missing_is_a_row(run, rows):
    row, reason = rows["fla"], "flash-linear-attention is not installed: pip install flash-linear-attention"
    assert row["status"] == "missing" and row["reason"] == reason
    assert row["tokens_per_second"] is None and row["families"] == {}
    assert f"fla missing: {reason}" in run[1]


def test_environment_and_table(run, content):
    assert content["kind"] == "qlatrain bench_step" and content["environment"]["versions"]["torch"]
    assert content["config"]["bench"]["cpu"]["model"] == "tiny" and "measured on" in content["peak_how"]
    with open(run[0] / "results.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["model"] for row in table] == ["qlatrain", "fla", "transformers"]
    for cells, row in zip(table, content["rows"], strict=True):
        assert cells["tokens_per_second"] == ("" if row["status"] != "ok" else str(row["tokens_per_second"]))
        assert cells["gdn_milliseconds"] == str(row["families"].get("gdn", ""))


def test_printed_output(run, rows):
    run_dir, out = run
    assert out.startswith("no CUDA device: bench.cpu instead, tiny at 2x64\n")
    for number, name in ((1, "qlatrain"), (3, "transformers")):
        assert re.search(rf"^{number}/3  {name} +first step after \d+\.\d s$", out, re.MULTILINE)
        assert re.search(rf"^{number}/3  {name} +fifth step after .* left \d:\d\d$", out, re.MULTILINE)
        speed = f"{rows[name]['tokens_per_second']:,.0f}"
        assert re.search(rf"^{number}/3  {name} +{speed} tokens/s, MFU .* left \d:\d\d$", out, re.MULTILINE)
    assert f"{rows['transformers']['ours_is']:.2f}×" in out
    assert "the import of libraries before it is not in it" in out and "matrix products" in out
    assert f"results    {run_dir}/results.json" in out


def test_wandb_holds_table_chart_picture_and_summary(run, content):
    run_dir, _ = run
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    _, config, (row,) = read_wandb_file(path)
    assert config["peak_flops"] == content["peak_flops"] and config["environment"]["python"]
    files = path.parent / "files"
    table = json.loads((files / row["rows.path"]).read_text())
    assert table["columns"] == STEP_COLUMNS
    assert table["data"] == [[found[name] for name in STEP_COLUMNS] for found in content["rows"]]
    chart = json.loads((files / row["chart/tokens_per_second_table.path"]).read_text())
    timed = [found for found in content["rows"] if found["status"] == "ok"]
    assert chart["data"] == [[found["model"], found["tokens_per_second"]] for found in timed]
    assert (files / row["step.path"]).read_bytes() == (run_dir / "step.png").read_bytes()
    group, summary = read_wandb_summary(path)
    assert group == content["device"]
    for found in timed:
        key = f"step/tiny/2x64/{found['model']}"
        assert summary[f"{key}/tokens_per_second"] == found["tokens_per_second"]
        assert summary[f"{key}/kernel_times/optimizer_ms"] == found["families"]["optimizer"]
    assert not any("/fla/" in key for key in summary)


MISTAKES = [
    ("bench.shape=4096", 2, "bench.shape=4096 is no batch: write B×T or T packedN: 2x4096, 32768 packed16"),
    ("bench.cpu.shape=4 packed5", 2, "bench.cpu.shape=4 packed5: 5 documents need at least 5 tokens"),
    ("bench.peers=[transformer]", 2, "bench.peers=transformer is not one of fla, transformers; did you mean"),
    ("model=hybrid_1b7", 2, "model=hybrid_1b7 is not there: choose one of "),
    ("bench.cpu.model=tinny", 1, "bench.cpu.model=tinny is not there: choose one of "),
]


@pytest.mark.parametrize(("argument", "code", "said"), MISTAKES, ids=[argument for argument, _, _ in MISTAKES])
def test_a_mistake_is_one_sentence(argument, code, said, bench, tmp_path):
    done = bench(argument, f"run.dir={tmp_path}/run")
    assert done.code == code
    assert re.fullmatch(r"error: [^\n]+\n", done.err) and done.err.startswith(f"error: {said}"), done.err
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(bench, tmp_path):
    done = bench(f"run.dir={tmp_path}/run", WORLD_SIZE="2")
    said = "error: bench_step measures one device: start it with python, not with accelerate launch\n"
    assert (done.code, done.err) == (1, said) and not (tmp_path / "run").exists()


def test_ours_that_cannot_run_is_a_row_and_an_error(bench, tmp_path):
    done = bench("kernel.gated_delta_rule=tilelang", "bench.peers=[fla]", f"run.dir={tmp_path}/run")
    said = "backend='tilelang' of gated_delta_rule cannot run here: needs a Hopper GPU"
    assert done.code == 1 and done.err.startswith(f"error: qlatrain could not be measured: {said}"), done.err
    assert re.fullmatch(r"error: [^\n]+\n", done.err)
    ours, theirs = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    assert ours["status"] == "failed" and ours["reason"].startswith(said)
    assert theirs["status"] == "missing" and theirs["ours_is"] is None
    assert (tmp_path / "run/step.png").exists()
    assert "Traceback" in (tmp_path / "run/qlatrain.log").read_text()


def test_the_recipe_is_short():
    assert len(Path(ROOT / "recipes" / "bench_step.py").read_text().splitlines()) < 150
