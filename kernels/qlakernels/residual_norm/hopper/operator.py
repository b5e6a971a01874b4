"""The norm of a residual stream on Hopper as differentiable torch operators: a launch forward, one backward and a sum.

Kept for the backward: the total and the weight. Nothing here reads a value from the device.

Without a delta the total is the input, which an operator may not return: then the operator is another one, that makes
the normed rows alone, and autograd adds what else arrives at the input.
"""

from functools import cache

import torch

from qlakernels.compiled import launchers
from qlakernels.operators import (
    as_read,
    below_autograd,
    define,
    differentiate,
    differentiate_no_further,
    name_of,
    weight_as_read,
)
from qlakernels.residual_norm.hopper.kernels import specialisations
from qlakernels.residual_norm.hopper.sizes import MULTIPROCESSORS, abreast_of, batch_of, blocks_of


def run(x, delta, weight, eps, offset):
    """As `add_rms_norm`: x, delta [..., D] of one half-precision dtype, weight [D] → total and normed, [..., D]."""
    if delta is None:
        return x, _norm_op(x, weight, eps, offset)
    return _add_op(x, delta, weight, eps, offset)


@cache
def _launchers(dim, dtype, weight_dtype, residual, keep, with_normed=False):
    return launchers(specialisations(dim, name_of(dtype), name_of(weight_dtype), residual, keep, with_normed))


def grid_of(rows: int, dim: int) -> int:
    """Blocks of the backward: as many as run at once, or fewer, if there is a batch of rows for each."""
    return min(-(-rows // (batch_of("backward", dim) * abreast_of(dim))), MULTIPROCESSORS * blocks_of("backward", dim))


def _launch_forward(x, delta, weight, eps, offset, total, normed):
    """total, normed ← those of rows; without a delta, total is left alone."""
    keep = any(t is not None and t.requires_grad for t in (x, delta, weight))
    if x.numel() == 0:
        return
    x, weight = as_read(x), weight_as_read(weight, x.dtype)
    delta = x if delta is None else as_read(delta)  # where there is none, the kernel does not touch its place
    launch = _launchers(x.shape[-1], x.dtype, weight.dtype, total is not None, keep)["forward"]
    flat = (t.view(-1) for t in (normed if total is None else total, normed))
    launch(x.view(-1), delta.view(-1), weight, *flat, x.numel() // x.shape[-1], eps, offset)


def _add(x, delta, weight, eps, offset):
    total, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch_forward(x, delta, weight, eps, offset, total, normed)
    return total, normed


def _norm(x, weight, eps, offset):
    normed = x.new_empty(x.shape)
    _launch_forward(x, None, weight, eps, offset, None, normed)
    return normed


def _backward(d_normed, d_total, total, weight, eps, offset):
    """The gradient of the total, in its dtype, and the weight's in the weight's: summed in float32, in an order that
    depends on shapes alone."""
    return _launch_backward(d_normed, d_total, total, weight, eps, offset, None)


def _backward_and_normed(d_normed, d_total, total, weight, eps, offset):
    """The same, and the normed rows of the forward."""
    normed = total.new_empty(total.shape)
    return *_launch_backward(d_normed, d_total, total, weight, eps, offset, normed), normed


def _launch_backward(d_normed, d_total, total, weight, eps, offset, normed):
    d = total.new_empty(total.shape)
    if total.numel() == 0:
        return d, torch.zeros_like(weight)
    dim, rows = total.shape[-1], total.numel() // total.shape[-1]
    kernel_weight = weight_as_read(weight, total.dtype)
    options = total.dtype, kernel_weight.dtype, d_total is not None, True, normed is not None
    sums = torch.empty(grid_of(rows, dim), dim, dtype=torch.float32, device=total.device)
    d_normed, total = as_read(d_normed), as_read(total)
    d_total = d_normed if d_total is None else as_read(d_total)  # as above
    flat = (t.view(-1) for t in (d_normed, d_total, total))
    written = d.view(-1), (d if normed is None else normed).view(-1)
    _launchers(dim, *options)["backward"](*flat, kernel_weight, *written, sums, rows, eps, offset)
    return d, sums.sum(0).to(weight.dtype)


_add_op = define(
    "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
    _add,
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
_norm_op = define(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
    _norm,
    lambda x, *_: x.new_empty(x.shape),
)
_backward_op = define(
    "add_rms_norm_backward(Tensor d_normed, Tensor? d_total, Tensor total, Tensor weight, float eps, float offset)"
    " -> (Tensor, Tensor)",
    _backward,
    lambda d_normed, d_total, total, weight, *_: (total.new_empty(total.shape), weight.new_empty(weight.shape)),
)

backward_and_normed = define(
    "add_rms_norm_backward_and_normed(Tensor d_normed, Tensor? d_total, Tensor total, Tensor weight, float eps,"
    " float offset) -> (Tensor, Tensor, Tensor)",
    _backward_and_normed,
    lambda d_normed, d_total, total, weight, *_: (
        total.new_empty(total.shape),
        weight.new_empty(weight.shape),
        total.new_empty(total.shape),
    ),
)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, x, delta, weight, eps, offset):
        total, normed = below_autograd(_add_op, keyset, x, delta, weight, eps, offset)
        ctx.save_for_backward(total, weight)
        ctx.numbers = eps, offset
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx, d_total, d_normed):
        if d_normed is None:
            return None, d_total, d_total, None, None, None
        d, d_weight = _backward_op(d_normed, d_total, *ctx.saved_tensors, *ctx.numbers)
        return None, d, d, d_weight, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, x, weight, eps, offset):
        ctx.save_for_backward(x, weight)
        ctx.numbers = eps, offset
        return below_autograd(_norm_op, keyset, x, weight, eps, offset)

    @staticmethod
    def backward(ctx, d_normed):
        return None, *_backward_op(d_normed, None, *ctx.saved_tensors, *ctx.numbers), None, None


def _autograd(function, op):
    def kernel(keyset, *inputs):
        if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs):
            return function.apply(keyset, *inputs)
        return below_autograd(op, keyset, *inputs)

    return kernel


differentiate(_add_op, _autograd(_AddRMSNorm, _add_op))
differentiate(_norm_op, _autograd(_RMSNorm, _norm_op))
differentiate_no_further(_backward_op, "the residual norm")
