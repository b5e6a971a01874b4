"""Runs of train.py with a model of 30 thousand parameters over a few small text files.

Most are forked from a process that has imported torch already, which saves two thirds of their time. Each is still a
process of its own, with its own signals, exit code and output. `Trainer.subprocess` runs the plain command.
"""

import json
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TRAIN = str(ROOT / "train.py")
TINY = (
    "data=text",
    "data.sequence_length=64",
    "data.validation_fraction=0.2",
    "data.workers=0",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.layer_pattern=[gdn,attn]",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.head_dim=16",
    "model.linear_num_key_heads=1",
    "model.linear_num_value_heads=2",
    "model.linear_key_head_dim=16",
    "model.linear_value_head_dim=16",
    "train.steps=12",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "schedule.warmup_steps=2",
    "checkpoint.every=4",
    "validation.every=0",
    "validation.rows=4",
    "sample.tokens=5",
    "sample.prompts=[the]",
)
QUIET = {"HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true"}
MEASURED = ("tokens_per_second", "mfu")  # what no two runs have in common
SECONDS = 120  # that a run may take


def write_corpus(folder: Path, documents: int = 12) -> Path:
    for i in range(documents):
        lines = (f"document {i} line {j}: the fox {i * j} jumps over {i + j} dogs\n" for j in range(20 + 3 * i))
        (folder / f"{i:02}.txt").write_text("".join(lines))
    return folder


def environment() -> dict[str, str]:
    """For a process that computes in one thread of the CPU, finds the packages, and reaches no network."""
    packages = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "QLATRAIN_"))}
    return kept | {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | QUIET


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


class Running:
    """A run in a process of its own."""

    def __init__(self, arguments: list[str], output: Path, variables: dict[str, str], file_limit: int | None):
        output.mkdir(parents=True, exist_ok=True)
        self.out, self.err = output / "out", output / "err"
        self.process = _forkserver().Process(
            target=_train, args=(arguments, str(self.out), str(self.err), variables, file_limit)
        )
        self.process.start()

    def send(self, signal: int) -> None:
        os.kill(self.process.pid, signal)

    def wait(self, seconds: float = SECONDS) -> Finished:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.out.read_text()[-2000:]}"
        return Finished(self.process.exitcode, self.out.read_text(), self.err.read_text())

    def wait_for_step(self, run_dir: Path, step: int) -> bool:
        """Until step `step` is in metrics.jsonl; False when the run ended before."""
        deadline = time.monotonic() + SECONDS
        while self.process.is_alive():
            rows = losses(run_dir)
            if rows and max(rows) >= step:
                return True
            assert time.monotonic() < deadline, f"no step {step} within {SECONDS} s"
            time.sleep(0.002)
        return False


class Trainer:
    """Runs train.py over `corpus`; what the runs print goes to folders under `output`."""

    def __init__(self, corpus: Path, output: Path):
        self.corpus, self.output = corpus, output
        self._started: list[Running] = []

    def arguments(self, run_dir: Path, *changes: str) -> list[str]:
        return [*TINY, f"data.files=[{self.corpus}/*.txt]", f"run.dir={run_dir}", *changes]

    def start(self, run_dir: Path, *changes: str, file_limit: int | None = None, **variables: str) -> Running:
        """file_limit: bytes a file may have, as on a disk that is full."""
        return self._start(self.arguments(run_dir, *changes), variables, file_limit)

    def recipe(self, name: str, *arguments: str) -> Finished:
        """Another recipe, with these arguments alone."""
        return self._start(["--config-name", name, *arguments], {}, None).wait()

    def _start(self, arguments: list[str], variables: dict[str, str], file_limit: int | None) -> Running:
        running = Running(arguments, self.output / str(len(self._started)), variables, file_limit)
        self._started.append(running)
        return running

    def run(self, run_dir: Path, *changes: str, **options) -> Finished:
        return self.start(run_dir, *changes, **options).wait()

    def start_pair(self, run_dir: Path, *changes: str) -> list[Running]:
        """Two processes of one run, with the variables that `accelerate launch` and torchrun set."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [self.start(run_dir, *changes, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]

    def subprocess(self, *arguments: str, before: tuple[str, ...] = (), **variables: str) -> Finished:
        """The plain command, its arguments as they are."""
        command = [sys.executable, *before, TRAIN, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=SECONDS
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def end_all(self) -> None:
        for running in self._started:
            if running.process.is_alive():
                running.process.kill()
            running.process.join()


def _forkserver():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "recipes.pretrain",
            "recipes.finetune",
            "recipes.export",
            "recipes.bench_kernels",
            "recipes.bench_step",
            "transformers.tokenization_utils_tokenizers",
            "hydra.main",
        ]
    )
    before = dict(os.environ)
    os.environ.update(environment())  # the server keeps the variables it was started with, and never starts again
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _train(arguments: list[str], out: str, err: str, variables: dict[str, str], file_limit: int | None) -> None:
    """In the new process: `python train.py ARGUMENTS`."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.environ.update(variables)
    os.chdir(ROOT)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [TRAIN, *arguments]
    runpy.run_path(TRAIN, run_name="__main__")


def metric_rows(run_dir: Path) -> list[dict]:
    """Whole lines of metrics.jsonl, numbers as the text that stands there."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line, parse_float=str, parse_int=str) for line in lines]


def losses(run_dir: Path) -> dict[int, str]:
    """Step → the text of its loss."""
    return {int(row["step"]): row["loss"] for row in metric_rows(run_dir) if "loss" in row}


def repeatable(run_dir: Path) -> list[dict]:
    """The rows without what is measured."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in metric_rows(run_dir)]


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def checkpoint_names(run_dir: Path) -> list[str]:
    """All that lies in the folder of checkpoints, hidden ones too."""
    folder = run_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
