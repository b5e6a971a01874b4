"""The loss over a large vocabulary in half precision, without ever holding all logits or any of them in float32."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qlakernels.cross_entropy import cross_entropy_
from qlakernels.products import add_weight_gradient_, weight_gradient

TOKENS_AT_ONCE = 4096  # whose logits are held; fewer would read and write the gradient of the weight more often


def linear_cross_entropy(
    x_ND: torch.Tensor, labels_N: torch.Tensor, weight: torch.Tensor, cast: torch.Tensor
) -> torch.Tensor:
    """Sum over the tokens of −log softmax(x Wᵀ)[label], float32; the gradients are made in the forward.

    A slice of tokens at a time: logits in half precision with sums in float32, their gradient in their place, and from
    it those of x and W. The backward multiplies both, in place, by what the loss is weighted with.

    Args:
        x_ND: [N, D].
        labels_N: int64 [N], −100 where there is none.
        weight: [vocabulary, D]; it is not read, and gets the gradient.
        cast: [≥ vocabulary, D], the weight in half precision, and nothing below it but zeros.

    Raises:
        RuntimeError: the backward is run a second time.
    """
    return _LinearCrossEntropy.apply(x_ND.to(cast.dtype), labels_N, weight, cast)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, weight, cast):
        words = len(weight)
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        nll = torch.zeros((), device=x.device)
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = None
        for i in range(0, len(x), TOKENS_AT_ONCE):
            rows = slice(i, i + TOKENS_AT_ONCE)
            logits = F.linear(x[rows], cast)
            nll += cross_entropy_(logits, labels[rows], words, with_gradient=any(wanted)).sum()
            dlogits = logits  # in their place
            if wanted[0]:
                torch.mm(dlogits, cast, out=dx[rows])
            if wanted[1]:
                dlogits = dlogits[:, :words]
                if dweight is None:
                    dweight = weight_gradient(dlogits, x[rows], weight.dtype)
                else:
                    add_weight_gradient_(dweight, dlogits, x[rows])
        ctx.gradients = [dx, dweight]
        return nll

    @staticmethod
    def backward(ctx, dnll):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy gives its gradients once: call it again for another backward")
        dx, dweight = ctx.gradients
        ctx.gradients = None
        for gradient in (dx, dweight):
            if gradient is not None:
                torch._foreach_mul_([gradient], dnll.to(gradient.dtype))  # mul_ by a scalar on the device: half as fast
        return dx, None, dweight, None


class _Tied(torch.autograd.Function):
    """Of rows of a weight that is the head's as well: one gradient for both uses, without a second one of its size."""

    @staticmethod
    def forward(ctx, tokens, weight, cast):
        ctx.save_for_backward(tokens)
        ctx.of_weight = weight.shape, weight.dtype
        return F.embedding(tokens, cast), weight.view_as(weight)

    @staticmethod
    def backward(ctx, dx, dweight):
        (tokens,), (shape, dtype) = ctx.saved_tensors, ctx.of_weight
        if dweight is None:
            dweight = dx.new_zeros(shape, dtype=dtype)
        dweight.index_put_((tokens.flatten(),), dx.flatten(0, -2).to(dtype), accumulate=True)
        return None, dweight, None


class Embedded(NamedTuple):
    x: torch.Tensor  # [..., D] in half precision
    weight: torch.Tensor  # for the head: what gives its gradient to both


def embed_tied(tokens: torch.Tensor, weight: torch.Tensor, cast: torch.Tensor) -> Embedded:
    """Rows of a weight whose other use is in the head.

    Args:
        tokens: int64.
        weight: [vocabulary, D]; it is not read.
        cast: [≥ vocabulary, D], the weight in half precision.
    """
    return Embedded(*_Tied.apply(tokens, weight, cast))
