"""The gated norm on Hopper as a differentiable torch operator: a launch forward, one backward and a sum.

Kept for the backward: x and the gate as they were given, the weight. Nothing here reads a value from the device.

`launch_forward` and `launch_backward` write to tensors of their caller, slices of larger ones among them: a caller who
fuses more than the norm has the gate's gradient written where it is wanted, and the output made again on the way.
"""

from functools import cache

import torch

from qlakernels.compiled import launchers
from qlakernels.norm.hopper.kernels import specialisations
from qlakernels.norm.hopper.sizes import BLOCKS, LANES, PIECE, THREADS
from qlakernels.operators import (
    below_autograd,
    define,
    differentiate,
    differentiate_no_further,
    name_of,
    weight_as_read,
)

# Tokens of a thread. Longer ones leave fewer sums and read the weight less often, shorter ones are more threads.
STRETCH = {"forward": 32, "backward": 64}
LEAST_STRETCH = 8


def run(x, gate, weight, eps):
    """As `rms_norm_gated`: x, gate [..., D] of one half-precision dtype, weight [D] → [..., D]."""
    return _forward_op(x, gate, weight, eps)


def launch_forward(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor) -> None:
    """y ← weight ∘ x / rms(x) ∘ SiLU(gate), in one launch.

    Args:
        x, gate, y: [T, D], or [..., H, D] where the heads of a token lie behind one another; bfloat16 or float16, all
            the same; D in `LANES`. They may be slices: x and the gate are copied only where `as_rows` says.
        weight: [D], of any dtype; float32 and x's are read as they are.

    Raises:
        ValueError: y has strides that the kernel cannot write to.
    """
    if x.numel() == 0:
        return
    keep = x.requires_grad or gate.requires_grad or weight.requires_grad
    weight = weight_as_read(weight, x.dtype)
    launch = _launchers(x.shape[-1], x.dtype, weight.dtype, keep, False)["forward"]
    rows = [as_rows(x), as_rows(gate), _rows_to_write("y", y)]
    (x_row, gate_row, y_row), steps = zip(*rows, strict=True)
    tokens, heads = _tokens_and_heads(x)
    launch(
        x_row, gate_row, weight, y_row, *steps, tokens, heads, stretch_of("forward", tokens, heads, x.shape[-1]), eps
    )


def launch_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dx: torch.Tensor,
    dgate: torch.Tensor,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx, dgate ← the gradients, in one launch, and y ← the output of the forward, bit for bit, if it is given.

    Args:
        dy, x, gate, dx, dgate, y: as x and y of `launch_forward`.
        weight: as there.

    Returns:
        dweight, [D] in the weight's dtype: summed in float32, in an order that depends on shapes alone.

    Raises:
        ValueError: dx, dgate or y has strides that the kernel cannot write to.
    """
    if x.numel() == 0:
        return torch.zeros_like(weight)
    dim, (tokens, heads) = x.shape[-1], _tokens_and_heads(x)
    kernel_weight = weight_as_read(weight, x.dtype)
    launch = _launchers(dim, x.dtype, kernel_weight.dtype, True, y is not None)["backward"]
    rows = [as_rows(dy), as_rows(x), as_rows(gate), _rows_to_write("dx", dx), _rows_to_write("dgate", dgate)]
    rows.append(rows[3] if y is None else _rows_to_write("y", y))  # without y, the kernel does not touch its place
    (dy_row, x_row, gate_row, *written), steps = zip(*rows, strict=True)
    stretch = stretch_of("backward", tokens, heads, dim)
    blocks = -(-_threads(stretch, tokens, heads, dim) // THREADS)
    sums = torch.empty(blocks, dim, dtype=torch.float32, device=x.device)
    launch(dy_row, x_row, gate_row, kernel_weight, *written, sums, *steps, tokens, heads, stretch, eps)
    return sums.sum(0).to(weight.dtype)


@cache
def _launchers(dim, dtype, weight_dtype, keep, with_output):
    return launchers(specialisations(dim, name_of(dtype), name_of(weight_dtype), keep, with_output))


def stretch_of(name: str, tokens: int, heads: int, dim: int) -> int:
    """Tokens that a thread of a kernel takes: fewer where there are too few threads."""
    enough = 2 * 132 * BLOCKS[name] * THREADS  # fill an H100 twice
    stretch = STRETCH[name]
    while stretch > LEAST_STRETCH and _threads(stretch, tokens, heads, dim) < enough:
        stretch //= 2
    return stretch


def _threads(stretch: int, tokens: int, heads: int, dim: int) -> int:
    return -(-tokens // stretch) * heads * LANES[dim]


def _tokens_and_heads(x: torch.Tensor) -> tuple[int, int]:
    heads = x.shape[-2] if x.dim() > 2 else 1
    return x.numel() // (heads * x.shape[-1]), heads


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [T, D] or [..., H, D] as one row of numbers from its first to its last, and the step between tokens in pieces.

    A view, unless the numbers of a token do not lie behind one another, the tokens not at one distance, or accesses of
    16 bytes do not fit.
    """
    tokens, heads = _tokens_and_heads(x)
    channels = heads * x.shape[-1]
    x = x.reshape(tokens, channels)
    step = x.stride(0) if tokens > 1 else channels
    if x.stride(1) != 1 or step < channels or step % PIECE or x.data_ptr() % 16:
        x, step = x.clone(memory_format=torch.contiguous_format), channels
    return x.as_strided(((tokens - 1) * step + channels,), (1,)), step // PIECE


def _rows_to_write(name: str, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    row, step = as_rows(x)
    if row.data_ptr() != x.data_ptr():
        raise ValueError(
            f"{name} of shape {list(x.shape)} has strides {list(x.stride())} and begins at {x.data_ptr() % 16} bytes "
            "past a multiple of 16: give one whose tokens are contiguous, at one distance, a multiple of 8, from 0"
        )
    return row, step


def _forward(x, gate, weight, eps):
    y = x.new_empty(x.shape)
    launch_forward(x, gate, weight, eps, y)
    return y


def _backward(dy, x, gate, weight, eps):
    """dx and dgate in x's dtype; dweight in the weight's."""
    dx, dgate = x.new_empty(x.shape), x.new_empty(x.shape)
    return dx, dgate, launch_backward(dy, x, gate, weight, eps, dx, dgate)


_forward_op = define(
    "rms_norm_gated(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor",
    _forward,
    lambda x, *_: x.new_empty(x.shape),
)
_backward_op = define(
    "rms_norm_gated_backward(Tensor dy, Tensor x, Tensor gate, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, x, gate, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


class _RMSNormGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, x, gate, weight, eps):
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return below_autograd(_forward_op, keyset, x, gate, weight, eps)

    @staticmethod
    def backward(ctx, dy):
        return None, *_backward_op(dy, *ctx.saved_tensors, ctx.eps), None


def _autograd(keyset, x, gate, weight, eps):
    if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad or weight.requires_grad):
        return _RMSNormGated.apply(keyset, x, gate, weight, eps)
    return below_autograd(_forward_op, keyset, x, gate, weight, eps)


differentiate(_forward_op, _autograd)
differentiate_no_further(_backward_op, "the gated norm")
