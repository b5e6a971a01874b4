"""SwiGLU between the products of an MLP, and an MLP that keeps its products alone."""

from qlakernels.swiglu.api import swiglu, swiglu_mlp

__all__ = ["swiglu", "swiglu_mlp"]
