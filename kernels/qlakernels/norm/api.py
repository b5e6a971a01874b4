"""`rms_norm_gated`: RMSNorm over the value dimension of each head, gated by SiLU."""

import torch
import torch.nn.functional as F

from qlakernels.backends import Backend, Call, refused_by_hopper, register, select
from qlakernels.norm.hopper.sizes import LANES

OPERATOR = "rms_norm_gated"


def rms_norm_gated(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, backend: str = "auto"
) -> torch.Tensor:
    """y = weight ∘ x / rms(x) ∘ SiLU(gate), statistics and gate in float32.

    Args:
        x, gate: [..., D].
        weight: [D].
        eps: added to the mean square.
        backend: auto, torch, or tilelang, our kernels for Hopper GPUs (D 64, 96, 128, 192 or 256, the gate in x's
            dtype), which auto leaves out until a GPU has confirmed them.

    Returns:
        [..., D] in x's dtype. The normalised x is rounded to x's dtype before the weight, as in transformers' Qwen3.5;
        torch rounds its product with a weight in half precision as well, tilelang does not.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x has shape {list(x.shape)}, gate {list(gate.shape)}, weight {list(weight.shape)}: "
            "give [..., D], the same, and [D]"
        )
    mixed = frozenset() if gate.dtype == x.dtype else frozenset({"mixed_dtypes"})
    call = Call(torch.device(x.device.type), x.dtype, x.shape[-1], x.shape[-1], options=mixed)
    return select(OPERATOR, backend, call).run(x, gate, weight, eps)


def _run_torch(x, gate, weight, eps):
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
    return (weight * normed * F.silu(gate.float())).to(x.dtype)


def refuses_tilelang(call: Call) -> str | None:
    if reason := refused_by_hopper(call):
        return reason
    if call.value_dim not in LANES:
        return f"takes D in {tuple(LANES)}, not D={call.value_dim}"
    if call.options:
        return "takes a gate in x's dtype only"
    return None


def _run_tilelang(x, gate, weight, eps):
    from qlakernels.norm.hopper.operator import run

    return run(x, gate, weight, eps)


register(OPERATOR, Backend("tilelang", refuses_tilelang, _run_tilelang))
register(OPERATOR, Backend("torch", lambda call: None, _run_torch))
