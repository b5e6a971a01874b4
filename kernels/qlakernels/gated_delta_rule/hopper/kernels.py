"""The kernels as they are compiled: one object for each specialisation, kept for the process and in the disk cache."""

from functools import cache

import tilelang

from qlakernels.gated_delta_rule.hopper.common import TARGET
from qlakernels.gated_delta_rule.hopper.expand import expand_kernel
from qlakernels.gated_delta_rule.hopper.forward import forward_kernel
from qlakernels.gated_delta_rule.hopper.gradients import gradients_kernel
from qlakernels.gated_delta_rule.hopper.prepare import prepare_kernel
from qlakernels.gated_delta_rule.hopper.reverse import reverse_kernel

MAKERS = {
    "prepare": prepare_kernel,
    "forward": forward_kernel,
    "expand": expand_kernel,
    "reverse": reverse_kernel,
    "gradients": gradients_kernel,
}


@cache
def kernel(name: str, *specialisation):
    """The compiled kernel; from the disk cache in hundredths of a second, else in 5 to 30 s."""
    return tilelang.compile(MAKERS[name](*specialisation), target=TARGET)
