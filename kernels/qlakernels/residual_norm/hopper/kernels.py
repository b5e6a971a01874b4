"""Which kernels there are, and which of them a call needs."""

from qlakernels.compiled import add_kernels

PASS_CONFIGS = {
    "tl.enable_fast_math": True,  # numbers below 2⁻¹²⁶ are zeros
    "tl.disable_safe_memory_legalize": True,  # every access is guarded here, for all elements of a piece at once
    "tl.disable_thread_storage_sync": True,  # it would put a second barrier around sums that lie apart in turns
}
MAKERS = {
    "residual_norm_forward": "forward.forward_kernel",
    "residual_norm_backward": "backward.backward_kernel",
}

add_kernels(__name__, MAKERS, pass_configs=dict.fromkeys(MAKERS, PASS_CONFIGS), host=("operator",))


def specialisations(
    dim: int, dtype: str, weight_dtype: str, residual: bool, keep: bool, with_normed: bool = False
) -> dict:
    """What one call needs, by name: the forward, with a delta where `residual` says so; with `keep` its backward as
    well, which takes the gradient of the total there, and makes the normed rows again `with_normed`. dtypes are names
    such as "bfloat16"."""
    options = dim, dtype, weight_dtype, residual
    needed = {"forward": ("residual_norm_forward", *options)}
    if keep:
        needed["backward"] = ("residual_norm_backward", *options, with_normed)
    return needed
