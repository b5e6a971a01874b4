"""SwiGLU between the products of an MLP, and an MLP that keeps its products alone."""

from qlakernels.swiglu.api import swiglu, swiglu_down, swiglu_mlp

__all__ = ["swiglu", "swiglu_down", "swiglu_mlp"]
