"""One optimizer step, and what comes out of it, without waiting for the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn

from qlakernels.ranges import named_range
from qlatrain.config import OptimConfig, StepConfig
from qlatrain.models import HybridForCausalLM
from qlatrain.parallel import Layout
from qlatrain.training.optimizer import Optimizers

MOST_TRACES = 32
FIELDS = ("nll", "targets", "flops", "stop", "grad_norm", "skipped", "skipped_in_a_row")


@dataclass(frozen=True)
class StepResult:
    """Figures of one step, on the host.

    Over all processes: nll, the sum of negative log-likelihoods; targets, their number; flops of the step; stop, how
    many ask to end. grad_norm is before clipping; skipped is 1 when the gradient was not finite; skipped_in_a_row
    counts such steps up to this one.
    """

    nll: float
    targets: float
    flops: float
    stop: float
    grad_norm: float
    skipped: float
    skipped_in_a_row: float

    @property
    def loss(self) -> float:
        return self.nll / self.targets if self.targets else float("nan")


class PendingResult:
    """The figures of a step on their way from the device; `read` waits until they have arrived."""

    def __init__(self, values: Tensor):
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = values.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> StepResult:
        if self._arrived is not None:
            self._arrived.synchronize()
        return StepResult(**dict(zip(FIELDS, self._values.tolist(), strict=True)))


class TrainStep:
    """Forward, backward, clip, update.

    Args:
        model: as `Layout.prepare` gave it.
        optimizers: over its parameters.
        layout: the processes.
        max_grad_norm: gradients are scaled to this global norm at most.
        count_flops: FLOPs of forward and backward for the lengths of a batch's documents.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        layout: Layout,
        max_grad_norm: float,
        count_flops: Callable[[Tensor], float],
    ):
        self.model = model
        self.optimizers = optimizers
        self.layout = layout
        self.max_grad_norm = max_grad_norm
        self.count_flops = count_flops
        self.skipped_in_a_row = torch.zeros((), dtype=torch.float64, device=layout.device)

    @classmethod
    def of(
        cls,
        model: HybridForCausalLM,
        layout: Layout,
        train: StepConfig,
        optim: OptimConfig,
        count_flops: Callable[[Tensor], float],
    ) -> Self:
        """The step of a bare model: laid out, compiled and checkpointed as asked, with the optimizers of what asks for
        gradients."""
        model.model.activation_checkpointing = train.activation_checkpointing
        for mlp in model.model.mlps:
            mlp.keep_products = not train.recompute_mlp
        for mixer in model.model.mixers:
            mixer.keep_convolved = not train.recompute_convolution
        dtype = torch.bfloat16 if train.mixed_precision == "bf16" else None
        model.load_kernels(layout.device, dtype)
        if train.compile:
            # what is put together elementwise from tensors that are kept is made again in the backward
            functorch.ban_recompute_materialized_backward = False
            from torch._dynamo import config as dynamo  # takes a second

            # kinds of blocks, the first without a delta, times layouts of documents, all in one function
            dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_TRACES)
            whole = model.traced_whole(layout.device, dtype)
            for block in model.model.layers:
                block.compile(fullgraph=whole)
        prepared = layout.prepare(model)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        rounding = [] if train.gradient_dtype == "float32" else model.model.joints
        if rounding and layout.world_size > 1:
            raise ValueError(
                f"train.gradient_dtype={train.gradient_dtype} needs one process, not {layout.world_size}: "
                "use train.gradient_dtype=float32"
            )
        return cls(
            prepared,
            Optimizers(trained, optim, [*model.model.joints, model.joint_head], rounding),
            layout,
            train.max_grad_norm,
            count_flops,
        )

    def __call__(self, batches: Sequence, lr_factor: float, stop_requested: bool) -> PendingResult:
        """`batches`: this process's micro-batches (`PackedBatch`) of the step, on any device."""
        device, layout = self.layout.device, self.layout
        (own_targets,) = _on_device([float(sum(b.num_targets for b in batches))], device)
        targets = layout.sum(own_targets)
        # DDP averages over processes; the loss is a mean over all target tokens of the step, wherever they are.
        weight = layout.world_size / targets.clamp_min(1)
        nll = torch.zeros((), dtype=torch.float64, device=device)
        for i, batch in enumerate(batches):
            batch = batch.to(device)
            with layout.accumulate(self.model, last=i == len(batches) - 1):
                batch_nll = self.model(batch.input_ids, batch, batch.labels)
                layout.backward(batch_nll * weight.to(batch_nll.dtype))
            nll += batch_nll.detach()
        with named_range("optimizer"):
            grad_norm = layout.gradient_norm(self.optimizers.gradients())
            skip = 1 - torch.isfinite(grad_norm).to(torch.float32)
            clip = (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_, in the update
            self.optimizers.step(lr_factor, skip, clip)
        self.optimizers.zero_grad()
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skip
        flops = float(sum(self.count_flops(batch.cu_seqlens_cpu.diff()) for batch in batches))
        known_here = _on_device([flops, float(stop_requested)], device)
        nll, flops, stop = layout.sum(torch.cat([nll[None], known_here])).unbind()
        values = (nll, targets, flops, stop, grad_norm, skip, self.skipped_in_a_row)
        return PendingResult(torch.stack([value.double() for value in values]))


def _on_device(numbers: list[float], device: torch.device) -> Tensor:
    """float64 [n], without waiting for what the device is at, as `torch.tensor(…, device=…)` would."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


@torch.no_grad()
def validation_nll(model: nn.Module, batches: Sequence, layout: Layout) -> tuple[float, float]:
    """(sum of negative log-likelihoods, number of targets) over all processes.

    Compiled blocks run eagerly: the last batch may be smaller than the others, and having met two sizes the compiler
    would make graphs for any size, of training too.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=layout.device)
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            batch = batch.to(layout.device)
            total[0] += model(batch.input_ids, batch, batch.labels)
            total[1] += batch.num_targets
    model.train()
    nll, targets = layout.sum(total).tolist()
    return nll, targets
