"""Which kernels there are, and which of them a call needs."""

from qlakernels.compiled import add_kernels

PASS_CONFIGS = {
    "tl.enable_fast_math": True,  # exp and the division behind it: 1e-6 of a sigmoid, 1e-5 of one below e⁻¹⁵
    "tl.disable_safe_memory_legalize": True,  # every access is guarded here, for all pieces of a row at once
}
MAKERS = {
    "gated_norm_forward": "forward.forward_kernel",
    "gated_norm_backward": "backward.backward_kernel",
}

add_kernels(__name__, MAKERS, pass_configs=dict.fromkeys(MAKERS, PASS_CONFIGS), host=("operator",))


def specialisations(dim: int, dtype: str, weight_dtype: str, keep: bool, with_output: bool = False) -> dict:
    """What one call needs, by name; with `keep` its backward as well, which writes y again where `with_output` says so.
    dtypes are names such as "bfloat16"."""
    options = dim, dtype, weight_dtype
    needed = {"forward": ("gated_norm_forward", *options)}
    if keep:
        needed["backward"] = ("gated_norm_backward", *options, with_output)
    return needed
