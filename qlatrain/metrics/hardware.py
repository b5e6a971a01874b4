"""What a run ran on: the peak rate of the device, and the versions and machine for `environment.json`."""

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

# Dense bf16 tensor-core peaks in FLOP/s with float32 accumulation, as (pattern in the device's name, peak), first
# match wins; `$` keeps laptop and cut-down cards of the same number out. From NVIDIA's data sheets of each product;
# where a sheet states the figure with 2:4 sparsity, half of it.
BF16_PEAKS = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH200 NVL\b", 835.5e12),
    (r"\b(H200|GH200)\b", 989.4e12),
    (r"\bH100 (PCIe|80GB HBM2e)\b", 756e12),
    (r"\bH100 NVL\b", 835.5e12),
    (r"\b(H100|H800)\b", 989.4e12),
    (r"\bH20\b", 148e12),
    (r"\b(A100|A800)\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bA10\b", 125e12),
    (r"\bRTX 5090$", 209.5e12),
    (r"\bRTX 4090$", 165.2e12),
    (r"\bRTX 3090$", 71e12),
)
PACKAGES = (
    "torch",
    "triton",
    "tilelang",
    "flash-linear-attention",
    "flash-qla",
    "transformers",
    "accelerate",
    "datasets",
    "wandb",
)


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> tuple[float, str]:
    """The rate to hold a run's FLOPs against: `(flops_per_second, how)`, of one device.

    A known GPU in bfloat16 gets its data sheet's dense figure. Every other device or dtype is measured by a matrix
    product, in under half a second or so; `how` says which of the two it was, in words fit for the log.
    """
    device = torch.device(device)
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if (peak := known_bf16_peak(name)) is not None:
            return peak, f"data sheet of {name}, dense bf16"
    return measured_flops(device, dtype)


def known_bf16_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU that calls itself `name`; None when unknown or when it is a slice (MIG) of one."""
    if "MIG" in name:
        return None
    for pattern, peak in BF16_PEAKS:
        if re.search(pattern, name):
            return peak
    return None


def measured_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Best FLOP/s of a square matrix product: `(flops_per_second, how)`.

    The size doubles from 256 until a product takes 20 ms or the size is 8192, so that a slow CPU is not held up and a
    fast GPU is filled.
    """
    size, seconds = 256, 0.0
    while True:
        seconds = _matmul_seconds(size, device, dtype, repeats=2)
        if seconds > 0.02 or size == 8192:
            break
        size *= 2
    repeats = max(1, min(10, int(0.1 / seconds)))
    seconds = min(seconds, _matmul_seconds(size, device, dtype, repeats))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model() or device.type
    dtype_name = str(dtype).removeprefix("torch.")
    how = f"measured on {name}: best {dtype_name} matrix product {size}x{size}x{size}"
    return 2 * size**3 / seconds, how


def measured_bandwidth(device: torch.device) -> tuple[float, str]:
    """Best bytes a second of a copy, read and written bytes counted both: `(bytes_per_second, how)`."""
    size = 2**31 if device.type == "cuda" else 2**27  # far beyond any cache, and long beside the wait for its end
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = _best_seconds(lambda: target.copy_(source), device, repeats=10)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model() or device.type
    return 2 * size / seconds, f"measured on {name}: best copy of {size / 2**20:.0f} MiB"


def _matmul_seconds(size: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Best time of `repeats` products of two [size, size] matrices."""
    # a generator of our own: measuring must not move the random state of the run
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    with torch.no_grad():
        return _best_seconds(lambda: torch.mm(a, b, out=out), device, repeats)


def _best_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def environment() -> dict:
    """Versions, commit, devices, machine, command line and time, ready for JSON; unknown entries are None."""
    import qlatrain

    commit, dirty = _git_state(Path(qlatrain.__file__))
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "qlatrain": qlatrain.__version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        # of torch its own word: a wheel's metadata may leave out which build it is
        "versions": {package: _version(package) for package in PACKAGES} | {"torch": str(torch.__version__)},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "gpu_count": len(gpus),
        "gpu_driver": _gpu_driver() if gpus else None,
        "cpu": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
    }


def cpu_model() -> str | None:
    """The processor's name, from /proc/cpuinfo where there is one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(tracked_file: Path) -> tuple[str | None, bool | None]:
    """`(commit, dirty)` of the repository that tracks the file; instead what QLATRAIN_COMMIT of the environment says,
    for copies whose repository does not know."""
    if commit := os.environ.get("QLATRAIN_COMMIT"):
        return commit, None
    folder = tracked_file.parent
    # an installed copy may lie inside somebody else's repository, as in a virtual environment
    if _output(["git", "-C", str(folder), "ls-files", "--error-unmatch", tracked_file.name]) is None:
        return None, None
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    status = _output(["git", "-C", str(folder), "status", "--porcelain"])
    return commit, None if status is None else bool(status)


def _gpu_driver() -> str | None:
    out = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return out.splitlines()[0] if out else None


def _output(command: list[str]) -> str | None:
    """What a command prints, or None when it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
