"""`add_rms_norm`: a residual stream's next sum and its RMSNorm (Zhang and Sennrich 2019) together."""

import torch
import torch.nn.functional as F

from qlakernels.backends import Backend, Call, refused_by_hopper, register, select
from qlakernels.residual_norm.hopper.sizes import MAX_DIM, PIECE

OPERATOR = "add_rms_norm"


def call_of(x: torch.Tensor) -> Call:
    """What decides which backend runs."""
    return Call(torch.device(x.device.type), x.dtype, x.shape[-1], x.shape[-1])


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = x + delta and normed = total / rms(total) ∘ (offset + weight), in float32 and each rounded once.

    Args:
        x, delta: [..., D] of one dtype. Without a delta the total is x, the very tensor.
        weight: [D].
        eps: added to the mean square.
        offset: 1 where weights are centred on zero, as in Qwen3-Next.
        backend: auto, tilelang (our kernels for Hopper GPUs, D a multiple of 8 up to 8192) or torch.

    Returns:
        total and normed, [..., D] in x's dtype. The statistics are those of the rounded total.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}, x {list(x.shape)}: give [D] and [..., D]")
    if delta is not None and (delta.shape != x.shape or delta.dtype != x.dtype):
        raise ValueError(
            f"delta is {delta.dtype} of shape {list(delta.shape)}, x {x.dtype} of {list(x.shape)}: give one like x"
        )
    return select(OPERATOR, backend, call_of(x)).run(x, delta, weight, eps, offset)


def _run_torch(x, delta, weight, eps, offset):
    total = x if delta is None else x + delta
    return total, F.rms_norm(total.float(), total.shape[-1:], offset + weight.float(), eps).type_as(x)


def refuses_tilelang(call: Call) -> str | None:
    return refused_by_hopper(call) or refuses_width(call.value_dim)


def refuses_width(dim: int) -> str | None:
    if dim % PIECE or not 0 < dim <= MAX_DIM:
        return f"takes D a multiple of {PIECE} up to {MAX_DIM}, not {dim}"
    return None


def _run_tilelang(x, delta, weight, eps, offset):
    from qlakernels.residual_norm.hopper.operator import run

    return run(x, delta, weight, eps, offset)


register(OPERATOR, Backend("tilelang", refuses_tilelang, _run_tilelang))
register(OPERATOR, Backend("torch", lambda call: None, _run_torch))
