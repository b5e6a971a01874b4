"""The gated delta rule: reference, plain PyTorch, peers, and the one public function."""

from qlakernels.gated_delta_rule.api import chunk_gated_delta_rule
from qlakernels.gated_delta_rule.reference import recurrent_gated_delta_rule_reference

__all__ = ["chunk_gated_delta_rule", "recurrent_gated_delta_rule_reference"]
