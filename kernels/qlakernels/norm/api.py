"""`rms_norm_gated`: RMSNorm over the value dimension of each head, gated by SiLU."""

import torch
import torch.nn.functional as F

from qlakernels.backends import Backend, Call, register, select

OPERATOR = "rms_norm_gated"


def rms_norm_gated(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, backend: str = "auto"
) -> torch.Tensor:
    """y = weight ∘ x / rms(x) ∘ SiLU(gate), statistics and gate in float32.

    Args:
        x, gate: [..., D].
        weight: [D].
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype. The normalised x is rounded to x's dtype before the weight, as in transformers' Qwen3.5.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x has shape {list(x.shape)}, gate {list(gate.shape)}, weight {list(weight.shape)}: "
            "give [..., D], the same, and [D]"
        )
    call = Call(torch.device(x.device.type), x.dtype, x.shape[-1], x.shape[-1])
    return select(OPERATOR, backend, call).run(x, gate, weight, eps)


def _run_torch(x, gate, weight, eps):
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
    return (weight * normed * F.silu(gate.float())).to(x.dtype)


register(OPERATOR, Backend("torch", lambda call: None, _run_torch))
