"""The short causal depthwise convolution in front of the gated delta rule."""

from qlakernels.short_conv.api import causal_conv1d

__all__ = ["causal_conv1d"]
