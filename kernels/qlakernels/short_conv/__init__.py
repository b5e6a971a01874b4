"""The short causal convolution in front of the gated delta rule."""

from qlakernels.short_conv.api import causal_conv1d, causal_conv1d_update, conv_state_of

__all__ = ["causal_conv1d", "causal_conv1d_update", "conv_state_of"]
