"""Small tensors that never change, made once on each device instead of in every call.

For the inside of operators, where tensors are real: the tensor of a trace must not be kept. Nor is one kept that a CUDA
graph makes, since only the graph's replay writes it. A stream other than the one that made a tensor waits for it, on
the device; a capture need not, as it begins with a wait for everything.
"""

import torch

MOST = 256
_made: dict[tuple, tuple] = {}  # → the tensors, the stream that made them, the event when they are there


def constant(make, *sizes: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """`make(*sizes, device)`, a tuple of tensors."""
    found = _made.get((make, *sizes, device))
    if found is None:
        tensors = make(*sizes, device)
        stream, there = 0, None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return tensors
            here = torch.cuda.current_stream(device)
            stream, there = here.cuda_stream, here.record_event()
        if len(_made) >= MOST:
            del _made[next(iter(_made))]
        _made[make, *sizes, device] = tensors, stream, there
        return tensors
    tensors, stream, there = found
    if there is not None:
        here = torch.cuda.current_stream(device)
        if here.cuda_stream != stream and not torch.cuda.is_current_stream_capturing():
            here.wait_event(there)
    return tensors


def equal_rows(batch: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens of a batch of equal rows, int32 [batch + 1], and the order to take them in, int32 [batch]."""
    rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return rows * tokens, rows[:-1]


def zeros(heads: int, device: torch.device) -> tuple[torch.Tensor]:
    return (torch.zeros(heads, device=device),)
