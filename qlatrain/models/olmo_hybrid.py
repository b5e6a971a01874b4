"""The layers of OLMo-Hybrid. Numerically and by parameter name those of transformers' `olmo_hybrid`.

What differs from Qwen3.5: norms centred on one; a norm in front of the mixer and MLP of a Gated DeltaNet block, but
behind those of an attention block; queries and keys normed over all heads at once; attention without a gate, and in the
released models without positions; a projection of its own for each of q, k, v and the gate.

Shape suffixes as in `layers.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from qlakernels import causal_conv1d
from qlatrain.config import ModelConfig
from qlatrain.models.attention import packed_causal_attention
from qlatrain.models.joint import Joint
from qlatrain.models.layers import MLP, DeltaRuleMixer, GatedRMSNorm, ShortConvolution, apply_rotary, branch

GATED_NORM_EPS = 1e-5  # that of FLA's layer, which OLMo-core trains with, whatever rms_norm_eps says


class OlmoRMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 up to the result."""

    offset = 0.0  # of the weight

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).type_as(x)


class OlmoGatedDeltaNet(DeltaRuleMixer):
    """Gated DeltaNet whose filters for q, k and v lie behind each other in one `conv1d`."""

    def __init__(self, config: ModelConfig, backend: str):
        super().__init__(config, backend)
        hidden, heads = config.hidden_size, config.linear_num_value_heads
        self.q_proj = nn.Linear(hidden, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.value_dim, bias=False)
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.g_proj = nn.Linear(hidden, self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.value_dim, hidden, bias=False)
        self.conv1d = ShortConvolution(self.heads.convolved, config.linear_conv_kernel_dim)
        self.o_norm = GatedRMSNorm(self.head_v_dim, GATED_NORM_EPS)
        self.joint_in = Joint(self, "q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj")
        self.joint_out = Joint(self, "o_proj")

    def of_products(self, joint_BTC: torch.Tensor, documents) -> torch.Tensor:
        return self.as_one(joint_BTC, documents, self.o_norm)

    def forward(self, x_BTD: torch.Tensor, documents) -> torch.Tensor:
        if self.goes_as_one:
            return self.of_products(self.joint_in(x_BTD), documents)
        filters = self.conv1d.weight.squeeze(1).split([self.key_dim, self.key_dim, self.value_dim])
        q_BTC, k_BTC, v_BTC = (
            causal_conv1d(projection(x_BTD), weight, documents.position_ids)
            for projection, weight in zip((self.q_proj, self.k_proj, self.v_proj), filters, strict=True)
        )
        o_BTHV = self.delta_rule(q_BTC, k_BTC, v_BTC, self.a_proj(x_BTD), self.b_proj(x_BTD), documents)
        gate_BTHV = self.g_proj(x_BTD).unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(self.o_norm(o_BTHV, gate_BTHV).flatten(-2))


class OlmoAttention(nn.Module):
    """Full attention with queries and keys normed over all their heads, and RoPE only where the config has a theta."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_dim, kv_dim = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=config.attention_bias)
        self.q_norm = OlmoRMSNorm(query_dim, config.rms_norm_eps)
        self.k_norm = OlmoRMSNorm(kv_dim, config.rms_norm_eps)
        self.joint_in = Joint(self, "q_proj", "k_proj", "v_proj")
        self.joint_out = Joint(self, "o_proj")

    def forward(self, x_BTD: torch.Tensor, documents, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        q_BTC, k_BTC, v_BTC = self.joint_in.apart(x_BTD)
        q_BTHK = self.q_norm(q_BTC).unflatten(-1, (-1, self.head_dim))
        k_BTHK = self.k_norm(k_BTC).unflatten(-1, (-1, self.head_dim))
        v_BTHK = v_BTC.unflatten(-1, (-1, self.head_dim))
        if rotary is not None:
            q_BTHK, k_BTHK = apply_rotary(q_BTHK, rotary), apply_rotary(k_BTHK, rotary)
        (out_BTD,) = self.joint_out.apart(packed_causal_attention(q_BTHK, k_BTHK, v_BTHK, documents).flatten(-2))
        return out_BTD


class OlmoGatedDeltaNetBlock(nn.Module):
    """norm → mixer → residual, norm → MLP → residual."""

    def __init__(self, config: ModelConfig, backend: str):
        super().__init__()
        self.linear_attn = OlmoGatedDeltaNet(config, backend)
        self.mlp = MLP(config)
        self.input_layernorm = OlmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OlmoRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        delta_BTD: torch.Tensor | None,
        documents,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream is x + delta, coming in and going out."""
        x_BTD, delta_BTD = branch(self.input_layernorm, self.linear_attn, x_BTD, delta_BTD, documents)
        return branch(self.post_attention_layernorm, self.mlp, x_BTD, delta_BTD)


class OlmoAttentionBlock(nn.Module):
    """mixer → norm → residual, MLP → norm → residual (OLMo 2, arXiv 2501.00656, section 3.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = OlmoAttention(config)
        self.mlp = MLP(config)
        self.post_attention_layernorm = OlmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = OlmoRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        delta_BTD: torch.Tensor | None,
        documents,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As a Gated DeltaNet block's."""
        if delta_BTD is not None:
            x_BTD = x_BTD + delta_BTD
        x_BTD = x_BTD + self.post_attention_layernorm(self.self_attn(x_BTD, documents, rotary))
        return x_BTD, self.post_feedforward_layernorm(self.mlp(x_BTD))


def olmo_block(config: ModelConfig, kind: str, backend: str) -> nn.Module:
    """The block for a layer of this kind, `gdn` or `attn`."""
    return OlmoGatedDeltaNetBlock(config, backend) if kind == "gdn" else OlmoAttentionBlock(config)
