"""What a call takes of the device's memory beside its inputs."""

from dataclasses import dataclass

import torch

from qlatrain.bench.runs import EagerRun


@dataclass(frozen=True)
class Memory:
    """Bytes. peak: at the highest, above what was there before the call. kept: from the forward until its backward,
    without the output; what views keep alive is in it. None where the device does not count, or nothing was kept."""

    peak: int | None = None
    kept: int | None = None

    @classmethod
    def of(cls, run: EagerRun, direction: str, device: torch.device) -> "Memory":
        """By the counters of torch's CUDA allocator; the run has been warmed up."""
        if device.type != "cuda":
            return cls()
        before = _start()
        if direction == "forward":
            run.forward()
            return cls(peak=torch.cuda.max_memory_allocated() - before)
        o = run.train_forward()
        kept = torch.cuda.memory_allocated() - before - o.untyped_storage().nbytes()
        del o
        if direction == "backward":
            before = _start()
        run.backward()
        torch.cuda.synchronize()
        return cls(peak=torch.cuda.max_memory_allocated() - before, kept=kept)


def _start() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
