"""The gated delta rule token by token in float64: slow, obvious, and what every test trusts.

Per value head, with decay γ_t = exp(g_t) and step size β_t (Yang et al. 2024, "Gated Delta Networks", eq. 10):

    S_t = γ_t S_{t-1} + k_t ⊗ β_t (v_t − (γ_t S_{t-1})ᵀ k_t)        o_t = scale · S_tᵀ q_t
"""

import itertools

import torch
import torch.nn.functional as F

L2_EPS = 1e-6  # inside the root, as FLA and transformers have it


def recurrent_gated_delta_rule_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `chunk_gated_delta_rule`, token by token; o [B, T, Hv, V] and states [N, Hv, K, V] in float64."""
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    batch, tokens, key_heads, key_dim = k.shape
    value_heads, value_dim = v.shape[2:]
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS) for x in (q, k))
    if use_gate_in_kernel:
        g = g if dt_bias is None else g + dt_bias.double()
        g = -A_log.double().exp() * F.softplus(g)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    scale = key_dim**-0.5 if scale is None else scale
    q, k = (x.repeat_interleave(value_heads // key_heads, dim=2) for x in (q, k))

    if cu_seqlens is None:
        documents = [(b, 0, tokens) for b in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        documents = [(0, start, end) for start, end in itertools.pairwise(bounds)]
    device = q.device
    # tokens taken apart once: the backward of x[b, t] would fill a whole x for each token
    q, k, v, g, beta = ([row.unbind(0) for row in x.unbind(0)] for x in (q, k, v, g, beta))
    rows: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    states = []
    for n, (b, start, end) in enumerate(documents):
        if initial_state is None:
            state = torch.zeros(value_heads, key_dim, value_dim, dtype=torch.float64, device=device)
        else:
            state = initial_state[n].double()
        for t in range(start, end):
            state = state * g[b][t].exp()[:, None, None]
            error = (v[b][t] - torch.einsum("hkv,hk->hv", state, k[b][t])) * beta[b][t][:, None]
            state = state + k[b][t][:, :, None] * error[:, None, :]
            rows[b].append(torch.einsum("hkv,hk->hv", state, q[b][t]) * scale)
        states.append(state)
    return torch.stack([torch.stack(row) for row in rows]), torch.stack(states)
