"""qlakernels inside the Gated DeltaNet layers of Hugging Face transformers."""

from qlatrain.integrations.transformers.replace import Handle, Replaced, use_qlatrain_kernels

__all__ = ["Handle", "Replaced", "use_qlatrain_kernels"]
