"""What of a host's memory loading a checkpoint takes, by kind, in a process of its own.

    python -m qlatrain.bench.load_process FOLDER

tells its figures as `step_process` does.
"""

import sys
import threading
import time
from pathlib import Path

import torch

from qlatrain.bench.step_process import tell_parent
from qlatrain.models import from_pretrained

STATUS = Path("/proc/self/status")  # Linux has it
KINDS = {"VmRSS": "resident", "RssAnon": "own", "RssFile": "mapped_files", "RssShmem": "page_locked_or_shared"}


def load(checkpoint: Path) -> dict:
    """Seconds, and bytes by kind before the load and how many more when most was resident."""
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
    lines = (line.split() for line in STATUS.read_text().splitlines())
    found = {words[0].removesuffix(":"): words for words in lines if words}
    return {name: 1024 * int(found[kind][1]) for kind, name in KINDS.items()}


def main() -> None:
    tell_parent(lambda tell: load(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
