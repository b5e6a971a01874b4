"""The gated delta rule in chunks, in plain PyTorch: any device, differentiable, float32 inside.

Per document and value head, with γ_i = exp(g_1 + … + g_i) inside a chunk of C tokens and Γ_ij = γ_i / γ_j (i ≥ j):

    A  = (I + tril(diag(β) (Γ ∘ K Kᵀ), −1))⁻¹
    U  = A diag(β) V             Wk = A diag(β) diag(γ) K
    V' = U − Wk S                O  = scale · (diag(γ) Q S + (Γ ∘ Q Kᵀ) V')         S ← γ_C S + (diag(γ_C/γ) K)ᵀ V'

(Yang et al. 2024, "Gated Delta Networks", section 3.3.) Only the three products with S are serial; everything else is
computed for all chunks at once.

Layout. Every document is cut into chunks of its own, the last one padded with tokens that do nothing (k = 0, β = 0,
g = 0). Chunks are stored by their number inside the document: first the first chunk of every document, then the second
of those that have one, and so on, with the documents sorted by length. A step of the scan is then one contiguous slice
over all documents that are still running. Dense batches are packed ones of equal lengths.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from qlakernels.gated_delta_rule.gates import log_decay, step_size
from qlakernels.gated_delta_rule.reference import L2_EPS

CHUNK = 64


@dataclass(frozen=True)
class ChunkLayout:
    """Where tokens and documents lie in the chunked order. Made on the host from the document bounds alone."""

    steps: tuple[int, ...]  # documents running at each step of the scan, never growing
    token_slot: torch.Tensor  # int64 [tokens]: place of each token among chunks * CHUNK places
    document_order: torch.Tensor  # int64 [N]: documents from the longest to the shortest
    document_rank: torch.Tensor  # int64 [N]: its inverse

    @property
    def chunks(self) -> int:
        return sum(self.steps)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept here may be used in training later
def chunk_layout(bounds: tuple[int, ...], device: torch.device) -> ChunkLayout:
    """bounds: the host values of `cu_seqlens` [N+1]."""
    cu = torch.tensor(bounds)
    lengths = cu.diff()
    counts = (lengths + CHUNK - 1) // CHUNK
    order = torch.argsort(counts, descending=True, stable=True)
    rank = torch.argsort(order)
    most = int(counts.max()) if len(counts) else 0
    running = (counts[None, :] > torch.arange(most)[:, None]).sum(1)
    first = torch.cat([running.new_zeros(1), running.cumsum(0)[:-1]])  # first chunk of each step
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position = torch.arange(bounds[-1]) - cu[:-1][document]
    slot = (first[position // CHUNK] + rank[document]) * CHUNK + position % CHUNK
    return ChunkLayout(tuple(running.tolist()), slot.to(device), order.to(device), rank.to(device))


class _Decay(torch.autograd.Function):
    """g [..., C] → γ [..., C] and Γ [..., C, C] (zero above the diagonal).

    The exponents are differences of sums kept in float64, so that strong decay costs no digits. The gradient of g is
    summed in the form in which every term carries its own decay,

        dg_m = Σ_{i ≥ m} dγ_i γ_i + Σ_{i ≥ m > j} dΓ_ij Γ_ij,

    never as row sums minus column sums: there the terms of the diagonal, which are of order one and cancel exactly,
    would drown the rest.
    """

    @staticmethod
    def forward(ctx, g: torch.Tensor):
        total = g.double().cumsum(-1)
        gamma = total.exp().to(g.dtype)
        ratio = (total[..., :, None] - total[..., None, :]).to(g.dtype)
        upper = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
        ratio = ratio.masked_fill_(upper, float("-inf")).exp_()
        ctx.save_for_backward(gamma, ratio)
        return gamma, ratio

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_gamma: torch.Tensor, d_ratio: torch.Tensor):
        gamma, ratio = ctx.saved_tensors
        size = gamma.shape[-1]
        from_here_on = torch.ones(size, size, dtype=gamma.dtype, device=gamma.device).triu()  # [m, i]: i ≥ m
        crossing = (from_here_on @ (d_ratio * ratio)).tril(-1).sum(-1)
        return crossing + (d_gamma * gamma) @ from_here_on.T


def chunk_gated_delta_rule_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    bounds: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Checked arguments of `chunk_gated_delta_rule`, with the document bounds on the host."""
    out_dtype, out_shape = v.dtype, v.shape
    (key_heads, key_dim), (value_heads, value_dim) = k.shape[2:], v.shape[2:]
    group = value_heads // key_heads
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    if use_gate_in_kernel:
        g = log_decay(g, A_log, dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = step_size(beta, allow_neg_eigval)

    layout = chunk_layout(bounds, q.device)

    def chunked(x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, D] → [chunks, H, C, D], zeros in the padding"""
        heads, dim = x.shape[2:]
        places = x.new_zeros(layout.chunks * CHUNK, heads, dim, dtype=compute)
        places = places.index_copy(0, layout.token_slot, x.flatten(0, 1).to(compute))
        return places.view(layout.chunks, CHUNK, heads, dim).transpose(1, 2)

    q, k, v = chunked(q), chunked(k), chunked(v)
    g, beta = chunked(g[..., None])[..., 0], chunked(beta[..., None])
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS) for x in (q, k))
    q = q * scale
    gamma, ratio = _Decay.apply(g)
    to_end = ratio[..., -1, :, None]  # γ_C / γ_j

    def grouped(x: torch.Tensor) -> torch.Tensor:
        """one key head for each of its value heads: [chunks, Hk, …] → [chunks, Hv, …]"""
        if group == 1:
            return x
        return x.unsqueeze(2).expand(-1, -1, group, *x.shape[2:]).flatten(1, 2)

    kt = k.transpose(-1, -2)
    system = beta * ratio * grouped(k @ kt)  # only its strictly lower part is read
    scores = ratio * grouped(q @ kt)
    k, q = grouped(k), grouped(q)
    targets = torch.cat([beta * v, (beta * gamma[..., None]) * k], dim=-1)
    u, wk = torch.linalg.solve_triangular(system, targets, upper=False, unitriangular=True).split(
        [value_dim, key_dim], dim=-1
    )
    readers = torch.cat([wk, gamma[..., None] * q], dim=2)  # both read S: [chunks, Hv, 2C, K]
    writers = (to_end * k).transpose(-1, -2)
    decay = gamma[..., -1, None, None]

    if initial_state is None:
        state = q.new_zeros(len(bounds) - 1, value_heads, key_dim, value_dim)
    else:
        state = initial_state.to(compute).index_select(0, layout.document_order)
    finished, corrections, reads = [], [], []
    step_inputs = (x.split(layout.steps) for x in (u, readers, writers, decay))
    for u_i, readers_i, writers_i, decay_i in zip(*step_inputs, strict=True):
        running = u_i.shape[0]
        if running < state.shape[0]:
            finished.append(state[running:])
            state = state[:running]
        predicted, read = (readers_i @ state).split(CHUNK, dim=2)
        correction = u_i - predicted
        state = decay_i * state + writers_i @ correction
        corrections.append(correction)
        reads.append(read)
    if corrections:
        o = torch.cat(reads) + scores @ torch.cat(corrections)
        o = o.transpose(1, 2).flatten(0, 1).index_select(0, layout.token_slot)
    else:
        o = v.new_zeros(0, value_heads, value_dim)
    final_state = None
    if output_final_state:
        final_state = torch.cat([state, *reversed(finished)]).index_select(0, layout.document_rank)
    return o.view(out_shape).to(out_dtype), final_state


def dense_bounds(batch: int, tokens: int) -> tuple[int, ...]:
    """A dense batch as packed documents of equal lengths."""
    return tuple(range(0, batch * tokens + 1, tokens)) if tokens else (0,) * (batch + 1)
