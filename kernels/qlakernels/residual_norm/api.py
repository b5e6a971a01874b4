"""`add_rms_norm`: a residual stream's next sum and its RMSNorm (Zhang and Sennrich 2019) together, and
`normed_product`, which multiplies the normed rows with weights and does not keep them."""

import torch
import torch.nn.functional as F

from qlakernels.backends import Backend, Call, refused_by_hopper, register, select
from qlakernels.products import weight_gradients
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
    return select(OPERATOR, backend, call_of(x)).run.forward(x, delta, weight, eps, offset)


def normed_product(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weights: tuple[torch.Tensor, ...],
    cast: torch.Tensor,
    offset: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """total and normed castᵀ, of total and normed as `add_rms_norm` has them; the total alone is kept for the backward,
    which makes the normed rows again in the pass that makes their gradients.

    Args:
        x, delta, norm_weight, eps, offset, backend: as there.
        weights, cast: as of `products.product_with`, for rows of D.

    Returns:
        total [..., D] and [..., rows of cast].
    """
    total, product = _NormedProduct.apply(x, delta, norm_weight, cast, eps, offset, backend, *weights)
    return x if delta is None else total, product


class _NormedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, norm_weight, cast, eps, offset, backend, *weights):
        total, normed = add_rms_norm(x, delta, norm_weight, eps, offset, backend)
        ctx.save_for_backward(total, norm_weight, cast)
        ctx.numbers, ctx.backend, ctx.with_delta = (eps, offset), backend, delta is not None
        ctx.rows = [weight.shape[0] for weight in weights]
        ctx.dtypes = [weight.dtype for weight in weights]
        # an input is no output: without a delta, what else arrives at x is added by whoever has x
        return total if ctx.with_delta else None, torch.matmul(normed, cast.t())

    @staticmethod
    def backward(ctx, d_total, dy):
        total, norm_weight, cast = ctx.saved_tensors
        run = select(OPERATOR, ctx.backend, call_of(total)).run
        d, d_norm_weight, normed = run.gradients(
            torch.matmul(dy, cast), d_total if ctx.with_delta else None, total, norm_weight, *ctx.numbers
        )
        gradients = weight_gradients(dy, normed, ctx.rows, ctx.dtypes, ctx.needs_input_grad[7:])
        return d, d if ctx.with_delta else None, d_norm_weight, None, None, None, None, *gradients


class _Torch:
    @staticmethod
    def forward(x, delta, weight, eps, offset):
        total = x if delta is None else x + delta
        return total, F.rms_norm(total.float(), total.shape[-1:], offset + weight.float(), eps).type_as(x)

    @staticmethod
    def gradients(d_normed, d_total, total, weight, eps, offset):
        exact = torch.promote_types(total.dtype, torch.float32)
        scale, x, a = offset + weight.to(exact), total.to(exact), d_normed.to(exact)
        r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        n = x * r
        d_weight = (a * n).flatten(0, -2).sum(0)
        a = a * scale
        d = r * (a - n * (a * n).mean(-1, keepdim=True))
        if d_total is not None:
            d = d + d_total
        return d.to(total.dtype), d_weight.to(weight.dtype), (n * scale).to(total.dtype)


def refuses_tilelang(call: Call) -> str | None:
    return refused_by_hopper(call) or refuses_width(call.value_dim)


def refuses_width(dim: int) -> str | None:
    if dim % PIECE or not 0 < dim <= MAX_DIM:
        return f"takes D a multiple of {PIECE} up to {MAX_DIM}, not {dim}"
    return None


class _TileLang:
    @staticmethod
    def forward(x, delta, weight, eps, offset):
        from qlakernels.residual_norm.hopper import operator

        return operator.run(x, delta, weight, eps, offset)

    @staticmethod
    def gradients(d_normed, d_total, total, weight, eps, offset):
        from qlakernels.residual_norm.hopper import operator

        return operator.backward_and_normed(d_normed, d_total, total, weight, eps, offset)


register(OPERATOR, Backend("tilelang", refuses_tilelang, _TileLang))
register(OPERATOR, Backend("torch", lambda call: None, _Torch))
