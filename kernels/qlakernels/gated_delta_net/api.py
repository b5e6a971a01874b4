"""`gated_delta_net`: short convolution, gated delta rule, gated norm and output projection, as one operator.

As one they leave out what lies between operators: gradients of slices that are put together again, outputs that are
kept although a pass over memory makes them anew.
"""

from dataclasses import dataclass

import torch

from qlakernels.backends import Backend, Call, register, select
from qlakernels.checks import check_cu_seqlens
from qlakernels.gated_delta_rule.api import chunk_gated_delta_rule
from qlakernels.gated_delta_rule.api import refuses_tilelang as rule_refuses
from qlakernels.norm.api import refuses_tilelang as norm_refuses
from qlakernels.norm.api import rms_norm_gated
from qlakernels.products import product_with
from qlakernels.short_conv.api import causal_conv1d
from qlakernels.short_conv.api import refuses_tilelang as convolution_refuses

OPERATOR = "gated_delta_net"


@dataclass(frozen=True)
class Heads:
    """key_heads Hk of size key_dim K; value_heads Hv, a multiple of Hk, of size value_dim V."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def convolved(self) -> int:
        return 2 * self.keys + self.values

    @property
    def joint(self) -> tuple[int, int, int, int]:
        """Where q, k and v together, the gate, the raw decay and the raw step size end in a row of `joint`."""
        gate = self.convolved + self.values
        return self.convolved, gate, gate + self.value_heads, gate + 2 * self.value_heads

    def parts(self, joint: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slices of rows like those of `joint`: q, k and v together, the gate by heads, a, b."""
        qkv, z, a, b = (joint[..., i:j] for i, j in zip((0, *self.joint), self.joint, strict=False))
        return qkv, z.unflatten(-1, (self.value_heads, self.value_dim)), a, b

    def by_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slices of q, k and v together, each by its heads; v has none where `qkv` ends with k."""
        values = qkv.shape[-1] - 2 * self.keys
        q, k, v = qkv.split([self.keys, self.keys, values], dim=-1)
        of_keys, of_values = (self.key_heads, self.key_dim), (values // self.value_dim, self.value_dim)
        return q.unflatten(-1, of_keys), k.unflatten(-1, of_keys), v.unflatten(-1, of_values)


def gated_delta_net(
    joint: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    out_weight: torch.Tensor,
    heads: Heads,
    *,
    out_cast: torch.Tensor | None = None,
    eps: float = 1e-6,
    allow_neg_eigval: bool = False,
    position_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    keep_convolved: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """From the input projections of a Gated DeltaNet layer to its output.

    y = rms_norm_gated(chunk_gated_delta_rule(q, k, v, …), z) W_outᵀ with q, k, v = SiLU(conv(joint)), normalised q and
    k, and the decay and step size made of a and b inside (Yang et al. 2024, "Gated Delta Networks").

    Args:
        joint: [B, T, C], C ≥ 2·Hk·K + 2·Hv·V + 2·Hv: q, k, v, the gate z, the raw decay a and the raw step size b, side
            by side; what comes behind them is not read, and its gradient is zero.
        conv_weight: [2·Hk·K + Hv·V, W], the filters of q, k and v.
        A_log, dt_bias: [Hv] float32.
        norm_weight: [V].
        out_weight: [D, Hv·V].
        heads: sizes.
        out_cast: out_weight in joint's dtype, for callers that have it: its gradient is then out_weight's, in
            out_weight's dtype, without having been rounded to joint's.
        eps: of the gated norm.
        allow_neg_eigval: step sizes reach up to 2.
        position_ids: int [B, T], the position of each token in its document; needed with cu_seqlens.
        cu_seqlens: int [N+1], boundaries of documents packed along T; needs B = 1.
        cu_seqlens_cpu: the same on the host, for callers that have them.
        keep_convolved: the backward finds q and k as the convolution made them, 4·Hk·K bytes a token; without, it makes
            them anew.
        backend: auto, tilelang (Hopper GPUs; keeps joint, o and what the rule keeps, and makes the rest anew in the
            backward) or torch, which calls the operators one after the other, each with its own choice of a backend.

    Returns:
        [B, T, D] in joint's dtype.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    if joint.dim() != 3 or joint.shape[-1] < heads.joint[-1]:
        raise ValueError(f"joint has shape {list(joint.shape)}: give [B, T, C] with C of at least {heads.joint[-1]}")
    expected = {
        "conv_weight": (conv_weight, heads.convolved, conv_weight.shape[-1]),
        "A_log": (A_log, heads.value_heads),
        "dt_bias": (dt_bias, heads.value_heads),
        "norm_weight": (norm_weight, heads.value_dim),
        "out_weight": (out_weight, out_weight.shape[0], heads.values),
    }
    for name, (x, *shape) in expected.items():
        if list(x.shape) != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}: give {shape}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, cu_seqlens_cpu, *joint.shape[:2])
        if position_ids is None:
            raise ValueError("cu_seqlens was given without position_ids: give both")
    if position_ids is not None and position_ids.shape != joint.shape[:2]:
        raise ValueError(f"position_ids has shape {list(position_ids.shape)}: give [B, T] = {list(joint.shape[:2])}")
    call = call_of(joint, conv_weight.shape[1], heads)
    return select(OPERATOR, backend, call).run(
        joint, conv_weight, A_log, dt_bias, norm_weight, out_weight, heads, out_cast, eps, allow_neg_eigval,
        position_ids, cu_seqlens, cu_seqlens_cpu, keep_convolved,
    )  # fmt: skip


def call_of(joint: torch.Tensor, width: int, heads: Heads) -> Call:
    """What decides which backend runs."""
    return Call(torch.device(joint.device.type), joint.dtype, heads.key_dim, heads.value_dim, width=width)


def _run_torch(
    joint, conv_weight, A_log, dt_bias, norm_weight, out_weight, heads, out_cast, eps, neg, position_ids, cu, cu_cpu,
    keep_convolved,
):  # fmt: skip
    qkv, gate, a, b = heads.parts(joint)
    o, _ = chunk_gated_delta_rule(
        *heads.by_heads(causal_conv1d(qkv, conv_weight, position_ids)),
        g=a,
        beta=b,
        A_log=A_log,
        dt_bias=dt_bias,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=neg,
        cu_seqlens=cu,
        cu_seqlens_cpu=cu_cpu,
    )
    y = rms_norm_gated(o, gate, norm_weight, eps).flatten(-2)
    return product_with(y, (out_weight,), out_weight.to(y.dtype) if out_cast is None else out_cast)


def refuses_tilelang(call: Call) -> str | None:
    """What any of its parts refuses."""
    channels = Call(call.device, call.dtype, 8, 8, width=call.width)  # of the convolution: heads are multiples of 8
    return rule_refuses(call) or convolution_refuses(channels) or norm_refuses(call)


def _run_tilelang(*arguments):
    from qlakernels.gated_delta_net.fused import run

    return run(*arguments)


register(OPERATOR, Backend("tilelang", refuses_tilelang, _run_tilelang))
register(OPERATOR, Backend("torch", lambda call: None, _run_torch))
