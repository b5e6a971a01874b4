"""Which kernels there are."""

from qlakernels.compiled import add_kernels

PASS_CONFIGS = {
    "tl.enable_fast_math": True,  # powers of 2 to 2 ulp, those below 2⁻¹²⁶ are 0; logarithms to 2⁻²²
    "tl.disable_safe_memory_legalize": True,  # every access is guarded here, for all elements of a piece at once
}
MAKERS = {"cross_entropy": "passes.cross_entropy_kernel"}

add_kernels(__name__, MAKERS, pass_configs=dict.fromkeys(MAKERS, PASS_CONFIGS), host=("operator",))
