"""The least time a call could take here: FLOPs and bytes by formula over ceilings measured in the same run."""

from dataclasses import dataclass

import torch

from qlatrain.metrics.hardware import measured_bandwidth, measured_flops


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: FLOPs of its matrix products, bytes of its inputs and outputs."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """What the device reached just now, and how that was found."""

    flops_per_second: float
    flops_how: str
    bytes_per_second: float
    bytes_how: str

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Ceilings":
        """By a large matrix product in `dtype` and a large copy; a second or so."""
        return cls(*measured_flops(device, dtype), *measured_bandwidth(device))

    def seconds(self, work: Work) -> float:
        """The time that `work` takes at the nearer ceiling."""
        return max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)

    def bound(self, work: Work) -> str:
        """Which ceiling that is: `compute` or `memory`."""
        by_compute = work.flops / self.flops_per_second > work.bytes / self.bytes_per_second
        return "compute" if by_compute else "memory"
