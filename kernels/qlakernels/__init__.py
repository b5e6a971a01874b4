"""qlakernels: the operators of hybrid linear-attention models.

Stands alone: it knows tensors and nothing of training. `chunk_gated_delta_rule` is the one public function of the
gated delta rule; which implementation runs is decided in `backends` and said once through the `qlakernels` logger.
"""

from qlakernels.cross_entropy import cross_entropy_
from qlakernels.gated_delta_net import gated_delta_net
from qlakernels.gated_delta_rule import chunk_gated_delta_rule
from qlakernels.norm import rms_norm_gated
from qlakernels.residual_norm import add_rms_norm
from qlakernels.short_conv import causal_conv1d, causal_conv1d_update, conv_state_of
from qlakernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "conv_state_of",
    "cross_entropy_",
    "gated_delta_net",
    "rms_norm_gated",
    "swiglu",
]
