"""transformers' functions of a Gated DeltaNet layer, with their arguments, computed by qlakernels.

The layers give the convolution its channels first, [B, D, T], and `cu_seq_lens_q`; the rule gets the same boundaries as
`cu_seqlens`. Both get `seq_idx`. B batch (1 when packed), T tokens, D channels, H heads, K key dimension, V value
dimension.
"""

import torch
import torch.nn.functional as F

import qlakernels
from qlakernels.backends import backend_names, is_passed_over


def causal_conv1d_fn(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str,
    cu_seq_lens_q: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """The causal depthwise convolution, each document for itself.

    Args:
        hidden_states: [B, D, T]. With a cache there may be more tokens in front: zeros, where the prefill is shorter
            than the filter, or those of the step before.
        weight: [D, W].
        cu_seq_lens_q, seq_idx: boundaries of documents among the last tokens.
        backend: of the gated delta rule, see `own_backend`.
        kwargs: what else the layer was called with; not read, as in transformers.

    Returns:
        [B, D, T] in the dtype of hidden_states.
    """
    if bias is not None:
        raise ValueError(
            f"the convolution has a bias of shape {list(bias.shape)}, which qlakernels has not: "
            "use transformers' functions for this model"
        )
    x_BTD = hidden_states.transpose(1, 2)
    bounds = document_bounds(cu_seq_lens_q, seq_idx)
    y_BTD = qlakernels.causal_conv1d(
        x_BTD.contiguous(),  # without a copy where there is no cache: the layer turned a projection around
        weight,
        position_ids=None if bounds is None else positions_at_the_end(bounds, x_BTD.shape[1]),
        activation=activation,
        backend=own_backend("causal_conv1d", backend),
    )
    return y_BTD.transpose(1, 2)


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    backend: str,
    cu_seqlens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule over many tokens, each document for itself.

    Args:
        query, key [B, T, Hk, K]; value [B, T, Hv, V]; g [B, T, Hv], float32; beta [B, T, Hv], of any dtype.
        chunk_size: not read; the backends have sizes of their own.
        initial_state: [B, Hv, K, V], what a cache holds.
        backend: of qlakernels' gated delta rule.

    Returns:
        [B, T, Hv, V] in value's dtype; float32 states [N, Hv, K, V] of the N documents (B where nothing is packed).

    Raises:
        ValueError: packed documents that start from a cache, or more rows than one of them.
    """
    bounds = document_bounds(cu_seqlens, seq_idx)
    if bounds is not None and initial_state is not None:
        raise ValueError(
            f"{bounds.numel() - 1} packed documents (cu_seq_lens_q or seq_idx) start from a cache of "
            f"{initial_state.shape[0]} rows, and it is not said which continues which: give a new cache, or none"
        )
    return qlakernels.chunk_gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=bounds,
        backend=backend,
    )


def rms_norm_gated(norm: torch.nn.Module, hidden_states: torch.Tensor, gate: torch.Tensor, *, backend: str):
    """The forward of a gated norm: its own weight and epsilon, normalised before the gate, rounded where theirs is."""
    if norm.activation != "silu":
        raise ValueError(
            f"the gated norm has activation={norm.activation!r}, and qlakernels only 'silu': "
            "use transformers' functions for this model"
        )
    return qlakernels.rms_norm_gated(
        hidden_states, gate, norm.weight, eps=norm.variance_epsilon, backend=own_backend("rms_norm_gated", backend)
    )


def own_backend(operator: str, backend: str) -> str:
    """`backend` where `operator` has one of that name that auto could take, otherwise auto."""
    has_it = backend in backend_names(operator) and not is_passed_over(operator, backend)
    return backend if has_it else "auto"


def document_bounds(cu_seqlens: torch.Tensor | None, seq_idx: torch.Tensor | None) -> torch.Tensor | None:
    """Boundaries of packed documents, int [N+1], or None.

    cu_seqlens: int [N+1], taken as it is. seq_idx: int [1, T], the number of each token's document; read where there is
    no cu_seqlens, at the cost of a wait for the device, since how many documents there are decides a shape.
    """
    if cu_seqlens is not None or seq_idx is None:
        return cu_seqlens
    if seq_idx.dim() != 2 or seq_idx.shape[0] != 1:
        raise ValueError(f"seq_idx has shape {list(seq_idx.shape)}: pack the documents into one row, [1, T]")
    row = seq_idx[0]
    starts = (row[1:] != row[:-1]).nonzero()[:, 0] + 1
    ends = starts.new_tensor([0, row.numel()])
    return torch.cat([ends[:1], starts, ends[1:]]).to(torch.int32)


def positions_at_the_end(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """[1, tokens]: distance of each token to the start of its document, where the documents are the last of the tokens.

    What lies in front of them is a document of its own. Nothing here waits for the device.
    """
    starts = cu_seqlens.long()
    starts = starts + (tokens - starts[-1])
    index = torch.arange(tokens, device=starts.device)
    document = torch.searchsorted(starts, index, right=True)  # 0 in front of the first
    return (index - F.pad(starts, (1, 0))[document])[None]
