"""The parts of a hybrid decoder. Numerically and by parameter name those of transformers' `qwen3_5` text model.

Shape suffixes: B batch (1 when packed), T tokens, D hidden, H heads, K key dimension, V value dimension, F MLP.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlakernels import add_rms_norm, causal_conv1d, chunk_gated_delta_rule, gated_delta_net, rms_norm_gated
from qlakernels.backends import select
from qlakernels.gated_delta_net.api import OPERATOR, Heads, call_of, refuses_tilelang
from qlakernels.residual_norm import normed_product
from qlakernels.swiglu import api as swiglu
from qlakernels.swiglu import swiglu_down, swiglu_mlp
from qlatrain.config import ModelConfig
from qlatrain.models.attention import packed_causal_attention
from qlatrain.models.joint import Joint


class RMSNorm(nn.Module):
    """Zero-centred: x / rms(x) · (1 + weight), statistics in float32, so that weight decay pulls towards identity."""

    offset = 1.0  # of the weight

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.offset + self.weight.float(), self.eps).type_as(x)


def normed(norm: nn.Module, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, its norm), delta of any dtype; norm: one that has a weight, an `offset` of it and an `eps`."""
    delta = None if delta is None else delta.to(x.dtype)
    return add_rms_norm(x, delta, norm.weight, norm.eps, norm.offset)


