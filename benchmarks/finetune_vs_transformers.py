"""Full finetuning by our recipe beside transformers' Trainer: one checkpoint, the same rows, one after the other.

    python benchmarks/finetune_vs_transformers.py --out benchmarks/results/NAME.json [--model-config qwen3_5_2b]

Makes a checkpoint of random weights (bfloat16, in shards) and a file of conversations, then measures for each side, in
processes of their own: the time from the files to float32 parameters on the device and the host memory it takes, and
tokens/s of finetuning, of the median step, all tokens of a row counted. Ours is `train.py --config-name finetune`.
Where the rows of a step do not fit into memory at once, a side takes half as many at a time and accumulates.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.table import Table  # noqa: E402

from qlatrain.bench.finetune_job import OURS, PEER, FinetuneJob, checkpoint_sizes, write_conversations  # noqa: E402
from qlatrain.bench.model_options import read_model  # noqa: E402
from qlatrain.bench.step_models import missing  # noqa: E402
from qlatrain.bench.step_run import last_event  # noqa: E402
from qlatrain.files import make_folder, write_json  # noqa: E402
from qlatrain.metrics.console import RunConsole  # noqa: E402
from qlatrain.metrics.hardware import cpu_model, environment  # noqa: E402

KIND, FORMAT = "qlatrain finetune_vs_transformers", 1
OUT_OF_MEMORY = "^out of memory|CUDA.*out of memory|ALLOC_FAILED"  # of the GPU
PROCESS = "qlatrain.bench.finetune_process"
HELD_OUT_STEPS = 30  # steps of tokens whose twentieth, which the recipe holds out, fills the rows of a pass


def main() -> None:
    arguments = parse_arguments()
    console, on_gpu = RunConsole(), torch.cuda.is_available()
    make_folder(arguments.out.parent)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="qlatrain-finetune-"))
    make_folder(folder)
    try:
        sides = measure(arguments, folder, on_gpu, console)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    if sides[OURS]["finetune"]["status"] != "ok":
        sys.exit(f"error: {OURS} could not be measured: {sides[OURS]['finetune']['reason']}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--model-config", default="qwen3_5_2b", help="of configs/model")
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--micro-rows", type=int, help="rows that ours takes at once to begin with (all of a step)")
    parser.add_argument("--peer-micro-rows", type=int, help="the same for the peer")
    parser.add_argument("--steps", type=int, default=20, help="timed")
    parser.add_argument("--warmup", type=int, default=5, help="steps before")
    parser.add_argument("--load-repeats", type=int, default=3, help="loads, of which the fastest counts")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="ours: train.compile")
    parser.add_argument("--peers", choices=("none", PEER), default=PEER)
    parser.add_argument(
        "--folder", type=Path, help="for checkpoint, runs and logs, and kept; a checkpoint is used again"
    )
    parser.add_argument("--max-shard-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        arguments.config = read_model(ROOT / "configs" / "model", arguments.model_config, "--model-config")
    except ValueError as error:
        parser.error(str(error))
    for name in ("rows_per_step", "row_tokens", "steps", "warmup", "load_repeats", "max_shard_bytes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    for name in ("micro_rows", "peer_micro_rows"):
        rows = getattr(arguments, name) or arguments.rows_per_step
        setattr(arguments, name, rows)
        if rows < 1 or arguments.rows_per_step % rows:
            parser.error(f"--{name.replace('_', '-')} {rows} does not divide --rows-per-step {arguments.rows_per_step}")
    return arguments


def measure(arguments: argparse.Namespace, folder: Path, on_gpu: bool, console: RunConsole) -> dict:
    """Figures by side, written to the result file as they come."""
    # ---------------------------------------------------------------- a checkpoint and conversations
    config = arguments.config
    checkpoint, conversations = folder / f"checkpoint-{config.name}", folder / "conversations.jsonl"
    if not checkpoint.is_dir():
        told = {"model": asdict(config), "folder": str(checkpoint), "seed": arguments.seed}
        made = run_part("checkpoint", told | {"max_shard_bytes": arguments.max_shard_bytes}, False, folder)
        if made["status"] != "ok":
            sys.exit(f"error: the checkpoint could not be made: {made['reason']}")
        console.note(f"checkpoint of {config.name} made in {made['seconds']:.0f} s")
    steps = max(1.25 * (arguments.warmup + arguments.steps), HELD_OUT_STEPS)
    tokens = int(steps * arguments.rows_per_step * arguments.row_tokens)
    count = write_conversations(conversations, tokens, arguments.row_tokens, arguments.seed)
    job = FinetuneJob(
        side=OURS,
        root=str(ROOT),
        checkpoint=str(checkpoint.resolve()),
        conversations=str(conversations.resolve()),
        run_dir="",
        on_gpu=on_gpu,
        row_tokens=arguments.row_tokens,
        rows_per_step=arguments.rows_per_step,
        micro_rows=arguments.micro_rows,
        warmup=arguments.warmup,
        steps=arguments.steps,
        compile=arguments.compile,
        seed=arguments.seed,
    )
    result = {
        "kind": KIND,
        "format": FORMAT,
        "device": torch.cuda.get_device_name() if on_gpu else cpu_model() or "cpu",
        "model": config.name,
        "checkpoint": checkpoint_sizes(checkpoint),
        "conversations": count,
        "rows_per_step": arguments.rows_per_step,
        "row_tokens": arguments.row_tokens,
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "mixed_precision": job.mixed_precision,
        "compile": arguments.compile,
        "sides": {},
        "ratio": None,
        "environment": environment(),
    }

    # ---------------------------------------------------------------- each side
    starts = {OURS: arguments.micro_rows} | ({} if arguments.peers == "none" else {PEER: arguments.peer_micro_rows})
    sides = result["sides"] = {name: {"load": {}, "finetune": {}} for name in starts}

    def keep(name: str, part: str, figures: dict) -> None:
        sides[name][part] = figures
        write_json(arguments.out, result)  # whatever happens later, this much is there
        console.note(f"{name} {part}: {figures['reason'] or 'done'}")

    loads = {name: [] for name in starts}
    for _ in range(arguments.load_repeats):
        for name, seen in loads.items():
            seen.append(run_part("load", asdict(replace(job, side=name)), on_gpu, folder, name))
            keep(name, "load", fastest(seen))
    for name, micro_rows in starts.items():
        keep(name, "finetune", finetune(replace(job, side=name, micro_rows=micro_rows), folder))
    speeds = [side["finetune"].get("tokens_per_second") for side in sides.values()]
    if len(speeds) == 2 and all(speeds):
        result["ratio"] = speeds[0] / speeds[1]
    write_json(arguments.out, result)
    report(result, console)
    console.note(f"results    {arguments.out}")
    return sides


def fastest(loads: list[dict]) -> dict:
    """The load least held up by other work of the machine; one that failed where there is any."""
    failed = next((load for load in loads if load["status"] != "ok"), None)
    return failed or min(loads, key=lambda load: load["seconds"]) | {"all_seconds": [load["seconds"] for load in loads]}


def finetune(job: FinetuneJob, folder: Path) -> dict:
    """Figures of the most rows at once that fit into memory; `attempts` has the reasons why more did not."""
    attempts = []
    while True:
        run_dir = (folder / f"run-{job.side}-{job.micro_rows}").resolve()
        shutil.rmtree(run_dir, ignore_errors=True)
        job = replace(job, run_dir=str(run_dir))
        figures = run_part("finetune", asdict(job), job.on_gpu, folder, job.side)
        for heavy in ("checkpoints", "model"):  # dozens of gigabytes
            shutil.rmtree(run_dir / heavy, ignore_errors=True)
        if not re.search(OUT_OF_MEMORY, figures["reason"]) or job.micro_rows == 1:
            return figures | {"micro_rows": job.micro_rows, "attempts": attempts}
        attempts.append({"micro_rows": job.micro_rows, "reason": figures["reason"]})
        smaller = (rows for rows in range(job.micro_rows // 2, 0, -1) if job.rows_per_step % rows == 0)
        job = replace(job, micro_rows=next(smaller))


def run_part(part: str, told: dict, on_gpu: bool, folder: Path, side: str = "") -> dict:
    """Figures with a `status`, ok, missing, refused or failed, and where it is not ok a `reason`."""
    if side and (reason := missing(side)):
        return {"status": "missing", "reason": reason}
    one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    log = folder / (f"{part}-{side}.log" if side else f"{part}.log")
    found = last_event(PROCESS, (part,), json.dumps(told), on_gpu, log, lambda event: None, one_gpu)
    event = found.pop("event")
    return {"status": "ok" if event == "measured" else event, "reason": found.pop("reason", ""), **found}


def report(result: dict, console: RunConsole) -> None:
    """A line for each side, and what there is to say of it."""
    rows = f"{result['rows_per_step']} rows of {result['row_tokens']:,} tokens a step"
    sizes = result["checkpoint"]
    table = Table(
        title=f"finetuning {result['model']}, {rows}, {result['steps']} steps, on {result['device']}; the checkpoint: "
        f"{gigabytes(sizes['bytes'])}, its largest shard {gigabytes(sizes['largest_shard_bytes'])}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in (
        "load",
        "host memory for it",
        "rows at once",
        "tokens/s",
        "mean",
        "1st step",
        "peak of GPU",
        "loss",
    ):
        table.add_column(heading, justify="right")
    for name, side in result["sides"].items():
        load, steps = side["load"], side["finetune"]
        cells = [load["status"], ""]
        if load["status"] == "ok":
            cells = [f"{load['seconds']:.2f} s", gigabytes(load["host_growth_bytes"])]
        if steps["status"] == "ok":
            peak = steps.get("peak_bytes")
            cells += [str(steps["micro_rows"]), f"{steps['tokens_per_second']:,.0f}"]
            cells += [f"{steps['mean_tokens_per_second']:,.0f}", f"{steps['first_step_seconds']:.1f} s"]
            cells += [gigabytes(peak) if peak else "", f"{steps['mean_loss']:.4f}"]
        else:
            cells += ["", steps["status"]]
        table.add_row(name, *cells)
    console.console.print(table)
    if result["ratio"]:
        console.note(f"{OURS} is {result['ratio']:.2f}× {PEER}")
    for name, side in result["sides"].items():
        for said in (side["load"]["reason"], side["finetune"]["reason"], side["finetune"].get("note")):
            if said:
                console.note(f"{name}: {said}")


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB"


if __name__ == "__main__":
    main()
