"""The token mixer of a Gated DeltaNet layer between its two projections, and the last of them, as one operator."""

from qlakernels.gated_delta_net.api import gated_delta_net

__all__ = ["gated_delta_net"]
