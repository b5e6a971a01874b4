"""The kernels as they are compiled: which specialisations a call needs, built side by side, kept in the disk cache.

A specialisation is (kernel, what its maker takes). Lengths, batch, heads and strides are read at run time: a model
needs five kernels whatever its batches look like.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock

import tilelang
from tqdm import tqdm
from tvm.runtime import Executable

from qlakernels.gated_delta_rule.hopper.boundaries import boundaries_kernel
from qlakernels.gated_delta_rule.hopper.common import TARGET
from qlakernels.gated_delta_rule.hopper.forward import forward_kernel
from qlakernels.gated_delta_rule.hopper.gate_gradients import gate_gradients_kernel
from qlakernels.gated_delta_rule.hopper.gradients import gradients_kernel
from qlakernels.gated_delta_rule.hopper.prepare import prepare_kernel
from qlakernels.gated_delta_rule.hopper.reach import decay_kernel, reach_kernel
from qlakernels.gated_delta_rule.hopper.reverse import reverse_kernel
from qlakernels.gated_delta_rule.hopper.segments import segments_kernel, stitch_kernel

MAKERS = {
    "boundaries": boundaries_kernel,
    "decay": decay_kernel,
    "reach": reach_kernel,
    "prepare": prepare_kernel,
    "prepare_reverse": prepare_kernel,
    "segments": segments_kernel,
    "segments_reverse": segments_kernel,
    "stitch": stitch_kernel,
    "stitch_reverse": stitch_kernel,
    "forward": forward_kernel,
    "reverse": reverse_kernel,
    "gradients": gradients_kernel,
    "gate_gradients": gate_gradients_kernel,
}

# Kernels of several roles synchronise by hand, and no two of their buffers share memory.
BY_HAND = {"tl.disable_thread_storage_sync": True, "tl.disable_shared_memory_reuse": True}
IN_SEGMENTS = [name + suffix for name in ("prepare", "segments", "stitch") for suffix in ("", "_reverse")]
PASS_CONFIGS = dict.fromkeys(("forward", "reverse", "gradients", *IN_SEGMENTS), BY_HAND)

HOST = ("operator", "constants", "resources")  # modules that no kernel is made from

_compiled: dict[tuple, object] = {}
_lock = Lock()


def specialisations(
    key_dim, value_dim, dtype, l2norm, gate, sigmoid, raw_dtype, beta_dtype, keep, part=None, cut=False
) -> dict:
    """What one call needs, by name; with `keep` its backward as well. dtypes are names such as "bfloat16".

    part: rows of V that a block of the scans takes, 64 or 128; what suits many scans when None. cut: documents into
    segments.
    """
    part = part or rows_of_many_scans(value_dim)
    options = l2norm, gate, sigmoid, raw_dtype, beta_dtype
    scan = key_dim, value_dim, dtype, part, *options
    needed = {"boundaries": ("boundaries",), "forward": ("forward", *scan, keep)}
    if keep:
        needed["reverse"] = ("reverse", *scan)
        needed["gradients"] = ("gradients", key_dim, value_dim, dtype, l2norm)
        if gate or sigmoid:
            needed["gate_gradients"] = ("gate_gradients", gate, sigmoid, raw_dtype, beta_dtype)
    if cut:
        if l2norm:
            needed["decay"] = ("decay", gate, sigmoid, raw_dtype, beta_dtype)
        needed["reach"] = ("reach", l2norm)
        for suffix in ("", "_reverse") if keep else ("",):
            reverse = bool(suffix)
            needed["prepare" + suffix] = ("prepare" + suffix, key_dim, dtype, *options, reverse)
            needed["segments" + suffix] = ("segments" + suffix, key_dim, value_dim, dtype, reverse)
            needed["stitch" + suffix] = ("stitch" + suffix, key_dim, value_dim, reverse)
    return needed


def rows_of_many_scans(value_dim: int) -> int:
    """Of V, for a block of a scan where there are enough of them."""
    return min(128, -(-value_dim // 64) * 64)


def load(needed: list[tuple]) -> None:
    """Compiles what is missing, side by side: tenths of a second each from the disk cache, else 5 to 40 s.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    with _lock:
        missing = [key for key in dict.fromkeys(needed) if key not in _compiled]
        if not missing:
            return
        fresh = [key for key in missing if not _mark(key).exists()]
        if len(fresh) > 1 and tilelang.env.is_cache_enabled() and sys.executable:
            _compile_in_processes(fresh)
        functions = [(MAKERS[name](*rest), PASS_CONFIGS.get(name)) for name, *rest in missing]
        with ThreadPoolExecutor(_workers(missing)) as pool:
            built = list(pool.map(_compile, functions))
        _compiled.update(zip(missing, built, strict=True))
        for key in fresh:
            mark = _mark(key)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _workers(keys: list[tuple]) -> int:
    return min(len(keys), len(os.sched_getaffinity(0)))


def _mark(key: tuple) -> Path:
    """A file beside the cache that says that these sources have been compiled into it."""
    text = repr((key, tilelang.__version__, _sources()))
    return Path(tilelang.env.TILELANG_CACHE_DIR) / "qlakernels" / hashlib.sha256(text.encode()).hexdigest()


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in HOST:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile_in_processes(keys: list[tuple]) -> None:
    """Into the disk cache, a process each: half of a compilation is Python and holds its lock."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def compile_one(key: tuple) -> None:
        command = [sys.executable, "-m", __name__, json.dumps(key)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"the kernel {key} does not compile: {lines[-1]}")

    with ThreadPoolExecutor(_workers(keys)) as pool:
        done = pool.map(compile_one, keys)
        list(tqdm(done, "compiling Hopper kernels", len(keys), delay=2.0, unit="kernel"))


def _compile(made):
    function, pass_configs = made
    logging.getLogger("tilelang").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Non-empty msg", UserWarning)  # the assertions of `boundaries`
    return tilelang.compile(function, target=TARGET, pass_configs=pass_configs)


def kernel(key: tuple):
    """The compiled kernel of a specialisation."""
    if key not in _compiled:
        load([key])
    return _compiled[key]


def launcher(key: tuple):
    """The function that launches the kernel of a specialisation, without the Python that tilelang wraps around it.

    That Python (5 µs a call) makes outputs, of which our kernels return none. The function itself checks the number,
    dtypes, shapes, strides and device of its arguments, and takes the current stream of the tensors' device.
    """
    executable = kernel(key).adapter.get_exportable_executable()
    module = executable.jit() if isinstance(executable, Executable) else executable  # just compiled, or from the cache
    return module.get_function("main", query_imports=True)


if __name__ == "__main__":
    load([tuple(json.loads(sys.argv[1]))])
