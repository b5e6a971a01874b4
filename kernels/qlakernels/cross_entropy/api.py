"""`cross_entropy_`: −log softmax at the labels, and its gradient in the place of the logits."""

from functools import cache

import torch
import torch.nn.functional as F

from qlakernels.backends import Backend, Call, refused_by_hopper, register, select
from qlakernels.cross_entropy.hopper.sizes import IGNORED

OPERATOR = "cross_entropy"


def call_of(logits: torch.Tensor) -> Call:
    """What decides which backend runs."""
    columns = logits.shape[-1]
    return Call(torch.device(logits.device.type), logits.dtype, columns, columns)


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, words: int, with_gradient: bool, backend: str = "auto"
) -> torch.Tensor:
    """−log softmax(logits[:, :words]) at the labels; logits ← its gradient, softmax − onehot, if that is wanted.

    In float32, the gradient rounded once. What lies behind the words is padding: it is not looked at, and its gradient
    is 0. A row without a label has a loss and a gradient of 0, whatever it holds. One whose label is no word, or whose
    logits hold NaN or +∞, has NaN for both.

    Args:
        logits: [N, C], contiguous, C ≥ words, of any floating dtype; nothing that autograd watches.
        labels: int64 [N], −100 where there is none.
        words: the columns of the softmax, 1 at least.
        backend: auto, tilelang (our kernel for Hopper GPUs, bfloat16 and float16, C a multiple of 8) or torch.

    Returns:
        float32 [N].

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(
            f"logits has shape {list(logits.shape)} and strides {list(logits.stride())}: give a contiguous [N, C]"
        )
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits requires a gradient, and would be overwritten with it: give logits.detach()")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels is {labels.dtype} of shape {list(labels.shape)}: give torch.int64 of [{logits.shape[0]}]"
        )
    if not 1 <= words <= logits.shape[1]:
        raise ValueError(f"words={words}: give 1 to {logits.shape[1]}, the columns of logits")
    return select(OPERATOR, backend, call_of(logits)).run(logits, labels, words, with_gradient)


def _run_torch(logits, labels, words, with_gradient):
    run = _compiled(_softmax) if logits.is_cuda else _softmax
    return run(logits, labels, words, with_gradient)


def _softmax(logits, labels, words, with_gradient):
    ignored = labels == IGNORED
    wrong = ~ignored & ((labels < 0) | (labels >= words))
    label = labels.clamp(0, words - 1)[:, None]
    values = logits[:, :words].float()
    top = values.amax(1, keepdim=True)
    log_sum = (values - top).exp().sum(1, keepdim=True).log() + top
    nll = (log_sum - values.gather(1, label))[:, 0]
    if with_gradient:
        index = torch.arange(words, device=logits.device)
        gradient = (values - log_sum).exp() - (index == label).float()
        gradient = gradient.masked_fill(wrong[:, None], torch.nan).masked_fill(ignored[:, None], 0)
        logits.copy_(F.pad(gradient, (0, logits.shape[1] - words)))
    return nll.masked_fill(wrong, torch.nan).masked_fill(ignored, 0)


@cache
def _compiled(function):
    """Three passes over the logits where eager operators take twelve."""
    return torch.compile(function, dynamic=True)


def _run_tilelang(logits, labels, words, with_gradient):
    from qlakernels.cross_entropy.hopper.operator import cross_entropy

    return cross_entropy(logits, labels, words, with_gradient)


def refuses_tilelang(call: Call) -> str | None:
    if reason := refused_by_hopper(call):
        return reason
    return None if call.value_dim % 8 == 0 else f"takes C a multiple of 8, not {call.value_dim}"


register(OPERATOR, Backend("tilelang", refuses_tilelang, _run_tilelang))
register(OPERATOR, Backend("torch", lambda call: None, _run_torch))
