"""Which kernels there are, and which of them a call needs."""

from qlakernels.compiled import add_kernels

PASS_CONFIGS = {
    "tl.enable_fast_math": True,  # exp and the division behind it: 1e-6 of a sigmoid, 1e-5 of one below e⁻¹⁵
    "tl.disable_safe_memory_legalize": True,  # every access is guarded here, for all channels of a thread at once
}
MAKERS = {
    "short_conv_forward": "forward.forward_kernel",
    "short_conv_backward": "backward.backward_kernel",
    "short_conv_update": "update.update_kernel",
}

add_kernels(__name__, MAKERS, pass_configs=dict.fromkeys(MAKERS, PASS_CONFIGS), host=("operator",))


def specialisations(width: int, dtype: str, weight_dtype: str, position_dtype: str, silu: bool, keep: bool) -> dict:
    """What one call needs, by name; with `keep` its backward as well. dtypes are names such as "bfloat16"."""
    options = width, dtype, weight_dtype, position_dtype, silu
    directions = ("forward", "backward") if keep else ("forward",)
    return {name: (f"short_conv_{name}", *options) for name in directions}


def update_specialisation(width: int, dtype: str, weight_dtype: str, silu: bool) -> tuple:
    """What a token of a decoder needs."""
    return "short_conv_update", width, dtype, weight_dtype, silu
