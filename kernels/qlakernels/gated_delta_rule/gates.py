"""The raw gate inputs of Gated DeltaNet turned into log decay and step size, in float32.

    g = −exp(A_log) · softplus(a + dt_bias)          β = m · sigmoid(b),  m = 2 with negative eigenvalues, else 1

Sources: Yang et al. 2024 (Gated Delta Networks) for the decay; Grazzi et al. 2024 (Unlocking State-Tracking in
Linear RNNs Through Negative Eigenvalues) for m = 2.
"""

import torch
import torch.nn.functional as F


def log_decay(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor | None) -> torch.Tensor:
    """a [..., Hv], A_log and dt_bias [Hv]; returns float32 [..., Hv], every entry ≤ 0."""
    a = a.float() if dt_bias is None else a.float() + dt_bias.float()
    return -A_log.float().exp() * F.softplus(a)


def step_size(b: torch.Tensor, allow_neg_eigval: bool) -> torch.Tensor:
    """b [..., Hv]; returns float32 in (0, 1), or (0, 2) with negative eigenvalues."""
    beta = b.float().sigmoid()
    return beta * 2.0 if allow_neg_eigval else beta
