"""Which kernels there are."""

from qlakernels.compiled import add_kernels

PASS_CONFIGS = {
    "tl.enable_fast_math": True,  # exp and the division behind it: 1e-6 of a sigmoid, 1e-5 of one below e⁻¹⁵
    "tl.disable_safe_memory_legalize": True,  # every access is guarded here, for all elements of a piece at once
}
MAKERS = {"swiglu_forward": "passes.forward_kernel", "swiglu_backward": "passes.backward_kernel"}

add_kernels(__name__, MAKERS, pass_configs=dict.fromkeys(MAKERS, PASS_CONFIGS), host=("operator",))
