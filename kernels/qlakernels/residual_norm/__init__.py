"""The RMSNorm of a residual stream, together with the sum in front of it."""

from qlakernels.residual_norm.api import add_rms_norm, normed_product

__all__ = ["add_rms_norm", "normed_product"]
