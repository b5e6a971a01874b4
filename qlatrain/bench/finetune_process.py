"""A part of the finetuning benchmark in a process of its own, so that memory and start-up are its own.

    python -m qlatrain.bench.finetune_process checkpoint|load|finetune < JOB

reads a job as JSON and tells its figures as `step_process` does. Nothing large may have been in the process that starts
it: Linux hands the peak of resident memory on to a child.
"""

import json
import resource
import runpy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from qlatrain.bench.finetune_job import OURS, FinetuneJob, write_checkpoint
from qlatrain.bench.step_process import tell_parent
from qlatrain.config import ModelConfig
from qlatrain.metrics.recorder import read_metrics
from qlatrain.models import from_pretrained

KIBIBYTE = 1024 if sys.platform != "darwin" else 1  # ru_maxrss is in kibibytes, but on macOS


def checkpoint(text: str) -> dict:
    """Writes the checkpoint. text: JSON of `model`, `folder`, `seed` and `max_shard_bytes`."""
    told = json.loads(text)
    began = time.perf_counter()
    write_checkpoint(ModelConfig(**told["model"]), Path(told["folder"]), told["seed"], told["max_shard_bytes"])
    return {"seconds": time.perf_counter() - began}


def load(text: str) -> dict:
    """Seconds from the files to float32 parameters on the device, and what the host held at most meanwhile.

    Imports and the start of CUDA come before. The files have just been written, so that they are in the page cache
    where the machine has the memory. Resident memory counts pages of a mapped file as long as it is mapped.
    """
    job = FinetuneJob.from_json(text)
    if job.side == OURS:
        load_model = partial(from_pretrained, job.checkpoint, device="cuda" if job.on_gpu else "cpu")
    else:
        from qlatrain.bench.finetune_peer import peer_loader

        load_model = peer_loader(job)
    if job.on_gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    before, began = resident_bytes(), time.perf_counter()
    model = load_model()
    if job.on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = peak_resident_bytes()
    return {
        "seconds": seconds,
        "host_before_bytes": before,
        "host_peak_bytes": peak,
        "host_growth_bytes": peak - before,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def finetune(text: str) -> dict:
    """Figures of the timed steps."""
    job = FinetuneJob.from_json(text)
    if job.side == OURS:
        figures = finetune_ours(job)
    else:
        from qlatrain.bench.finetune_peer import finetune_peer

        figures = finetune_peer(job)
    if job.on_gpu:
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return figures


def finetune_ours(job: FinetuneJob) -> dict:
    """Runs `train.py --config-name finetune` and reads the metrics and the facts that it writes."""
    train = str(Path(job.root, "train.py"))
    sys.argv = [train, "--config-name", "finetune", *job.overrides]
    began = time.perf_counter()
    runpy.run_path(train, run_name="__main__")
    whole = time.perf_counter() - began
    run_dir = Path(job.run_dir)
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]
    facts = json.loads((run_dir / "environment.json").read_text())
    seconds = [job.rows_per_step * job.row_tokens / row["tokens_per_second"] for row in rows]
    return step_figures(job, seconds, [row["loss"] for row in rows]) | {
        "backends": "; ".join(facts["backends"]),
        "note": f"the recipe, from the first import to the saved checkpoint, took {whole:.0f} s",
    }


def step_figures(job: FinetuneJob, seconds: list[float], losses: list[float]) -> dict:
    """
    Args:
        seconds: of every step, warm-up first.
        losses: of every step, or their mean alone.
    """
    timed, tokens = seconds[job.warmup :], job.rows_per_step * job.row_tokens
    assert len(timed) == job.steps, f"{len(timed)} timed steps of {job.steps}"
    return {
        "tokens_per_second": tokens / median(timed),
        "mean_tokens_per_second": tokens * len(timed) / sum(timed),
        "first_step_seconds": seconds[0],
        "warmup_seconds": sum(seconds[: job.warmup]),  # the first step included
        "mean_loss": sum(losses) / len(losses),
        "step_milliseconds": [1e3 * x for x in timed],
    }


def resident_bytes() -> int:
    """Of this process now; where the system does not say, the most so far."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    return KIBIBYTE * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


PARTS: dict[str, Callable[[str], dict]] = {"checkpoint": checkpoint, "load": load, "finetune": finetune}


def main() -> None:
    part = PARTS[sys.argv[1]]
    tell_parent(lambda tell: part(sys.stdin.read()))


if __name__ == "__main__":
    main()
