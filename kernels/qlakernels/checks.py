"""Checks of arguments that several operators share. Each raises a ValueError naming the argument and its value."""

import itertools

import torch


def check_cu_seqlens(cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor | None, batch: int, tokens: int) -> None:
    """Packed-document boundaries: an int tensor [N+1] that starts at 0, never descends and ends at `tokens`.

    The values are read only where that costs no device wait: from `cu_seqlens_cpu`, or from `cu_seqlens` when it
    lies on the host.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is a {cu_seqlens.dtype} tensor of shape {list(cu_seqlens.shape)}: "
            "give an int32 or int64 tensor [N+1]"
        )
    if batch != 1:
        raise ValueError(f"batch is {batch} with cu_seqlens: flatten the batch to [1, B*T, ...]")
    host = cu_seqlens_cpu if cu_seqlens_cpu is not None else cu_seqlens
    if host.device.type != "cpu" or torch.compiler.is_compiling():  # a trace has no values
        return
    if host.shape != cu_seqlens.shape:
        raise ValueError(f"cu_seqlens_cpu has shape {list(host.shape)}, cu_seqlens {list(cu_seqlens.shape)}")
    bounds = host.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens starts at {bounds[0]}: it must start at 0")
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens descends from {start} to {end} at index {i + 1}: it must not descend")
    if bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}: it must end at the number of tokens, {tokens}")
