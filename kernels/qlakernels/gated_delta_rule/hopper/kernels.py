"""Which kernels there are, and which of them a call needs.

A specialisation is (kernel, what its maker takes). Lengths, batch, heads and strides are read at run time: a model
needs five kernels whatever its batches look like.
"""

from qlakernels.compiled import UNIFORM_WARPGROUPS, add_kernels

MAKERS = {
    "boundaries": "boundaries.boundaries_kernel",
    "decay": "reach.decay_kernel",
    "reach": "reach.reach_kernel",
    "prepare": "prepare.prepare_kernel",
    "prepare_reverse": "prepare.prepare_kernel",
    "segments": "segments.segments_kernel",
    "segments_reverse": "segments.segments_kernel",
    "stitch": "segments.stitch_kernel",
    "stitch_reverse": "segments.stitch_kernel",
    "forward": "forward.forward_kernel",
    "reverse": "reverse.reverse_kernel",
    "gradients": "gradients.gradients_kernel",
    "gate_gradients": "gate_gradients.gate_gradients_kernel",
}

# Kernels of several roles synchronise by hand, and no two of their buffers share memory.
BY_HAND = {"tl.disable_thread_storage_sync": True, "tl.disable_shared_memory_reuse": True}
# Loops of these are longer than the instruction cache, and wait for it: see docs/kernels.md. Every access to global
# memory is guarded by hand.
SHORT = BY_HAND | {"tl.enable_fast_math": True, "tl.disable_safe_memory_legalize": True}
IN_SEGMENTS = [name + suffix for name in ("prepare", "segments", "stitch") for suffix in ("", "_reverse")]

add_kernels(
    __name__,
    MAKERS,
    pass_configs=dict.fromkeys(("forward", "reverse"), SHORT)
    | {"gradients": SHORT | {UNIFORM_WARPGROUPS: True}}
    | dict.fromkeys(IN_SEGMENTS, BY_HAND),
    host=("operator", "constants", "resources"),
    slowest=("gradients",),
)


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
