"""AdamW in one pass over each parameter, its half-precision cast written on the way.

Why not `torch.optim.AdamW(fused=True)`: where gradients are to be scaled it writes them back, for nobody, and what
layers multiply with is then cast in a pass of its own. This one reads and writes 30 bytes a parameter where those two
move 38.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from qlakernels.adamw import update
from qlakernels.operators import as_read

# What torch.optim.AdamW has in its groups besides, for the way there and back of a state dict.
AS_TORCH: dict = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}


def no_cast(parameter: nn.Parameter) -> Tensor | None:
    return None


def own_gradient(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad


class MatrixAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) as torch.optim.AdamW(fused=True) computes it and keeps its state.

    Args:
        params: float32 parameters on one Hopper GPU, contiguous; or groups of them, as any optimizer of torch takes.
        lr, betas, eps, weight_decay: as those of torch.optim.AdamW.
        cast_of: the tensor that is to hold the rounded parameter after each step: bfloat16 or float16, of its shape,
            contiguous; None where there is none. Asked in every step. A step that is left out does not write it.
        gradient_of: the gradient of a parameter, float32, bfloat16 or float16, of its shape; None leaves it as it is.

    `found_inf` (a float tensor, 0 or 1), when set, makes `step` a no-op where it is 1, without a device wait;
    `grad_scale`, when set, is what gradients are divided by, on their way in: they stay as they are. Both are those of
    torch's fused optimizers.

    State dicts are those of torch.optim.AdamW, to and from.

    Raises:
        ValueError: a parameter or a cast that the kernel cannot take, in `step`; a state dict of AMSGrad or of a
            maximisation, in `load_state_dict`.
    """

    counts_updates: ClassVar[bool] = True  # in the versions of the parameters, which torch's fused ones leave alone

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        cast_of: Callable[[nn.Parameter], Tensor | None] = no_cast,
        gradient_of: Callable[[nn.Parameter], Tensor | None] = own_gradient,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **AS_TORCH})
        self.cast_of, self.gradient_of = cast_of, gradient_of
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    def __setstate__(self, state: dict) -> None:
        """Where a state dict is loaded, its steps may be those of an optimizer that keeps them on the host."""
        super().__setstate__(state)
        for group in self.param_groups:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"the state was saved with {option}=True, which MatrixAdamW does not have")
            group.update(AS_TORCH)
            for parameter in group["params"]:
                if kept := self.state.get(parameter):
                    step = torch.as_tensor(kept["step"], dtype=torch.float32, device=parameter.device)
                    kept["step"] = step.view(())

    @torch.no_grad()
    def step(self) -> None:
        gradients = {p: self.gradient_of(p) for group in self.param_groups for p in group["params"]}
        updated = [p for p, gradient in gradients.items() if gradient is not None]
        if not updated:
            return
        device = updated[0].device
        skip = self._number(self.found_inf, 0.0, device)
        factor = self._number(self.grad_scale, 1.0, device).reciprocal()
        taken = 1 - skip
        torch._foreach_add_([self._state_of(p)["step"] for p in updated], [taken] * len(updated))  # one is waited for
        for group in self.param_groups:
            settings = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
            for p in group["params"]:
                if (gradient := gradients[p]) is not None:
                    kept = self.state[p]
                    moments = kept["exp_avg"], kept["exp_avg_sq"]
                    update(p, *moments, as_read(gradient), self.cast_of(p), kept["step"], factor, skip, *settings)
        increment_version(updated)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        kept = self.state[parameter]
        if not kept:
            kept["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            kept["exp_avg"] = torch.zeros_like(parameter)
            kept["exp_avg_sq"] = torch.zeros_like(parameter)
        return kept

    @staticmethod
    def _number(given: Tensor | None, otherwise: float, device: torch.device) -> Tensor:
        """One float32 number on the device, []."""
        if given is None:
            return torch.full((), otherwise, device=device)
        return given.to(device, torch.float32, non_blocking=True).view(())
