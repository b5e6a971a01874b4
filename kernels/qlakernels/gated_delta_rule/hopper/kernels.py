"""The kernels as they are compiled: which specialisations a call needs, built side by side, kept in the disk cache.

A specialisation is (kernel, what its maker takes). Lengths, batch, heads and strides are read at run time: a model
needs five kernels whatever its batches look like.
"""

import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
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
from qlakernels.gated_delta_rule.hopper.reverse import reverse_kernel

MAKERS = {
    "boundaries": boundaries_kernel,
    "prepare": prepare_kernel,
    "prepare_reverse": prepare_kernel,
    "forward": forward_kernel,
    "reverse": reverse_kernel,
    "gradients": gradients_kernel,
    "gate_gradients": gate_gradients_kernel,
}

# The scans synchronise by hand, and no two of their buffers share memory.
BY_HAND = {"tl.disable_thread_storage_sync": True, "tl.disable_shared_memory_reuse": True}
PASS_CONFIGS = dict.fromkeys(("prepare", "prepare_reverse", "forward", "reverse"), BY_HAND)

_compiled: dict[tuple, object] = {}
_lock = Lock()


def specialisations(
    key_dim, value_dim, dtype, l2norm, gate, sigmoid, raw_dtype, beta_dtype, keep, part=None, ready=False
) -> dict:
    """What one call needs, by name; with `keep` its backward as well. dtypes are names such as "bfloat16".

    part: rows of V that a block of the scans takes, 64 or 128; what suits many scans when None. ready: for few scans,
    which read what `prepare` has made of all chunks.
    """
    part = part or min(128, -(-value_dim // 64) * 64)
    options = l2norm, gate, sigmoid, raw_dtype, beta_dtype
    scan = key_dim, value_dim, dtype, part, ready, *options
    needed = {"boundaries": ("boundaries",), "forward": ("forward", *scan, keep)}
    if ready:
        needed["prepare"] = ("prepare", key_dim, dtype, *options, False)
    if keep:
        needed["reverse"] = ("reverse", *scan)
        if ready:
            needed["prepare_reverse"] = ("prepare_reverse", key_dim, dtype, *options, True)
        needed["gradients"] = ("gradients", key_dim, value_dim, dtype, l2norm)
        if gate or sigmoid:
            needed["gate_gradients"] = ("gate_gradients", gate, sigmoid, raw_dtype, beta_dtype)
    return needed


def load(needed: list[tuple]) -> None:
    """Compiles what is missing, side by side: hundredths of a second each from the disk cache, else 5 to 40 s."""
    with _lock:
        missing = [key for key in dict.fromkeys(needed) if key not in _compiled]
        if not missing:
            return
        functions = [(MAKERS[name](*rest), PASS_CONFIGS.get(name)) for name, *rest in missing]
        with ThreadPoolExecutor(min(len(missing), len(os.sched_getaffinity(0)))) as pool:
            built = pool.map(_compile, functions)
            progress = tqdm(built, "compiling Hopper kernels", len(missing), delay=2.0, unit="kernel")
            _compiled.update(zip(missing, progress, strict=True))


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
