"""The gated RMSNorm behind the gated delta rule."""

from qlakernels.norm.api import rms_norm_gated

__all__ = ["rms_norm_gated"]
