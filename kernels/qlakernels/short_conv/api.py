"""`causal_conv1d`: a causal depthwise convolution with SiLU over packed or dense tokens, channels last."""

import torch
import torch.nn.functional as F

from qlakernels.backends import Backend, Call, refused_by_hopper, register, select
from qlakernels.checks import check_cu_seqlens

OPERATOR = "causal_conv1d"
UPDATE = "causal_conv1d_update"


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> torch.Tensor:
    """y_t = act(Σ_s weight[:, W−1−s] ∘ x_{t−s}), s = 0 … W−1, with zeros before the start of each document.

    Args:
        x: [B, T, D]; the channels are contiguous, so a projection's output is read as it is.
        weight: [D, W], one filter for each channel; the last tap meets the token itself.
        position_ids: int [B, T], the position of each token in its document. A tap that would reach in front of the
            document is dropped. May be left out for a dense batch.
        cu_seqlens: int [N+1], document boundaries; read only when position_ids is not given.
        activation: "silu" or None.
        backend: auto, tilelang (our kernels for Hopper GPUs, W 2 to 4 and D a multiple of 8) or torch.

    Returns:
        [B, T, D] in x's dtype.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if x.dim() != 3 or weight.dim() != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x has shape {list(x.shape)}, weight {list(weight.shape)}: give [B, T, D] and [D, W]")
    if activation not in ("silu", None):
        raise ValueError(f"activation={activation!r}: give 'silu' or None")
    if position_ids is None and cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, None, x.shape[0], x.shape[1])
        position_ids = positions_in_documents(cu_seqlens, x.shape[1])
    if position_ids is not None and position_ids.shape != x.shape[:2]:
        raise ValueError(f"position_ids has shape {list(position_ids.shape)}: give [B, T] = {list(x.shape[:2])}")
    call = Call(torch.device(x.device.type), x.dtype, x.shape[-1], x.shape[-1], width=weight.shape[1])
    return select(OPERATOR, backend, call).run(x, weight, position_ids, activation)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    activation: str | None = "silu",
    backend: str = "auto",
) -> torch.Tensor:
    """The next token of `causal_conv1d`, for decoding: moves the state on by one and convolves it. No gradients.

    Args:
        x: [B, D], a token of each sequence.
        conv_state: [B, D, W] in x's dtype, contiguous, the last W tokens, the latest last, as `conv_state_of` gives
            them and as transformers caches them; changed in place.
        weight: [D, W].
        activation: "silu" or None.
        backend: auto, tilelang (Hopper GPUs, W 2 to 4 and D a multiple of 8) or torch.

    Returns:
        [B, D] in x's dtype.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x has shape {list(x.shape)}, weight {list(weight.shape)}: give [B, D] and [D, W]")
    if conv_state.shape != (*x.shape, weight.shape[1]) or conv_state.dtype != x.dtype:
        raise ValueError(
            f"conv_state is {conv_state.dtype} of shape {list(conv_state.shape)}: "
            f"give [B, D, W] = {[*x.shape, weight.shape[1]]} in {x.dtype}"
        )
    if not conv_state.is_contiguous():
        raise ValueError(
            f"conv_state has strides {list(conv_state.stride())}: it is changed in place, make it contiguous"
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation={activation!r}: give 'silu' or None")
    call = Call(torch.device(x.device.type), x.dtype, x.shape[-1], x.shape[-1], width=weight.shape[1])
    with torch.no_grad():
        return select(UPDATE, backend, call).run(x, conv_state, weight, activation)


def conv_state_of(x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, D, W]: the last W tokens of x [B, T, D], zeros where there are fewer, for `causal_conv1d_update`."""
    last = x[:, -width:].transpose(1, 2)
    return F.pad(last, (width - last.shape[2], 0)).contiguous()


def positions_in_documents(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """[N+1] → [1, tokens]: distance of each token to the start of its document, computed where cu_seqlens lies."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), index, right=True) - 1
    return (index - cu_seqlens.long()[document])[None]


def _run_torch(x, weight, position_ids, activation):
    """W shifted multiply-adds: no transposes, and exact boundaries. In float32 or better, and rounded once: keys are
    normalised behind it, which would magnify what each tap lost."""
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    weight = weight.to(x.dtype)
    width = weight.shape[1]
    y = x * weight[:, -1]
    for shift in range(1, min(width, x.shape[1])):
        tap = x[:, :-shift] * weight[:, width - 1 - shift]
        if position_ids is not None:
            tap = tap.masked_fill((position_ids[:, shift:] < shift)[..., None], 0)
        y = y + F.pad(tap, (0, 0, shift, 0))
    return (F.silu(y) if activation == "silu" else y).to(dtype)


WIDTHS = (2, 3, 4)  # what the Hopper kernels take


def refuses_tilelang(call: Call) -> str | None:
    if reason := refused_by_hopper(call):
        return reason
    if call.width not in WIDTHS or call.key_dim % 8:
        return f"takes W in {WIDTHS} and D a multiple of 8, not W={call.width}, D={call.key_dim}"
    return None


def _run_tilelang(x, weight, position_ids, activation):
    from qlakernels.short_conv.hopper.operator import run

    return run(x, weight, position_ids, activation)


register(OPERATOR, Backend("tilelang", refuses_tilelang, _run_tilelang))
register(OPERATOR, Backend("torch", lambda call: None, _run_torch))


def _update_torch(x, conv_state, weight, activation):
    conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None]], dim=-1))
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = (conv_state.to(dtype) * weight.to(dtype)).sum(-1)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _update_tilelang(x, conv_state, weight, activation):
    from qlakernels.short_conv.hopper.operator import update

    return update(x, conv_state, weight, activation)


UNCONFIRMED = "no GPU has confirmed this kernel yet, it runs with backend='tilelang'"
register(UPDATE, Backend("tilelang", refuses_tilelang, _update_tilelang, passed_over=UNCONFIRMED))
register(UPDATE, Backend("torch", lambda call: None, _update_torch))
