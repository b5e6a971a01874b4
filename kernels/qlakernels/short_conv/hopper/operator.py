"""The short convolution on Hopper as a differentiable torch operator: a launch forward, one backward and a sum.

Kept for the backward: x as it was given, the weight, the positions. Nothing here reads a value from the device.
"""

from functools import cache

import torch

from qlakernels.compiled import launcher, launchers
from qlakernels.operators import (
    as_read,
    below_autograd,
    define,
    differentiate,
    differentiate_no_further,
    name_of,
    weight_as_read,
)
from qlakernels.short_conv.hopper.kernels import specialisations, update_specialisation
from qlakernels.short_conv.hopper.sizes import CHANNELS, THREADS, UPDATED

# Tokens of a thread. Longer ones read less twice and leave fewer sums, shorter ones are more threads.
STRETCH = {"forward": 32, "backward": 128}
LEAST_STRETCH = 8
ENOUGH_THREADS = 132 * 6 * THREADS  # fill an H100 one and a half times forward, twice backward


def run(x, weight, position_ids, activation):
    """As `causal_conv1d`, x [B, T, D] with D a multiple of 8."""
    if x.shape[0] * x.shape[1] == 0:
        return x * weight.sum().to(x.dtype)  # no numbers, and gradients of zero
    return _forward_op(x, weight, position_ids, activation == "silu")


@cache
def _launchers(width, dtype, weight_dtype, position_dtype, silu, keep):
    dtypes = map(name_of, (dtype, weight_dtype, position_dtype))
    return launchers(specialisations(width, *dtypes, silu, keep))


def stretch_of(name: str, tokens: int, channels: int) -> int:
    """Tokens that a thread of a kernel takes: fewer where there are too few threads."""
    groups = channels // CHANNELS[name]
    stretch = STRETCH[name]
    while stretch > LEAST_STRETCH and -(-tokens // stretch) * groups < ENOUGH_THREADS:
        stretch //= 2
    return stretch


def as_row(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [B, T, D] as one row of numbers from its first to its last, and the step between tokens.

    A view, unless its channels are not contiguous, the batch does not lie behind itself, or loads of 16 bytes do not
    fit the steps.
    """
    x = x.flatten(0, 1)
    if x.stride(1) != 1 or x.stride(0) < x.shape[1] or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    tokens, channels = x.shape
    step = x.stride(0)
    return x.as_strided(((tokens - 1) * step + channels,), (1,)), step


def _weight_and_positions(x, weight, position_ids):
    """weight as one that the kernels take, and int positions [B·T], none where none are given"""
    weight = weight_as_read(weight, x.dtype)
    if position_ids is None:
        return weight, torch.empty(0, dtype=torch.int64, device=x.device)
    if position_ids.dtype not in (torch.int32, torch.int64):
        position_ids = position_ids.long()
    return weight, position_ids.expand(x.shape[:2]).reshape(-1).contiguous()


def launch_forward(x, weight, position_ids, silu, keep, y) -> None:
    """y ← the convolution of x; both [B, T, D], slices of longer rows among them. keep: the backward will be wanted."""
    (batch, length, channels), C = x.shape, CHANNELS["forward"]
    tokens = batch * length
    weight, positions = _weight_and_positions(x, weight, position_ids)
    launch = _launchers(weight.shape[1], x.dtype, weight.dtype, positions.dtype, silu, keep)
    row, step = as_row(x)
    launch["forward"](
        row,
        weight.view(channels // C, -1),
        positions,
        y.view(-1),
        step // C,
        tokens,
        length,
        stretch_of("forward", tokens, channels),
    )


def launch_backward(dy, x, weight, position_ids, silu, dx) -> torch.Tensor:
    """dx ← the gradient of x; returns that of the weight, float32 [D, W]. dy, x and dx [B, T, D], slices of longer rows
    among them."""
    (batch, length, channels), C = x.shape, CHANNELS["backward"]
    tokens = batch * length
    weight, positions = _weight_and_positions(x, weight, position_ids)
    launch = _launchers(weight.shape[1], x.dtype, weight.dtype, positions.dtype, silu, True)
    (dy_row, dy_step), (x_row, x_step), (dx_row, dx_step) = as_row(dy), as_row(x), as_row(dx)
    assert dx_row.data_ptr() == dx.data_ptr(), "the rows of dx begin at multiples of 16 bytes"
    stretch = stretch_of("backward", tokens, channels)
    sums = x.new_empty(-(-tokens // stretch), channels // C, weight.shape[1] * C, dtype=torch.float32)
    launch["backward"](
        dy_row,
        x_row,
        weight.view(channels // C, -1),
        positions,
        dx_row,
        sums,
        dy_step // C,
        x_step // C,
        dx_step // C,
        tokens,
        length,
        stretch,
    )
    return sums.sum(0).view(weight.shape)


def _forward(x, weight, position_ids, silu):
    y = x.new_empty(x.shape)
    launch_forward(x, weight, position_ids, silu, x.requires_grad or weight.requires_grad, y)
    return y


def _backward(dy, x, weight, position_ids, silu):
    """dx in x's dtype; dweight in the weight's."""
    dx = x.new_empty(x.shape)
    return dx, launch_backward(dy, x, weight, position_ids, silu, dx).to(weight.dtype)


@cache
def _update_launcher(width, dtype, weight_dtype, silu):
    return launcher(update_specialisation(width, name_of(dtype), name_of(weight_dtype), silu))


def update(x, state, weight, activation):
    """As `causal_conv1d_update`, x [B, D] with D a multiple of 8, state contiguous."""
    (rows, channels), width = x.shape, weight.shape[1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if rows:
        weight = weight_as_read(weight, x.dtype)
        groups = channels // UPDATED
        _update_launcher(width, x.dtype, weight.dtype, activation == "silu")(
            as_read(x).view(rows, groups, -1),
            state.view(rows, groups, -1),
            weight.view(groups, -1),
            y.view(rows, groups, -1),
        )
    return y


_forward_op = define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? position_ids, bool silu) -> Tensor",
    _forward,
    lambda x, *_: x.new_empty(x.shape),
)
_backward_op = define(
    "causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? position_ids, bool silu) -> (Tensor, Tensor)",
    _backward,
    lambda dy, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, x, weight, position_ids, silu):
        ctx.save_for_backward(x, weight, position_ids)
        ctx.silu = silu
        return below_autograd(_forward_op, keyset, x, weight, position_ids, silu)

    @staticmethod
    def backward(ctx, dy):
        dx, dweight = _backward_op(dy, *ctx.saved_tensors, ctx.silu)
        return None, dx, dweight, None, None


def _autograd(keyset, x, weight, position_ids, silu):
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _CausalConv1d.apply(keyset, x, weight, position_ids, silu)
    return below_autograd(_forward_op, keyset, x, weight, position_ids, silu)


differentiate(_forward_op, _autograd)
differentiate_no_further(_backward_op, "the short convolution")
