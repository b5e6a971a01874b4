"""Muon: momentum whose matrix is orthogonalised before it becomes the update (Jordan et al. 2024).

Why not `torch.optim.Muon`: it walks over matrices one by one, and it cannot leave out a step whose gradient is not
finite without the host asking the device. Here matrices of one shape go through Newton-Schulz in one batched product,
and a step is left out on the device, as in torch's fused AdamW (`found_inf`).
"""

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan et al.; brings singular values to about 0.7 … 1.2
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, rows, columns] → the same with singular values near 1. bfloat16 on a GPU, float32 elsewhere."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """
    Args:
        params: matrices (2-D).
        lr: of a square matrix; the update of an [m, n] matrix is scaled by √max(1, m/n).
        momentum: Nesterov momentum.
        weight_decay: decoupled.

    `found_inf` (a float tensor, 0 or 1), when set, makes `step` a no-op where it is 1, without a device wait;
    `grad_scale`, when set, is what gradients are divided by first. Both are those of torch's fused optimizers.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                self._step(parameters, shape, **{k: group[k] for k in ("lr", "momentum", "weight_decay")})

    def _step(self, parameters: list[nn.Parameter], shape: torch.Size, lr, momentum, weight_decay) -> None:
        gradients = [p.grad for p in parameters]
        if self.grad_scale is not None:
            torch._foreach_div_(gradients, self.grad_scale)
        buffers = []
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(self.state[p]["momentum_buffer"])
        moved = torch._foreach_lerp(buffers, gradients, 1 - momentum)
        update = orthogonalise(torch.stack(torch._foreach_lerp(gradients, moved, momentum)))
        scale = lr * max(1.0, shape[0] / shape[1]) ** 0.5
        changed = torch._foreach_mul(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(changed, list(update.unbind()), alpha=-scale)
        if self.found_inf is not None:
            skip = self.found_inf.bool()
            moved = [torch.where(skip, old, new) for old, new in zip(buffers, moved, strict=True)]
            changed = [torch.where(skip, old, new) for old, new in zip(parameters, changed, strict=True)]
        torch._foreach_copy_(buffers, moved)
        torch._foreach_copy_(parameters, changed)
