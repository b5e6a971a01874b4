"""Measure the kernels: every backend of an operator, at every shape, checked first → tables, files, pictures, wandb."""

from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf

from qlatrain.bench.cold_start import cold_start
from qlatrain.bench.compare import print_comparison
from qlatrain.bench.config import BenchKernelsConfig
from qlatrain.bench.floors import Ceilings
from qlatrain.bench.measure import measure_shape
from qlatrain.bench.plots import plot_roofline, plot_speed
from qlatrain.bench.report import BenchReport
from qlatrain.bench.results import Results
from qlatrain.bench.shapes import parse_shape, shape_of_model
from qlatrain.bench.tracking import BenchTracker, Tracked
from qlatrain.files import make_folder, write_aside, writing
from qlatrain.metrics.console import RunConsole
from qlatrain.metrics.hardware import cpu_model, environment
from qlatrain.training.report import ConsoleLog

MODELS = Path(__file__).parent.parent / "configs" / "model"


def main(config: BenchKernelsConfig) -> None:
    console = RunConsole()
    if config.compare:
        print_comparison(config.compare, console.console)
        return
    ConsoleLog(console).attach()  # what the kernels say: which backend runs, what is being compiled

    # ---------------------------------------------------------------- where, and what
    bench, run_dir = config.bench, Path(config.run.dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        grid, device_name = bench, torch.cuda.get_device_name()
    else:
        grid, device_name = bench.cpu, cpu_model() or "cpu"
        torch.set_flush_denormal(True)  # strong decay makes products below 1e-38, which a CPU is slow with
        console.note(f"no CUDA device: bench.cpu instead, backends {', '.join(grid.backends)} in {grid.dtype}")
    if bench.from_model:
        shapes = [shape_of_model(MODELS, bench.from_model, bench.tokens, bench.batch, bench.documents)]
    else:
        shapes = [parse_shape(text) for text in grid.shapes]
    tracker = BenchTracker(config.track, config.run.name, run_dir, asdict(config))

    # ---------------------------------------------------------------- what the device can do
    make_folder(run_dir)
    write_aside(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    ceilings = Ceilings.measure(device, getattr(torch, grid.dtype))
    results = Results(device_name, [], ceilings, environment=environment(), config=asdict(config))
    pictures = {"speed": run_dir / "speed.png", "roofline": run_dir / "roofline.png"}
    report = BenchReport(console, len(shapes) * len(bench.operators), len(grid.backends))
    report.banner(config.run.name, run_dir, device_name, ceilings)

    # ---------------------------------------------------------------- what each backend does
    for operator in bench.operators:
        for shape in shapes:
            rows = measure_shape(operator, shape, grid, bench, device, ceilings, on_checked=report.checked)
            report.timed(rows)
            results.rows += rows
            results.write(run_dir)  # whatever happens later, this much is there
            with writing(run_dir):
                plot_speed(results, pictures["speed"])
                plot_roofline(results, pictures["roofline"])
        if bench.cold_start:
            able = [row.backend for row in results.rows if row.operator == operator and row.status == "ok"]
            for backend in dict.fromkeys(able):
                results.cold_starts.append(cold_start(operator, shapes[0], backend, grid.dtype, bench.seed))

    # ---------------------------------------------------------------- what came out
    results.write(run_dir)
    report.tables(results.rows, grid.baseline, results.cold_starts)
    if tracker.note:
        console.note(tracker.note)
    tracker.send(Tracked.kernels(results), pictures)
    report.files({"results": run_dir / "results.json", "table": run_dir / "results.csv", **pictures})
