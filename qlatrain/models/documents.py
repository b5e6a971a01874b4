"""Where documents begin and end in a batch: made once on the host, handed to every layer as it is."""

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Documents:
    """Packed documents along one sequence of N tokens. `qlatrain.data.PackedBatch` offers the same fields.

    position_ids: int64 [1, N], the distance of each token to the start of its document.
    cu_seqlens: int32 [D+1] on the device of the tokens; cu_seqlens_cpu: the same on the host.
    max_seqlen: length of the longest document.
    """

    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_cpu: torch.Tensor
    max_seqlen: int
    rows: int | None = None  # how many, where all are equally long

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device | str = "cpu") -> Self:
        """Documents of these lengths, one behind the other."""
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return cls(positions.to(device), bounds.to(device), bounds, max(lengths))


def with_rows(documents) -> Documents:
    """`documents`, of whatever class, with `rows` told from the boundaries on the host."""
    lengths = documents.cu_seqlens_cpu.diff()
    equal = len(lengths) > 0 and bool((lengths == lengths[0]).all())
    rows = len(lengths) if equal else None
    return Documents(documents.position_ids, documents.cu_seqlens, documents.cu_seqlens_cpu, documents.max_seqlen, rows)
