"""Matrix products of linear layers in half precision over weights that are kept in float32."""

import torch

from qlakernels.operators import define


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dyᵀ x of [N, D_out] and [N, D_in] in `dtype`, summed in float32 and rounded at most once.

    From half precision to float32 nothing is rounded on a GPU: the tensor cores' sums are stored as they are.
    """
    return _weight_gradient_op(dy, x, dtype)


def product_again(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weightᵀ, for a backward that makes it anew: a trace of both directions would keep what it finds in it twice."""
    return _product_again_op(x, weight)


def add_weight_gradient_(total: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    """total += dyᵀ x, of total's dtype, in one pass over it where a GPU sums half precision in float32."""
    if total.dtype == torch.float32 and dy.dtype != total.dtype and dy.is_cuda:
        torch.addmm(total, dy.t(), x, out_dtype=total.dtype, out=total)
    else:
        total += weight_gradient(dy, x, total.dtype)


def _weight_gradient(dy, x, dtype):
    if dtype == torch.float32 and dy.dtype != dtype and dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return torch.mm(dy.t(), x).to(dtype)


_weight_gradient_op = define(
    "weight_gradient(Tensor dy, Tensor x, ScalarType dtype) -> Tensor",
    _weight_gradient,
    lambda dy, x, dtype: dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype),
)
_product_again_op = define(
    "product_again(Tensor x, Tensor weight) -> Tensor",
    lambda x, weight: torch.matmul(x, weight.t()),
    lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]),
)


def product_with(x: torch.Tensor, weights: tuple[torch.Tensor, ...], cast: torch.Tensor) -> torch.Tensor:
    """x castᵀ, where `cast` holds the weights below each other, in x's dtype.

    Args:
        x: [..., D_in].
        weights: [D_i, D_in] each, of any floating-point dtype. They are not read: they get the gradients, in their own
            dtypes.
        cast: [D_out, D_in], D_out ≥ Σ D_i; what is below the weights is a constant.

    Returns:
        [..., D_out].
    """
    return _Product.apply(x, cast, *weights)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cast, *weights):
        ctx.save_for_backward(x, cast)
        ctx.rows = [weight.shape[0] for weight in weights]
        ctx.dtypes = [weight.dtype for weight in weights]
        return torch.matmul(x, cast.t())

    @staticmethod
    def backward(ctx, dy):
        x, cast = ctx.saved_tensors
        dx = torch.matmul(dy, cast) if ctx.needs_input_grad[0] else None
        return dx, None, *weight_gradients(dy, x, ctx.rows, ctx.dtypes, ctx.needs_input_grad[2:])


def weight_gradients(dy, x, rows, dtypes, wanted) -> list[torch.Tensor | None]:
    """Of weights below each other, with so many rows each, from dy [..., D_out] and x [..., D_in]: of all in one
    product, if one is wanted."""
    if not any(wanted):
        return [None] * len(rows)
    together = weight_gradient(dy.flatten(0, -2)[:, : sum(rows)], x.flatten(0, -2), dtypes[0])
    return [gradient.to(dtype) for gradient, dtype in zip(together.split(rows), dtypes, strict=True)]
