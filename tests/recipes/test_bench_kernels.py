"""The benchmark as it is called on a machine without a GPU: what it prints, the files, wandb, comparison, mistakes."""

import csv
import json
import re
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from training_runs import ROOT, Finished, Running, Trainer
from wandb_file import read_wandb_file, read_wandb_summary

from qlatrain.bench.results import Results
from qlatrain.bench.tracking import COLUMNS

TINY = (
    "bench.cpu.shapes=[2x64 1/2 8/16,100 packed3 2/2 8/8]",
    "bench.cpu.backends=[tilelang,torch]",
    "bench.repeats=3",
    "bench.warmup=1",
)
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
SHAPES = ("2x64_1-2_8-16", "100_packed3_2-2_8-8")


@pytest.fixture
def bench(tmp_path):
    """Runs the recipe in a process that has torch already."""

    def run(*arguments: str) -> Finished:
        return Running(["--config-name", "bench_kernels", *arguments], tmp_path / "output", {}, None).wait()

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run directory, what was printed) of two tiny shapes, one backend that refuses, and wandb without a key."""
    folder = tmp_path_factory.mktemp("bench")
    home = folder / "home"  # where nobody has logged in
    home.mkdir()
    trainer = Trainer(folder, folder / "output")
    arguments = ["--config-name", "bench_kernels", *TINY, "track=wandb", f"run.dir={folder / 'run'}"]
    done = trainer.subprocess(*arguments, HOME=str(home), CUDA_VISIBLE_DEVICES="")
    assert done.code == 0 and done.err == "", done.err
    return folder / "run", done.out


def wandb_run(run_dir: Path) -> Path:
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return path


def test_run_directory_holds_all(run):
    run_dir, _ = run
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"config.yaml", "results.json", "results.csv", "speed.png", "roofline.png", "wandb"}
    for picture in ("speed.png", "roofline.png"):
        assert (run_dir / picture).read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["bench"]["repeats"] == 3 and config["bench"]["cpu"]["baseline"] == "torch"


def test_results(run):
    results = Results.read(run[0] / "results.json")
    assert {row.key for row in results.rows} == {
        f"gdn/{direction}/{shape}/{backend}"
        for direction in DIRECTIONS
        for shape in SHAPES
        for backend in ("tilelang", "torch")
    }
    for row in results.rows:
        if row.backend == "tilelang":
            assert row.status == "refused" and "Hopper" in row.reason and row.milliseconds is None
        else:
            assert row.status == "ok" and row.milliseconds > 0 and row.best and row.repeats == 3
            assert row.dtype == "float32" and row.reference == "token by token in float64"
    assert results.environment["versions"]["torch"] and results.ceilings.flops_per_second > 0
    with open(run[0] / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["backend"] for row in rows] == [row.backend for row in results.rows]


def test_printed_output(run):
    run_dir, out = run
    assert out.startswith("no CUDA device: bench.cpu instead, backends tilelang, torch in float32\n")
    assert len(re.findall(r"^ *\d/6  .* left \d:\d\d$", out, re.MULTILINE)) == 6
    assert len(re.findall(r"tilelang +refused: needs a Hopper GPU", out)) >= 2
    assert out.count("torch *") == 6
    assert f"results    {run_dir}/results.json" in out


def test_wandb_holds_table_charts_pictures_and_summary(run):
    run_dir, out = run
    identity, config, (row,) = read_wandb_file(wandb_run(run_dir))
    assert f"wandb: new run {identity} of project qlatrain, offline" in out
    assert config["bench"]["seed"] == 0 and config["environment"]["python"] and config["ceilings"]["bytes_how"]
    results = Results.read(run_dir / "results.json")
    files = wandb_run(run_dir).parent / "files"

    table = json.loads((files / row["rows.path"]).read_text())
    assert table["columns"] == COLUMNS
    assert table["data"] == [[asdict(found)[name] for name in COLUMNS] for found in results.rows]

    for direction in DIRECTIONS:
        chart = json.loads((files / row[f"chart/{direction}_table.path"]).read_text())
        expected = [found for found in results.rows if f"/{direction}/" in found.key and found.milliseconds]
        assert chart["data"] == [[f"{found.shape} torch", found.milliseconds] for found in expected]
        assert f"_wandb.visualize.chart/{direction}" in config

    for name in ("speed", "roofline"):
        assert (files / row[f"{name}.path"]).read_bytes() == (run_dir / f"{name}.png").read_bytes()

    group, summary = read_wandb_summary(wandb_run(run_dir))
    assert group == results.device
    milliseconds = {f"{found.key}/ms": found.milliseconds for found in results.rows if found.milliseconds}
    assert len(milliseconds) == 6 and f"gdn/fwd+bwd/{SHAPES[0]}/torch/ms" in milliseconds
    assert {key: summary[key] for key in milliseconds} == milliseconds
    assert f"gdn/bwd/{SHAPES[1]}/torch/fraction_of_floor" in summary
    assert not any("tilelang" in key for key in summary)


def test_a_run_that_is_cut_off_leaves_files_and_pictures_of_what_was_measured(tmp_path):
    run_dir = tmp_path / "run"
    shapes = "bench.cpu.shapes=[2x64 1/2 8/16,8x65536 2/2 64/64]"  # the second takes minutes
    arguments = ["--config-name", "bench_kernels", shapes, "bench.repeats=3", "bench.warmup=1", f"run.dir={run_dir}"]
    running = Running(arguments, tmp_path / "output", {}, None)
    deadline = time.monotonic() + 60
    while not (run_dir / "roofline.png").exists():
        assert running.process.is_alive() and time.monotonic() < deadline, running.err.read_text()
        time.sleep(0.01)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert {row.shape for row in Results.read(run_dir / "results.json").rows} == {"2x64 1/2 8/16"}
    for name in ("speed.png", "roofline.png"):
        assert (run_dir / name).read_bytes().endswith(b"IEND\xaeB`\x82")


def test_comparison(run, bench, tmp_path):
    run_dir, _ = run
    content = json.loads((run_dir / "results.json").read_text())
    for row in content["rows"]:
        if row["milliseconds"]:
            for name in ("milliseconds", "milliseconds_lower", "milliseconds_upper"):  # slower, and without noise
                row[name] = 1000 * row["milliseconds_upper"]
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(content))
    done = bench(f"compare=[{slow},{run_dir}/results.json]", f"run.dir={tmp_path}/run")
    assert done.code == 0 and done.err == "", done.err
    assert done.out.startswith(f"before  {slow}: ") and "faster" in done.out and "±" in done.out
    assert done.out.splitlines()[-1] == "6 faster, 0 slower, 0 within noise, 6 refused"
    assert not (tmp_path / "run").exists()


MISTAKES = [
    ("bench.cpu.shapes=[4096 16/32]", 2, "bench.cpu.shapes holds '4096 16/32', which is no shape: write B×T Hk/Hv"),
    ("bench.cpu.backends=[tourch]", 2, "bench.cpu.backends=tourch is not one of tilelang, flash_qla, fla, torch; did"),
    ("bench.operators=[gated_delta]", 2, "bench.operators=gated_delta is not one of gated_delta_rule; did you mean"),
    ("bench.cpu.baseline=fla", 2, "bench.cpu.baseline=fla is not among bench.cpu.backends=[torch]"),
    ("bench.from_model=hybrid_1b7", 1, "bench.from_model=hybrid_1b7 is not there: choose one of "),
    ("compare=[README.md,README.md]", 1, "README.md is not JSON: give a results.json of bench_kernels"),
]


@pytest.mark.parametrize(("argument", "code", "said"), MISTAKES, ids=[argument for argument, _, _ in MISTAKES])
def test_a_mistake_is_one_sentence(argument, code, said, bench, tmp_path):
    done = bench(argument, f"run.dir={tmp_path}/run")
    assert done.code == code
    assert re.fullmatch(r"error: [^\n]+\n", done.err) and done.err.startswith(f"error: {said}"), done.err
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_short():
    assert len((ROOT / "recipes" / "bench_kernels.py").read_text().splitlines()) < 150
