"""A training step of ours beside transformers' Qwen3.5, same weights, same rows, same optimizer, on this machine.

    python benchmarks/step_vs_transformers.py --out benchmarks/results/NAME.json [--model tiny] [--repeats 15]

Steps of the two alternate, so that drift of the machine hits both alike; reported are medians. transformers' plain
PyTorch path does not know document boundaries in the GDN layers, so both get rows that are one document each.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from qlatrain.config import DataConfig, ModelConfig  # noqa: E402
from qlatrain.data import build_data  # noqa: E402
from qlatrain.files import write_json  # noqa: E402
from qlatrain.metrics.hardware import environment  # noqa: E402
from qlatrain.models import Documents, HybridForCausalLM, save_pretrained  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # as the recipe does; without it both are several times slower

    config = ModelConfig(**yaml.safe_load((ROOT / f"configs/model/{arguments.model}.yaml").read_text()))
    ours = HybridForCausalLM(config, seed=0)
    folder = Path("/tmp/qlatrain-step-vs-transformers")
    save_pretrained(ours, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    rows, length = arguments.rows, arguments.sequence_length
    with build_data(DataConfig(name="stdlib", sequence_length=length), seed=0).train as stream:
        (batch,) = stream.next_global_batch(rows)
    documents = Documents.of_lengths([length] * rows)
    labels = torch.where(batch.labels < 0, 0, batch.labels)

    def our_loss():
        return ours(batch.input_ids, documents, labels) / labels.numel()

    def their_loss():
        logits = theirs(batch.input_ids.view(rows, length)).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    runs = {}
    for name, model, loss in (("qlatrain", ours, our_loss), ("transformers", theirs, their_loss)):
        runs[name] = (torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), loss)
    seconds = {name: [] for name in runs}
    losses = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 2):
        for name, (optimizer, loss) in runs.items():
            start = time.perf_counter()
            value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            if repeat >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
            losses[name].append(value.item())
    speeds = {name: rows * length / median(times) for name, times in seconds.items()}
    apart = max(abs(a - b) for a, b in zip(losses["qlatrain"], losses["transformers"], strict=True))
    result = {
        "what": "tokens/s of forward + backward + AdamW, float32, medians of alternating steps",
        "model": arguments.model,
        "rows": rows,
        "sequence_length": length,
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
        "tokens_per_second": speeds,
        "seconds": seconds,
        "ratio": speeds["qlatrain"] / speeds["transformers"],
        "largest_difference_of_losses": apart,
        "environment": environment(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, result)
    print(json.dumps({key: result[key] for key in ("tokens_per_second", "ratio", "largest_difference_of_losses")}))


if __name__ == "__main__":
    main()
