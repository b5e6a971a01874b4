"""`swiglu`, SiLU(gate) ∘ up of two products that lie side by side (Shazeer 2020), and more of an MLP around it."""

import torch
import torch.nn.functional as F

from qlakernels.backends import Backend, Call, refused_by_hopper, register, select
from qlakernels.products import product_again, product_with, weight_gradients

OPERATOR = "swiglu"


def call_of(together: torch.Tensor) -> Call:
    """What decides which backend runs."""
    width = together.shape[-1] // 2
    return Call(torch.device(together.device.type), together.dtype, width, width)


def swiglu(together: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """y = SiLU(g) ∘ u, in float32 and rounded once.

    Args:
        together: [..., 2 F], g in front of u.
        backend: auto, tilelang (our kernels for Hopper GPUs, F a multiple of 8) or torch.

    Returns:
        [..., F] in together's dtype.
    """
    return _Swiglu.apply(together, backend)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, together, backend):
        ctx.save_for_backward(together)
        ctx.backend = backend
        return select(OPERATOR, backend, call_of(together)).run.forward(together)

    @staticmethod
    def backward(ctx, dy):
        (together,) = ctx.saved_tensors
        return gradients(dy, together, ctx.backend)[0], None


def gradients(dy: torch.Tensor, together: torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `together`, and y once more, in one pass."""
    return select(OPERATOR, backend, call_of(together)).run.backward(dy, together)


def swiglu_down(together: torch.Tensor, down_weight: torch.Tensor, down_cast: torch.Tensor) -> torch.Tensor:
    """swiglu(together) W_downᵀ, which keeps `together` alone: the pass that makes its gradient makes the other factor
    of the weight's gradient anew.

    Args:
        together: [..., 2 F].
        down_weight: [D_out, F], gets the gradient, in its own dtype.
        down_cast: [D_out, F] in together's dtype: what is multiplied with.

    Returns:
        [..., D_out].
    """
    return _SwigluDown.apply(together, down_cast, down_weight)


class _SwigluDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, together, down_cast, down_weight):
        ctx.save_for_backward(together, down_cast)
        ctx.dtype = down_weight.dtype
        return torch.matmul(select(OPERATOR, "auto", call_of(together)).run.forward(together), down_cast.t())

    @staticmethod
    def backward(ctx, dy):
        together, down_cast = ctx.saved_tensors
        d_together, between = gradients(torch.matmul(dy, down_cast), together)
        return d_together, None, *weight_gradients(dy, between, [len(down_cast)], [ctx.dtype], ctx.needs_input_grad[2:])


def swiglu_mlp(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    cast: torch.Tensor,
    down_weight: torch.Tensor,
    down_cast: torch.Tensor,
    keep_products: bool = True,
) -> torch.Tensor:
    """(SiLU(x W_gateᵀ) ∘ (x W_upᵀ)) W_downᵀ (Shazeer 2020), which keeps x and both products.

    Args:
        x: [..., D].
        weights: gate and up, [F, D] each, or both in one tensor, [2 F, D]; with down_weight, [D_out, F], they get the
            gradients, in their own dtypes.
        cast: [2 F, D], gate above up, and down_cast [D_out, F], in x's dtype; they are what is multiplied with.
        keep_products: without, the first two products are made anew in the backward as well, and x alone is kept.

    Returns:
        [..., D_out].
    """
    if keep_products:
        return swiglu_down(product_with(x, weights, cast), down_weight, down_cast)
    return _SwigluMLP.apply(x, cast, down_cast, down_weight, *weights)


class _SwigluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cast, down_cast, down_weight, *weights):
        ctx.save_for_backward(x, cast, down_cast)
        ctx.dtypes = [weight.dtype for weight in (down_weight, *weights)]
        ctx.rows = [weight.shape[0] for weight in weights]
        together = torch.matmul(x, cast.t())
        return torch.matmul(select(OPERATOR, "auto", call_of(together)).run.forward(together), down_cast.t())

    @staticmethod
    def backward(ctx, dy):
        x, cast, down_cast = ctx.saved_tensors
        d_together, between = gradients(torch.matmul(dy, down_cast), product_again(x, cast))
        dx = torch.matmul(d_together, cast) if ctx.needs_input_grad[0] else None
        return (
            dx,
            None,
            None,
            *weight_gradients(dy, between, [len(down_cast)], ctx.dtypes[:1], ctx.needs_input_grad[3:4]),
            *weight_gradients(d_together, x, ctx.rows, ctx.dtypes[1:], ctx.needs_input_grad[4:]),
        )


class _Torch:
    @staticmethod
    def forward(together):
        gate, up = (part.float() for part in together.chunk(2, dim=-1))
        return (F.silu(gate) * up).to(together.dtype)

    @staticmethod
    def backward(dy, together):
        gate, up = (part.float() for part in together.chunk(2, dim=-1))
        dy, sigmoid = dy.float(), torch.sigmoid(gate)
        silu = gate * sigmoid
        d_gate = dy * up * (sigmoid + silu * (1 - sigmoid))
        d_together = torch.cat([d_gate, dy * silu], dim=-1).to(together.dtype)
        return d_together, (silu * up).to(together.dtype)


class _TileLang:
    @staticmethod
    def forward(together):
        from qlakernels.swiglu.hopper import operator

        return operator.forward(together)

    @staticmethod
    def backward(dy, together):
        from qlakernels.swiglu.hopper import operator

        return operator.backward(dy, together)


def refuses_tilelang(call: Call) -> str | None:
    if reason := refused_by_hopper(call):
        return reason
    return None if call.value_dim % 8 == 0 else f"takes F a multiple of 8, not {call.value_dim}"


register(OPERATOR, Backend("tilelang", refuses_tilelang, _TileLang))
register(OPERATOR, Backend("torch", lambda call: None, _Torch))
