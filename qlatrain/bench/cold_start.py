"""The first forward and backward of a fresh process: with empty caches, then with what that one left in them.

    python -m qlatrain.bench.cold_start OPERATOR "SHAPE" BACKEND DTYPE SEED

is that process; it prints one line of JSON. Counted is from the import of the backend to the end of the backward on the
device; the start of Python, the import of torch and the start of CUDA are not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qlatrain.bench.shapes import Shape, parse_shape

# where compilers keep what they made; the home directory moves too, for those that know no variable
CACHES = ("TILELANG_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")
TIMEOUT = 1800  # seconds that a first call may take


def cold_start(operator: str, shape: Shape, backend: str, dtype: str, seed: int) -> dict:
    """`empty_cache_seconds` and `full_cache_seconds`, or a `reason` why there are none."""
    result = {"operator": operator, "shape": str(shape), "slug": shape.slug, "backend": backend}
    command = [sys.executable, "-m", __name__, operator, str(shape), backend, dtype, str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        variables = os.environ | caches_in(folder)
        variables |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        for cache in ("empty", "full"):
            try:
                done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                return result | {"reason": f"not done after {TIMEOUT} s"}
            if done.returncode:
                last = (done.stderr.strip() or "no message").splitlines()[-1]
                return result | {"reason": last}
            result[f"{cache}_cache_seconds"] = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return result


def caches_in(folder: str) -> dict[str, str]:
    """Variables of a process that keeps what it compiles in this folder, and finds there what others have kept."""
    return {name: str(Path(folder, name.lower())) for name in CACHES} | {"HOME": folder}


def main(operator: str, shape: str, backend: str, dtype: str, seed: str) -> None:
    import torch

    from qlatrain.bench.operators import OPERATORS
    from qlatrain.bench.runs import EagerRun

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    problem = OPERATORS[operator](parse_shape(shape), int(seed), getattr(torch, dtype), device)
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    EagerRun(problem, backend).both()
    if on_gpu:
        torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
