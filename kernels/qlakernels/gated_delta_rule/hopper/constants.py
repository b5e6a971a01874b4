"""Small tensors that never change, made once on each device instead of in every call.

For the inside of operators, where tensors are real: the tensor of a trace must not be kept. Streams and CUDA graphs:

- A stream other than the one that made a tensor waits for it, on the device.
- A graph under capture need not wait, as a capture begins with a wait for everything. What it reads is never dropped
  again, and what it makes itself is not kept, since only its replay writes it.
"""

import torch

MOST = 256
_made: dict[tuple, tuple] = {}  # → the tensors, the stream that made them, the event when they are there
_in_graphs: dict[tuple, tuple[torch.Tensor, ...]] = {}


def constant(make, *sizes: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """`make(*sizes, device)`, a tuple of tensors."""
    key = (make, *sizes, device)
    found = _made.get(key)
    if device.type != "cuda":
        stream = None
    elif torch.cuda.is_current_stream_capturing():
        if found is None:
            return make(*sizes, device)
        _in_graphs[key] = found[0]
        return found[0]
    else:
        stream = torch.cuda.current_stream(device)
    if found is None:
        tensors = make(*sizes, device)
        if len(_made) >= MOST:
            del _made[next(iter(_made))]
        _made[key] = tensors, stream, stream and stream.record_event()
        return tensors
    tensors, maker, there = found
    if stream != maker:
        stream.wait_event(there)
        for x in tensors:
            x.record_stream(stream)
    return tensors


def equal_rows(batch: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens of a batch of equal rows, int32 [batch + 1], and the order to take them in, int32 [batch]."""
    rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return rows * tokens, rows[:-1]


def zeros(heads: int, device: torch.device) -> tuple[torch.Tensor]:
    return (torch.zeros(heads, device=device),)


def zero_states(heads: int, value_dim: int, key_dim: int, device: torch.device) -> tuple[torch.Tensor]:
    """[1, Hv, V, K] of zeros, to be viewed as any dtype of two bytes."""
    return (torch.zeros(1, heads, value_dim, key_dim, dtype=torch.int16, device=device),)
