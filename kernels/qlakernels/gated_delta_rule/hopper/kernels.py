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
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from threading import Lock

import tilelang
from tqdm import tqdm
from tvm.runtime import Executable, load_module

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
SLOWEST = "gradients"  # to compile

_functions: dict[tuple, object] = {}
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
    """Makes kernels ready for `launcher`, side by side: hundredths of a second each from the cache, else 5 to 40 s.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    with _lock:
        missing = [key for key in dict.fromkeys(needed) if key not in _functions]
        fresh = [key for key in missing if not _library(key).exists()]
        if fresh:
            _compile_all(fresh)
        for key in missing:
            if key not in _functions and _library(key).exists():
                _functions[key] = load_module(str(_library(key))).get_function("main", query_imports=True)
            elif key not in _functions:
                _compile(key)


def launcher(key: tuple):
    """The function that launches the kernel of a specialisation, without the Python that tilelang wraps around it.

    That Python (5 µs a call) makes outputs, of which our kernels return none. The function itself checks the number,
    dtypes, shapes, strides and device of its arguments, and takes the current stream of the tensors' device.
    """
    load([key])
    return _functions[key]


def kernel(key: tuple):
    """A specialisation as tilelang compiles it, or finds it in its own cache: with sources, for a look at it."""
    logging.getLogger("tilelang").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Non-empty msg", UserWarning)  # the assertions of `boundaries`
    name, *options = key
    return tilelang.compile(MAKERS[name](*options), target=TARGET, pass_configs=PASS_CONFIGS.get(name))


def _library(key: tuple) -> Path:
    """Where what these sources make of the key lies, compiled: nothing has to be traced to find it."""
    text = repr((key, tilelang.__version__, _sources()))
    return Path(tilelang.env.TILELANG_CACHE_DIR) / "qlakernels" / f"{hashlib.sha256(text.encode()).hexdigest()}.so"


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in HOST:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile_all(keys: list[tuple]) -> None:
    """One kernel here, the others in processes, as half of a compilation is Python and holds its lock."""
    keys = sorted(keys, key=lambda key: key[0] != SLOWEST)
    aside = keys[1:] if tilelang.env.is_cache_enabled() and sys.executable else []
    here = keys[: len(keys) - len(aside)]
    with (
        ThreadPoolExecutor(min(len(keys), len(os.sched_getaffinity(0)))) as pool,
        tqdm(desc="compiling Hopper kernels", total=len(keys), delay=2.0, unit="kernel") as progress,
    ):
        done = [pool.submit(_compile_in_process, key) for key in aside]
        done += [pool.submit(_compile_here, key) for key in here]
        for future in as_completed(done):
            future.result()
            progress.update()


def _compile(key: tuple) -> None:
    compiled = kernel(key)
    executable = compiled.adapter.get_exportable_executable()
    module = executable.jit() if isinstance(executable, Executable) else executable  # just compiled, or from the cache
    _functions[key] = module.get_function("main", query_imports=True)
    cached = Path(getattr(compiled, "_tilelang_cache_path", ""), "executable.so")
    if cached.is_file():
        library = _library(key)
        library.parent.mkdir(parents=True, exist_ok=True)
        aside = library.with_suffix(f".{os.getpid()}")
        aside.write_bytes(cached.read_bytes())
        aside.replace(library)


def _compile_here(key: tuple) -> None:
    try:
        _compile(key)
    except Exception as error:
        raise RuntimeError(f"the kernel {key} does not compile: {type(error).__name__}: {error}") from error


def _compile_in_process(key: tuple) -> None:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", __name__, json.dumps(key)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"the kernel {key} does not compile: {lines[-1]}")


if __name__ == "__main__":
    _compile(tuple(json.loads(sys.argv[1])))
