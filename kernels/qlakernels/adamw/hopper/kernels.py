"""Which kernels there are, and which of them a call needs."""

from qlakernels.compiled import add_kernels

PASS_CONFIGS = {
    "tl.disable_safe_memory_legalize": True,  # every access is guarded here, for all elements of a piece at once
}
MAKERS = {"adamw_update": "update.update_kernel"}

add_kernels(__name__, MAKERS, pass_configs=dict.fromkeys(MAKERS, PASS_CONFIGS), host=("operator",))


def specialisation(cast: str, gradient: str = "float32") -> tuple:
    """The key of the kernel. cast: the dtype of the cast it writes, "bfloat16" or "float16", or "none"; gradient: that
    of the gradient."""
    return "adamw_update", cast, gradient
