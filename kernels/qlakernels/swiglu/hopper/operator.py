"""SwiGLU on Hopper as torch operators, a launch each."""

from functools import cache

import torch

from qlakernels.compiled import launchers
from qlakernels.operators import as_read, define, name_of
from qlakernels.swiglu.hopper import kernels  # noqa: F401  makes them known
from qlakernels.swiglu.hopper.sizes import PIECE


@cache
def _launchers(dtype):
    return launchers({direction: (f"swiglu_{direction}", name_of(dtype)) for direction in ("forward", "backward")})


def _forward(together):
    together = as_read(together)
    y = together.new_empty(*together.shape[:-1], together.shape[-1] // 2)
    if y.numel():
        pieces = y.shape[-1] // PIECE
        _launchers(y.dtype)["forward"](together.view(-1), y.view(-1), y.numel() // y.shape[-1], pieces)
    return y


def _backward(dy, together):
    dy, together = as_read(dy), as_read(together)
    d_together, y = torch.empty_like(together), torch.empty_like(dy)
    if y.numel():
        flat = (x.view(-1) for x in (dy, together, d_together, y))
        _launchers(y.dtype)["backward"](*flat, y.numel() // y.shape[-1], y.shape[-1] // PIECE)
    return d_together, y


forward = define(
    "swiglu(Tensor together) -> Tensor",
    _forward,
    lambda together: together.new_empty(*together.shape[:-1], together.shape[-1] // 2),
)
backward = define(
    "swiglu_backward(Tensor dy, Tensor together) -> (Tensor, Tensor)",
    _backward,
    lambda dy, together: (together.new_empty(together.shape), dy.new_empty(dy.shape)),
)