def branch(
    norm: nn.Module, part: nn.Module, x: torch.Tensor, delta: torch.Tensor | None, *rest
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next branch of a residual stream that is x + delta: (x + delta, what the part makes of its norm).

    Where the part's first projections are one product, the normed rows are not kept for the backward.
    """
    if part.takes_products:
        delta = None if delta is None else delta.to(x.dtype)
        weights, cast = part.joint_in.receivers(), part.joint_in.cast
        x, products = normed_product(x, delta, norm.weight, norm.eps, weights, cast, norm.offset)
        return x, part.of_products(products, *rest)
    x, y = normed(norm, x, delta)
    return x, part(y, *rest)


class GatedRMSNorm(nn.Module):
    """The norm on the GDN output; its weight is centred on one, and SiLU(gate) multiplies the result."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return rms_norm_gated(x, gate, self.weight, self.eps)


class ShortConvolution(nn.Module):
    """Holds the depthwise filter under the name and in the shape [channels, 1, width] of `nn.Conv1d`."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def forward(self, x_BTC: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(x_BTC, self.weight.squeeze(1), position_ids)


class DeltaRuleMixer(nn.Module):
    """What the Gated DeltaNet layers of every architecture share: head sizes, decay parameters, and the rule.

    `A_log` and `dt_bias` stay float32 whatever the module is cast to: rounded to bfloat16 they change the decay of
    long memories by percents, and A near 0 becomes log 0.
    """

    FLOAT32_PARAMETERS = ("A_log", "dt_bias")

    def __init__(self, config: ModelConfig, backend: str):
        super().__init__()
        self.heads = Heads(
            config.linear_num_key_heads,
            config.linear_key_head_dim,
            config.linear_num_value_heads,
            config.linear_value_head_dim,
        )
        self.key_dim, self.value_dim = self.heads.keys, self.heads.values
        self.head_k_dim, self.head_v_dim = self.heads.key_dim, self.heads.value_dim
        self.allow_neg_eigval = config.allow_neg_eigval
        self.backend = backend
        self.keep_convolved = True  # queries and keys for the backward; else they are made anew
        self.dt_bias = nn.Parameter(torch.empty(config.linear_num_value_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(config.linear_num_value_heads, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name).data for name in self.FLOAT32_PARAMETERS}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = value.to(parameter.device)
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.float()
        return self

    @property
    def goes_as_one(self) -> bool:
        """Whether the whole mixer is one operator: where both projections are cast, and no other rule was asked for."""
        cast = self.joint_in.cast is not None and self.joint_out.cast is not None
        return cast and self.backend in ("auto", "tilelang")

    def is_one_operator(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it is where projections are cast to this dtype."""
        call = call_of(torch.empty(0, dtype=dtype, device=device), self.conv1d.weight.shape[-1], self.heads)
        plain = self.joint_in.plain and self.joint_out.plain
        return plain and self.backend in ("auto", "tilelang") and refuses_tilelang(call) is None

    def decide(self, joint: torch.Tensor) -> None:
        """Has the choice of a backend made and said, which the trace of a compiled block could not; joint: any tensor
        of the dtype and on the device of the projections."""
        if self.goes_as_one:
            select(OPERATOR, self.backend, call_of(joint, self.conv1d.weight.shape[-1], self.heads))

    takes_products = goes_as_one

    def as_one(self, joint_BTC: torch.Tensor, documents, norm: GatedRMSNorm) -> torch.Tensor:
        """joint: the input projections side by side."""
        (out_weight,), rows = self.joint_out.receivers(), documents.rows
        packed = {
            "position_ids": documents.position_ids,
            "cu_seqlens": documents.cu_seqlens,
            "cu_seqlens_cpu": documents.cu_seqlens_cpu,
        }
        out_BTD = gated_delta_net(
            joint_BTC if rows is None else joint_BTC.view(rows, -1, joint_BTC.shape[-1]),
            self.conv1d.weight.squeeze(1),
            self.A_log,
            self.dt_bias,
            norm.weight,
            out_weight,
            self.heads,
            out_cast=self.joint_out.unpadded,
            eps=norm.eps,
            allow_neg_eigval=self.allow_neg_eigval,
            keep_convolved=self.keep_convolved,
            backend=self.backend,
            **(packed if rows is None else {}),
        )
        return out_BTD.view(*joint_BTC.shape[:2], -1)

    def delta_rule(self, q_BTC, k_BTC, v_BTC, a_BTH, b_BTH, documents) -> torch.Tensor:
        """Convolved q, k and v of all heads side by side, raw decay a and raw step size b → [B, T, H, V]."""
        o_BTHV, _ = chunk_gated_delta_rule(
            q_BTC.unflatten(-1, (-1, self.head_k_dim)),
            k_BTC.unflatten(-1, (-1, self.head_k_dim)),
            v_BTC.unflatten(-1, (-1, self.head_v_dim)),
            g=a_BTH,
            beta=b_BTH,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            cu_seqlens=documents.cu_seqlens,
            cu_seqlens_cpu=documents.cu_seqlens_cpu,
            backend=self.backend,
        )
        return o_BTHV


class GatedDeltaNet(DeltaRuleMixer):
    """Token mixer with a matrix state for each value head (Yang et al. 2024, "Gated Delta Networks")."""

    def __init__(self, config: ModelConfig, backend: str):
        super().__init__(config, backend)
        channels = self.heads.convolved
        self.in_proj_qkv = nn.Linear(config.hidden_size, channels, bias=False)
        self.in_proj_z = nn.Linear(config.hidden_size, self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(config.hidden_size, config.linear_num_value_heads, bias=False)
        self.in_proj_a = nn.Linear(config.hidden_size, config.linear_num_value_heads, bias=False)
        self.conv1d = ShortConvolution(channels, config.linear_conv_kernel_dim)
        self.norm = GatedRMSNorm(self.head_v_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_dim, config.hidden_size, bias=False)
        self.joint_in = Joint(self, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")
        self.joint_out = Joint(self, "out_proj")

    def of_products(self, joint_BTC: torch.Tensor, documents) -> torch.Tensor:
        return self.as_one(joint_BTC, documents, self.norm)

    def forward(self, x_BTD: torch.Tensor, documents) -> torch.Tensor:
        if self.goes_as_one:
            return self.of_products(self.joint_in(x_BTD), documents)
        qkv_BTC = self.conv1d(self.in_proj_qkv(x_BTD), documents.position_ids)
        q_BTC, k_BTC, v_BTC = qkv_BTC.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        o_BTHV = self.delta_rule(q_BTC, k_BTC, v_BTC, self.in_proj_a(x_BTD), self.in_proj_b(x_BTD), documents)
        z_BTHV = self.in_proj_z(x_BTD).unflatten(-1, (-1, self.head_v_dim))
        return self.out_proj(self.norm(o_BTHV, z_BTHV).flatten(-2))


class GatedAttention(nn.Module):
    """Full attention with normalised queries and keys, partial RoPE, grouped queries and a sigmoid output gate."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * config.head_dim * 2, bias=bias)  # queries and gates
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.joint_in = Joint(self, "q_proj", "k_proj", "v_proj")
        self.joint_out = Joint(self, "o_proj")

    @property
    def takes_products(self) -> bool:
        return self.joint_in.cast is not None

    def of_products(self, joint_BTC: torch.Tensor, documents, rotary) -> torch.Tensor:
        return self._attend(*self.joint_in.split(joint_BTC), documents, rotary)

    def forward(self, x_BTD: torch.Tensor, documents, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self._attend(*self.joint_in.apart(x_BTD), documents, rotary)

    def _attend(self, q_BTC, k_BTC, v_BTC, documents, rotary) -> torch.Tensor:
        q_BTHK, gate_BTHK = q_BTC.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        k_BTHK = k_BTC.unflatten(-1, (-1, self.head_dim))
        v_BTHK = v_BTC.unflatten(-1, (-1, self.head_dim))
        q_BTHK = apply_rotary(self.q_norm(q_BTHK), rotary)
        k_BTHK = apply_rotary(self.k_norm(k_BTHK), rotary)
        o_BTHK = packed_causal_attention(q_BTHK, k_BTHK, v_BTHK, documents)
        (out_BTD,) = self.joint_out.apart((o_BTHK * gate_BTHK.sigmoid()).flatten(-2))
        return out_BTD


def rotary_table(
    position_ids: torch.Tensor, head_dim: int, partial_rotary_factor: float, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """position_ids [B, T] → cosines and sines [B, T, 1, R], R = head_dim · partial_rotary_factor, angles in float32.

    Source: Su et al. 2021 (RoFormer), in the half-split order of Qwen and Llama.
    """
    rotated = int(head_dim * partial_rotary_factor)
    exponent = torch.arange(0, rotated, 2, dtype=torch.float32, device=position_ids.device) / rotated
    angles = position_ids[..., None].float() * (1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_BTHK: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates the first R dimensions of each head and passes the others through; the result keeps x's dtype."""
    cos, sin = rotary
    turned, passed = x_BTHK.split([cos.shape[-1], x_BTHK.shape[-1] - cos.shape[-1]], dim=-1)
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([turned.type_as(passed), passed], dim=-1)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.joint_in = Joint(self, "gate_proj", "up_proj")
        self.joint_out = Joint(self, "down_proj")
        self.keep_products = True  # for the backward; else they are made anew

    @property
    def is_cast(self) -> bool:
        return self.joint_in.cast is not None and self.joint_out.cast is not None

    @property
    def takes_products(self) -> bool:
        return self.is_cast and self.keep_products

    def decide(self, x_BTD: torch.Tensor) -> None:
        """As that of a mixer."""
        if self.is_cast:
            together = x_BTD.new_empty(0, 2 * self.down_proj.in_features)
            select(swiglu.OPERATOR, "auto", swiglu.call_of(together))

    def of_products(self, together_BTF: torch.Tensor) -> torch.Tensor:
        (down_weight,) = self.joint_out.receivers()
        return swiglu_down(together_BTF[..., : 2 * self.down_proj.in_features], down_weight, self.joint_out.unpadded)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.is_cast:
            cast, down_cast = self.joint_in.unpadded, self.joint_out.unpadded
            (down_weight,) = self.joint_out.receivers()
            weights = self.joint_in.receivers()
            return swiglu_mlp(x_BTD.to(cast.dtype), weights, cast, down_weight, down_cast, self.keep_products)
        if not self.keep_products and torch.is_grad_enabled():
            return checkpoint(self._apart, x_BTD, use_reentrant=False)
        return self._apart(x_BTD)

    def _apart(self, x_BTD: torch.Tensor) -> torch.Tensor:
        gate_BTF, up_BTF = self.joint_in.apart(x_BTD)
        (out_BTD,) = self.joint_out.apart(F.silu(gate_BTF) * up_BTF)
        return out_BTD


class Block(nn.Module):
    """norm → mixer → residual, norm → MLP → residual. The mixer is `gdn` or `attn`."""

    def __init__(self, config: ModelConfig, kind: str, backend: str):
        super().__init__()
        self.kind = kind
        if kind == "gdn":
            self.linear_attn = GatedDeltaNet(config, backend)
        else:
            self.self_attn = GatedAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BTD: torch.Tensor, delta_BTD: torch.Tensor | None, documents, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream is x + delta, coming in and going out: the next norm adds them as it reads them."""
        if self.kind == "gdn":
            x_BTD, delta_BTD = branch(self.input_layernorm, self.linear_attn, x_BTD, delta_BTD, documents)
        else:
            x_BTD, delta_BTD = branch(self.input_layernorm, self.self_attn, x_BTD, delta_BTD, documents, rotary)
        return branch(self.post_attention_layernorm, self.mlp, x_BTD, delta_BTD)
