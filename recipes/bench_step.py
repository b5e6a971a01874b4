"""Measure a whole training step: our model, then peers, each in its own process → tables, files, picture, wandb."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from qlatrain.bench.model_options import read_model
from qlatrain.bench.shapes import parse_batch
from qlatrain.bench.step_config import BenchStepConfig
from qlatrain.bench.step_job import OURS, StepJob
from qlatrain.bench.step_models import missing
from qlatrain.bench.step_plot import plot_step
from qlatrain.bench.step_report import StepReport
from qlatrain.bench.step_results import NotMeasured, StepResults, StepRow, compare
from qlatrain.bench.step_run import measure_in_process
from qlatrain.bench.tracking import BenchTracker, Tracked
from qlatrain.files import make_folder, write_aside, writing
from qlatrain.metrics.console import RunConsole
from qlatrain.metrics.flops import FlopCounter
from qlatrain.metrics.hardware import cpu_model, environment, peak_flops

MODELS = Path(__file__).parent.parent / "configs" / "model"


def main(config: BenchStepConfig) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench_step measures one device: start it with python, not with accelerate launch")
    console = RunConsole()

    # ---------------------------------------------------------------- where, and what
    bench, run_dir = config.bench, Path(config.run.dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, shape, train = config.model, bench.shape, config.train
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name()
    else:
        device_name = cpu_model() or "cpu"
        model, shape = read_model(MODELS, bench.cpu.model, "bench.cpu.model"), bench.cpu.shape
        train = replace(train, mixed_precision=bench.cpu.mixed_precision)
        console.note(f"no CUDA device: bench.cpu instead, {model.name} at {shape}")
    of_peers = replace(train, activation_checkpointing=train.activation_checkpointing or bench.checkpoint_peers)
    jobs = [
        StepJob(
            name=name,
            on_gpu=device.type == "cuda",
            shape=str(parse_batch(shape)),
            model=model,
            train=train if name == OURS else of_peers,
            optim=config.optim,
            kernel=config.kernel,
            steps=bench.steps,
            warmup=bench.warmup,
            profiled_steps=bench.profiled_steps,
            seed=bench.seed,
        )
        for name in (OURS, *bench.peers)
    ]
    tracker = BenchTracker(config.track, config.run.name, run_dir, asdict(config))

    # ---------------------------------------------------------------- what the device can do
    make_folder(run_dir)
    write_aside(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    peak, how = peak_flops(device, torch.bfloat16 if train.mixed_precision == "bf16" else torch.float32)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory is for the processes below
    results = StepResults(device_name, [], peak, how, environment(), asdict(config))
    report, batch = StepReport(console, len(jobs)), jobs[0].batch_shape
    length = batch.tokens / (batch.documents or 1)
    report.banner(config.run.name, run_dir, results, jobs[0], FlopCounter(model).table(length))

    if bench.peers and bench.checkpoint_peers:
        console.note("peers keep the inputs of their layers alone and compute the rest anew: bench.checkpoint_peers")

    # ---------------------------------------------------------------- what each model does
    for job in jobs:
        if reason := missing(job.name):
            row = StepRow.of(job, status="missing", reason=reason)
        else:
            log = run_dir / f"{job.name}.log"
            row = measure_in_process(
                job, peak, log, lambda event, job=job: report.event(job, event), bench.empty_caches
            )
        results.rows.append(row)
        compare(results.rows)
        results.write(run_dir)  # whatever happens later, this much is there
        report.done(row)

    # ---------------------------------------------------------------- what came out
    pictures = {"step": run_dir / "step.png"}
    with writing(run_dir):
        plot_step(results, pictures["step"])
    report.tables(results)
    if tracker.note:
        console.note(tracker.note)
    tracker.send(Tracked.step(results), pictures)
    report.files({"results": run_dir / "results.json", "table": run_dir / "results.csv", **pictures})
    ours = results.rows[0]
    if ours.status != "ok":
        raise NotMeasured(f"{OURS} could not be measured: {ours.reason}; {run_dir / f'{OURS}.log'} has the rest")
