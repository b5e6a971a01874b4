"""The kernels as they are compiled: which specialisations a call needs, built side by side, kept in the disk cache.

A specialisation is (kernel, what its maker takes). Lengths, batch, heads and strides are read at run time: a model
needs seven kernels whatever its batches look like.
"""

import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import tilelang
from tqdm import tqdm

from qlakernels.gated_delta_rule.hopper.boundaries import boundaries_kernel
from qlakernels.gated_delta_rule.hopper.common import TARGET
from qlakernels.gated_delta_rule.hopper.expand import expand_kernel
from qlakernels.gated_delta_rule.hopper.forward import forward_kernel
from qlakernels.gated_delta_rule.hopper.gradients import gradients_kernel
from qlakernels.gated_delta_rule.hopper.prepare import prepare_kernel
from qlakernels.gated_delta_rule.hopper.reverse import reverse_kernel

MAKERS = {
    "boundaries": boundaries_kernel,
    "prepare": prepare_kernel,
    "forward": forward_kernel,
    "expand": expand_kernel,
    "reverse": reverse_kernel,
    "gradients": gradients_kernel,
}

# The scans synchronise by hand, and no two of their buffers share memory.
BY_HAND = {"tl.disable_thread_storage_sync": True, "tl.disable_shared_memory_reuse": True}
PASS_CONFIGS = {"forward": BY_HAND}

_compiled: dict[tuple, object] = {}
_lock = Lock()


def specialisations(key_dim, value_dim, dtype, l2norm, gate, sigmoid, raw_dtype, beta_dtype, keep, part=None) -> dict:
    """What one call needs, by name; with `keep` its backward as well. dtypes are names such as "bfloat16".

    `part`: rows of V that a block of the scans takes, 64 or 128; what fills the chip soonest when None.
    """
    part = part or min(128, -(-value_dim // 64) * 64)
    needed = {
        "boundaries": ("boundaries",),
        "prepare": ("prepare", key_dim, dtype, l2norm, gate, sigmoid, raw_dtype, beta_dtype),
        "forward": ("forward", key_dim, value_dim, dtype, part, keep, l2norm, gate, sigmoid, raw_dtype, beta_dtype),
    }
    if keep:
        needed["expand"] = ("expand", key_dim, value_dim, dtype)
        needed["reverse"] = ("reverse", key_dim, value_dim, dtype)
        needed["gradients"] = ("gradients", key_dim, value_dim, dtype, l2norm)
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
