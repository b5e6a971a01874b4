"""Cross entropy on Hopper as a torch operator, one launch. Nothing here reads a value from the device."""

from functools import cache

import torch

from qlakernels.compiled import launcher
from qlakernels.cross_entropy.hopper import kernels  # noqa: F401  makes them known
from qlakernels.cross_entropy.hopper.sizes import PIECE
from qlakernels.operators import define, name_of


@cache
def _launcher(dtype):
    return launcher(("cross_entropy", name_of(dtype)))


def _run(logits, labels, words, with_gradient):
    if logits.data_ptr() % 16:
        raise ValueError(
            f"logits begins at {logits.data_ptr() % 16} bytes past a multiple of 16: give one that begins at a multiple"
        )
    nll = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    if nll.numel():
        pieces = logits.shape[1] // PIECE
        _launcher(logits.dtype)(logits.view(-1), labels.contiguous(), nll, pieces, words, int(with_gradient))
    return nll


cross_entropy = define(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, SymInt words, bool with_gradient) -> Tensor",
    _run,
    lambda logits, labels, *_: logits.new_empty(labels.shape, dtype=torch.float32),
)
