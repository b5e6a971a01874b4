"""Losses of a run in bfloat16 on a GPU beside one in float32 on the CPU: the same weights, the same rows of real text.

    python benchmarks/half_beside_full.py --out benchmarks/results/NAME.json [--steps 200]

Both are `train.py` with the tiny model, its Gated DeltaNet heads widened to 64 so that Hopper kernels take them, with
AdamW at a moderate rate: at Muon's of the default recipe, with 4 rows a step, training is chaotic, and differences of
any origin grow to percents of a step's loss (docs/log.md).
Weights come from seed and name, rows from the corpus in a fixed order. Told is the largest difference of a step's
losses, as a part of the loss; a picture of both curves lies beside the result file. Without a GPU both runs are on the
CPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from qlatrain.bench.plots import save_figure  # noqa: E402
from qlatrain.files import make_folder, write_json  # noqa: E402
from qlatrain.metrics.hardware import environment  # noqa: E402
from qlatrain.metrics.recorder import read_metrics  # noqa: E402

HEADS = ("model.linear_key_head_dim=64", "model.linear_value_head_dim=64")
OPTIMIZER = ("optim=adamw", "optim.lr=5e-4", "train.global_batch_size=8", "train.micro_batch_size=8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of the config, of both runs")
    arguments = parser.parse_args()
    make_folder(arguments.out.parent)
    on_gpu = torch.cuda.is_available()
    changes = [*HEADS, *OPTIMIZER, f"train.steps={arguments.steps}", *arguments.changes]
    with tempfile.TemporaryDirectory() as folder:
        full = losses(Path(folder, "full"), [*changes, "train.mixed_precision=no"], False)
        half = losses(Path(folder, "half"), [*changes, "train.mixed_precision=bf16"], on_gpu)
    differences = [abs(a - b) / b for a, b in zip(half, full, strict=True)]
    result = {
        "kind": "qlatrain half_beside_full",
        "format": 1,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "changes": changes,
        "largest_difference": max(differences),
        "mean_difference": sum(differences) / len(differences),
        "losses": {"float32_cpu": full, "bf16_gpu" if on_gpu else "bf16_cpu": half},
        "environment": environment(),
    }
    write_json(arguments.out, result)
    plot(arguments.out.with_suffix(".png"), full, half, f"bfloat16, {result['device']}")
    print(f"largest difference of a step {max(differences):.2%}, mean {result['mean_difference']:.3%}: {arguments.out}")


def losses(run: Path, changes: list[str], on_gpu: bool) -> list[float]:
    """Of each step of a run."""
    variables = os.environ | {"ACCELERATE_USE_CPU": "false" if on_gpu else "true"}
    if not on_gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(ROOT / "train.py"), f"run.dir={run}", *changes]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1].removeprefix("error: ")
        sys.exit(f"error: {' '.join(command[1:])} failed: {reason}")
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def plot(path: Path, full: list[float], half: list[float], name: str) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(range(1, len(full) + 1), full, label="float32, CPU", linewidth=2.5, alpha=0.5)
    axes.plot(range(1, len(half) + 1), half, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
