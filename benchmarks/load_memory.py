"""What of a host's memory loading a checkpoint takes, by kind: mapped files, memory of its own, page-locked memory.

    python benchmarks/load_memory.py --out benchmarks/results/NAME.json [--model-config qwen3_5_2b]

Makes a checkpoint of random weights in bfloat16, then loads it in a process of its own, after the imports and the start
of CUDA, onto the GPU or, without one, into the host's memory; Linux tells the kinds (/proc/self/status), read every few
milliseconds beside the load. The files have just been written, so that they are in the page cache.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from qlatrain.bench.finetune_job import checkpoint_sizes, write_checkpoint  # noqa: E402
from qlatrain.bench.load_process import STATUS  # noqa: E402
from qlatrain.bench.model_options import read_model  # noqa: E402
from qlatrain.bench.step_run import last_event  # noqa: E402
from qlatrain.files import make_folder, write_json  # noqa: E402
from qlatrain.metrics.hardware import environment  # noqa: E402

PROCESS = "qlatrain.bench.load_process"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--model-config", default="qwen3_5_2b", help="of configs/model")
    parser.add_argument("--max-shard-bytes", type=int, default=1_000_000_000)
    arguments = parser.parse_args()
    if not STATUS.is_file():
        sys.exit(f"error: this system has no {STATUS}, which tells memory by kind: use Linux")
    try:
        config = read_model(ROOT / "configs" / "model", arguments.model_config, "--model-config")
    except ValueError as error:
        parser.error(str(error))
    make_folder(arguments.out.parent)
    with tempfile.TemporaryDirectory(prefix="qlatrain-load-") as folder:
        checkpoint = Path(folder, "checkpoint")
        write_checkpoint(config, checkpoint, 0, arguments.max_shard_bytes)
        log = Path(folder, "load.log")
        found = last_event(PROCESS, (str(checkpoint),), "", torch.cuda.is_available(), log, lambda event: None, {})
        if found.pop("event") != "measured":
            sys.exit(f"error: the checkpoint could not be loaded: {found['reason']}")
        result = {"kind": "qlatrain load_memory", "format": 1, "model": config.name}
        result |= {"checkpoint": checkpoint_sizes(checkpoint)} | found
    write_json(arguments.out, result | {"environment": environment()})
    growth, shard = result["growth_bytes"]["resident"], result["checkpoint"]["largest_shard_bytes"]
    print(f"{growth / 1e6:,.0f} MB more at the peak, the largest shard has {shard / 1e6:,.0f} MB: {arguments.out}")


if __name__ == "__main__":
    main()
