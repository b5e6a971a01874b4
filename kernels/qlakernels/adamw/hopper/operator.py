"""The AdamW update of one tensor on Hopper: one launch, in place. Nothing here reads a value from the device."""

from functools import cache

import torch
from torch import Tensor

from qlakernels.adamw.hopper.kernels import specialisation
from qlakernels.adamw.hopper.sizes import AHEAD, PIECE, THREADS
from qlakernels.compiled import launcher
from qlakernels.operators import name_of

HALVES = (torch.bfloat16, torch.float16)


def update(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    cast: Tensor | None,
    step: Tensor,
    factor: Tensor,
    skip: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """p, m, v ← one step of AdamW (Loshchilov and Hutter 2019) on the gradient factor · g, and cast ← round(p).

    The arithmetic is that of torch.optim.AdamW(fused=True), in float32. Neither g nor the versions that autograd keeps
    of what is written are changed.

    Args:
        p, m, v, g: the parameter, its moving averages of the gradient and of its square, the gradient; of one shape,
            whatever it is, contiguous, beginning at multiples of 16 bytes, on a Hopper GPU; float32, but g may be
            bfloat16 or float16.
        cast: of p's shape, bfloat16 or float16, contiguous, beginning at a multiple of 8 bytes; or None.
        step: which update this is, from 1 on; as `factor` and `skip` one float32 number on p's device.
        factor: what gradients are multiplied by.
        skip: 0, or 1, where nothing is changed.
        lr, betas, eps, weight_decay: as those of torch.optim.AdamW; rounded to float32.

    Raises:
        ValueError: a tensor has another dtype, shape, layout or device than these.
    """
    for name, x in (("p", p), ("m", m), ("v", v), ("g", g)):
        if x.dtype != torch.float32 and (x is not g or g.dtype not in HALVES):
            halves = ", torch.bfloat16 or torch.float16" if x is g else ""
            raise ValueError(f"{name} is {x.dtype}: the update takes torch.float32{halves}")
        _check_layout(name, x, p, 16)
    if cast is not None:
        if cast.dtype not in HALVES:
            raise ValueError(f"cast is {cast.dtype}: give torch.bfloat16, torch.float16 or None")
        _check_layout("cast", cast, p, 8)
    for name, x in (("step", step), ("factor", factor), ("skip", skip)):
        if x.dtype != torch.float32 or x.numel() != 1 or x.device != p.device:
            raise ValueError(
                f"{name} is a {x.dtype} tensor of shape {list(x.shape)} on {x.device}: "
                f"give one torch.float32 number on {p.device}"
            )
    size = p.numel()
    if size == 0:
        return
    launch = _launcher(None if cast is None else cast.dtype, g.dtype, p.device)
    row = p.detach().view(-1)
    launch(
        row,
        m.view(-1),
        v.view(-1),
        g.detach().view(-1),
        row if cast is None else cast.view(-1),  # without a cast, the kernel does not touch its place
        step.view(1),
        factor.view(1),
        skip.view(1),
        blocks_of(size),
        lr,
        *betas,
        eps,
        weight_decay,
    )


def blocks_of(size: int) -> int:
    """Blocks that have all pieces of a tensor of this size; one at least, for what is left behind them."""
    return max(1, -(-(size // PIECE) // (AHEAD * THREADS)))


def _check_layout(name: str, x: Tensor, p: Tensor, alignment: int) -> None:
    if x.shape != p.shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, p has {list(p.shape)}: give one of p's shape")
    if x.device != p.device:
        raise ValueError(f"{name} is on {x.device}, p on {p.device}: give one on p's device")
    if not x.is_contiguous():
        raise ValueError(f"{name} of shape {list(x.shape)} has strides {list(x.stride())}: give a contiguous tensor")
    if x.data_ptr() % alignment:
        raise ValueError(
            f"{name} begins at {x.data_ptr() % alignment} bytes past a multiple of {alignment}: "
            "give one that begins at a multiple"
        )


@cache
def _launcher(cast_dtype: torch.dtype | None, gradient_dtype: torch.dtype, device: torch.device):
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        raise ValueError(f"p is on {device}: the update needs a Hopper GPU, of compute capability 9.0")
    return launcher(specialisation("none" if cast_dtype is None else name_of(cast_dtype), name_of(gradient_dtype)))
