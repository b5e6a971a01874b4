"""How a model is laid over devices, by accelerate: one device, or a replica on every process.

Everything outside this file treats parameters, gradients and optimizer states through the methods here (or through
tensors' own elementwise operations) and never assumes that it holds a whole parameter.
"""

import atexit
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from qlatrain.config import ParallelConfig


class Layout:
    """
    Args:
        config: the layout asked for.
        mixed_precision: "no" or "bf16" (autocast over float32 weights).
        log_with: what `accelerator.log` reports to.

    Raises:
        ValueError: several processes were launched for the layout of one.
    """

    def __init__(self, config: ParallelConfig, mixed_precision: str, log_with: list[str] | None = None):
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if config.layout == "single" and processes > 1:
            raise ValueError(f"parallel.layout=single was launched with {processes} processes: use parallel=data")
        self.accelerator = Accelerator(mixed_precision=mixed_precision, log_with=log_with)
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        if self.world_size > 1:
            atexit.register(
                torch.distributed.destroy_process_group
            )  # its threads would abort the process, now and then
        if self.device.type == "cpu":
            # Strong decay makes products below 1e-38; a CPU takes about 100 cycles for each: measured 7 times slower
            # steps at initialisation. Threads inherit the setting, so it stands before the first parallel operation.
            torch.set_flush_denormal(True)

    def describe(self) -> str:
        where = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        copies = "one process" if self.world_size == 1 else f"{self.world_size} replicas"
        return f"{copies} on {where}"

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model to call in training: on its device, under autocast, averaging gradients over the replicas."""
        return self.accelerator.prepare_model(model)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Around the forward and backward of a micro-batch: gradients travel with the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes, on every process, without waiting for the device."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.world_size > 1 else tensor

    def gradient_norm(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """The global norm of all gradients in float32, whatever they are, on the device."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for gradient in gradients:
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
        norms = [norm for same in by_dtype.values() for norm in torch._foreach_norm(same, dtype=torch.float32)]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.device)

    def wait_for_everyone(self) -> None:
        self.accelerator.wait_for_everyone()
