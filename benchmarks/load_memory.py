"""What of a host's memory loading a checkpoint takes, by kind: mapped files, memory of its own, page-locked memory.

    python benchmarks/load_memory.py --out benchmarks/results/NAME.json [--model-config qwen3_5_2b]

Makes a checkpoint of random weights in bfloat16, then loads it in a process of its own, after the imports and the start
of CUDA, onto the GPU or, without one, into the host's memory; Linux tells the kinds (/proc/self/status), read every few
milliseconds beside the load. The files have just been written, so that they are in the page cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

KINDS = {"VmRSS": "resident", "RssAnon": "own", "RssFile": "mapped_files", "RssShmem": "page_locked_or_shared"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--model-config", default="qwen3_5_2b", help="of configs/model")
    parser.add_argument("--max-shard-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--checkpoint", type=Path, help="load this one, in this process, and print what it took")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").is_file():
        sys.exit("error: this system has no /proc/self/status, which tells memory by kind: use Linux")
    if arguments.checkpoint is not None:
        print(json.dumps(load(arguments.checkpoint)))
        return
    from qlatrain.bench.finetune_job import checkpoint_sizes, write_checkpoint
    from qlatrain.bench.model_options import read_model
    from qlatrain.files import make_folder, write_json
    from qlatrain.metrics.hardware import environment

    try:
        config = read_model(ROOT / "configs" / "model", arguments.model_config, "--model-config")
    except ValueError as error:
        parser.error(str(error))
    make_folder(arguments.out.parent)
    with tempfile.TemporaryDirectory(prefix="qlatrain-load-") as folder:
        checkpoint = Path(folder, "checkpoint")
        write_checkpoint(config, checkpoint, 0, arguments.max_shard_bytes)
        command = [sys.executable, __file__, "--out", str(arguments.out), "--checkpoint", str(checkpoint)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            sys.exit(f"error: the checkpoint could not be loaded: {last}")
        result = {"kind": "qlatrain load_memory", "format": 1, "model": config.name}
        result |= {"checkpoint": checkpoint_sizes(checkpoint)} | json.loads(done.stdout.splitlines()[-1])
    write_json(arguments.out, result | {"environment": environment()})
    growth, shard = result["growth_bytes"]["resident"], result["checkpoint"]["largest_shard_bytes"]
    print(f"{growth / 1e6:,.0f} MB more at the peak, the largest shard has {shard / 1e6:,.0f} MB: {arguments.out}")


def load(checkpoint: Path) -> dict:
    """Seconds, and bytes by kind before the load and how many more when most was resident."""
    import torch

    from qlatrain.models import from_pretrained

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)
    before, finished = resident(), threading.Event()
    peak = dict(before)

    def watch() -> None:
        while not finished.is_set():
            now = resident()
            if now["resident"] > peak["resident"]:
                peak.update(now)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    from_pretrained(checkpoint, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    finished.set()
    watcher.join()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "seconds": seconds,
        "before_bytes": before,
        "growth_bytes": {kind: peak[kind] - before[kind] for kind in peak},
    }


def resident() -> dict[str, int]:
    """Bytes of this process by kind."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0].removesuffix(":"): words for words in lines if words}
    return {name: 1024 * int(found[kind][1]) for kind, name in KINDS.items()}


if __name__ == "__main__":
    main()
