"""The loss over a large vocabulary in half precision, without ever holding all logits or any of them in float32."""

from functools import cache

import torch
import torch.nn.functional as F

from qlakernels.products import add_weight_gradient, weight_gradient

TOKENS_AT_ONCE = 4096  # whose logits are held; fewer would read and write the gradient of the weight more often
IGNORED = -100


def linear_cross_entropy(
    x_ND: torch.Tensor, labels_N: torch.Tensor, weight: torch.Tensor, cast: torch.Tensor
) -> torch.Tensor:
    """Sum over the tokens of −log softmax(x Wᵀ)[label], float32; the gradients are made in the forward.

    A slice of tokens at a time: logits in half precision with sums in float32, their gradient in their place, and from
    it those of x and W. The backward multiplies both by what the loss is weighted with.

    Args:
        x_ND: [N, D].
        labels_N: int64 [N], −100 where there is none.
        weight: [vocabulary, D]; it is not read, and gets the gradient.
        cast: [≥ vocabulary, D], the weight in half precision, and nothing below it but zeros.
    """
    return _LinearCrossEntropy.apply(x_ND.to(cast.dtype), labels_N, weight, cast)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, weight, cast):
        cast = cast[: weight.shape[0]]
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        nll = torch.zeros((), device=x.device)
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = None
        for i in range(0, len(x), TOKENS_AT_ONCE):
            rows = slice(i, i + TOKENS_AT_ONCE)
            logits = F.linear(x[rows], cast)
            nll += _of_logits(logits, labels[rows], any(wanted))
            dlogits = logits  # in their place
            if wanted[0]:
                torch.mm(dlogits, cast, out=dx[rows])
            if wanted[1]:
                if dweight is None:
                    dweight = weight_gradient(dlogits, x[rows], weight.dtype)
                else:
                    dweight = add_weight_gradient(dweight, dlogits, x[rows])
        ctx.save_for_backward(dx, dweight)
        return nll

    @staticmethod
    def backward(ctx, dnll):
        dx, dweight = ctx.saved_tensors
        return (
            None if dx is None else dx * dnll.to(dx.dtype),
            None,
            None if dweight is None else dweight * dnll.to(dweight.dtype),
            None,
        )


def _of_logits(logits, labels, with_gradient):
    """The sum of −log softmax at the labels; logits ← its gradient, if that is wanted."""
    of_logits = _compiled(_softmax_and_sums) if logits.is_cuda else _softmax_and_sums
    return of_logits(logits, labels, with_gradient)


def _softmax_and_sums(logits, labels, with_gradient):
    there = labels != IGNORED
    labels = labels.masked_fill(~there, 0)[:, None]
    values = logits.float()
    top = values.amax(1, keepdim=True)
    log_sum = (values - top).exp().sum(1, keepdim=True).log() + top
    nll = ((log_sum - values.gather(1, labels))[:, 0] * there).sum()
    if with_gradient:
        index = torch.arange(logits.shape[1], device=logits.device)
        gradient = (values - log_sum).exp() - (index == labels).float()
        logits.copy_(gradient * there[:, None])
    return nll


@cache
def _compiled(function):
    """Three passes over the logits where eager operators take twelve."""
    return torch.compile(function, dynamic=True)
