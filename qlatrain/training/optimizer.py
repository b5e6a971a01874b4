"""Which parameter is updated by what, and one object that updates them all."""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from qlakernels.backends import Call, refused_by_hopper
from qlatrain.config import OptimConfig
from qlatrain.models.joint import Joint
from qlatrain.training.matrix_adamw import MatrixAdamW
from qlatrain.training.muon import Muon

logger = logging.getLogger(__name__)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay pulls matrices to zero; norms, biases, A_log, dt_bias and convolutions are left alone."""
    return parameter.ndim == 2 and not name.endswith(("A_log", "dt_bias"))


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon takes: the matrices inside the blocks, not the embedding, the head or the convolutions."""
    return parameter.ndim == 2 and ".layers." in f".{name}"


def _refuses_own_kernel(matrices: list[nn.Parameter]) -> str | None:
    """Why `MatrixAdamW` cannot update them; None where it can."""
    if not matrices:
        return "there are no matrices"
    device = matrices[0].device
    if reason := refused_by_hopper(Call(torch.device(device.type), torch.bfloat16, 0, 0)):
        return reason
    if any(p.dtype != torch.float32 or p.device != device or not p.is_contiguous() for p in matrices):
        return "it takes contiguous float32 matrices on one device"
    return None


@cache
def _say(line: str) -> None:
    logger.info(line)


class Optimizers:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    On a Hopper GPU our own kernel updates what AdamW has of matrices, and their casts with them; elsewhere, and the
    rest, torch's fused AdamW. Which it is, is logged.

    Args:
        named_parameters: (name, parameter) of the bare model; names are those of its checkpoint.
        config: rates and decays.
        joints: the casts of parameters in half precision.
        rounding: those of them whose gradients are to come rounded.

    Raises:
        ValueError: our own kernel does not update the weights of one in `rounding`.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        config: OptimConfig,
        joints: Sequence[Joint] = (),
        rounding: Sequence[Joint] = (),
    ):
        self.names = {parameter: name for name, parameter in named_parameters}
        muon = [p for n, p in named_parameters if config.name == "muon" and is_block_matrix(n, p)]
        taken = set(muon)
        rest = [(n, p) for n, p in named_parameters if p not in taken]
        matrices = {"params": [p for n, p in rest if decays(n, p)], "weight_decay": config.weight_decay}
        others = {"params": [p for n, p in rest if not decays(n, p)], "weight_decay": 0.0}
        options = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
        self._joints: list[Joint] = []
        refusal = _refuses_own_kernel(matrices["params"])
        if refusal is None:
            updated = set(matrices["params"])
            self._joints = [joint for joint in joints if joint.plain and updated.issuperset(joint.weights())]
            self._places = {weight: (joint, i) for joint in self._joints for i, weight in enumerate(joint.weights())}
            given = {"cast_of": self._cast_of, "gradient_of": self._gradient_of}
            self.parts: list[torch.optim.Optimizer] = [MatrixAdamW([matrices], **options, **given)]
            if others["params"]:
                self.parts.append(torch.optim.AdamW([others], **options, fused=True))
            _say("optimizer: AdamW by our own kernel for matrices, by torch's fused one for the rest")
        else:
            self.parts = [torch.optim.AdamW([matrices, others], **options, fused=True)]
            _say(f"optimizer: torch's fused AdamW (not our own kernel: {refusal})")
        self._rounding = list(rounding)
        if left_out := [joint for joint in rounding if joint not in self._joints]:
            raise ValueError(
                f"train.gradient_dtype=bfloat16 needs the weights of all blocks updated by our own AdamW, and "
                f"{len(left_out)} of {len(rounding)} products of theirs are not"
                f"{f' ({refusal})' if refusal else ''}: use train.gradient_dtype=float32"
            )
        for joint in rounding:
            joint.rounds_gradients = True
        if muon:
            self.parts.append(Muon(muon, config.muon_lr, config.muon_momentum, config.muon_weight_decay))
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    @property
    def learning_rate(self) -> float:
        """Of the first part, as shown in the progress line."""
        return self.parts[0].param_groups[0]["lr"]

    def step(self, factor: float, skip: Tensor, gradient_factor: Tensor | None = None) -> None:
        """One update at `factor` times the peak rates; none where `skip` (0 or 1, on the device) is 1.

        gradient_factor: what gradients are multiplied by on their way in, on the device.
        """
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.found_inf = skip.float()
            fresh = [joint for joint in self._joints if joint.is_fresh()] if type(part) is MatrixAdamW else []
            if gradient_factor is not None:  # as torch's fused optimizers take it: they divide
                part.grad_scale = 1 / gradient_factor.float()
            part.step()
            for joint in fresh:
                joint.accept()  # updated along with its weights

    def gradients(self) -> list[Tensor]:
        """All there are, each once, of whatever dtype."""
        kept = [joint.gradient for joint in self._rounding] + [parameter.grad for parameter in self.names]
        return [gradient for gradient in kept if gradient is not None]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        for joint in self._rounding:
            joint.drop_gradient()

    def _cast_of(self, parameter: nn.Parameter) -> Tensor | None:
        joint, i = self._places.get(parameter, (None, 0))
        return None if joint is None else joint.part(i)

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        joint, i = self._places.get(parameter, (None, 0))
        return parameter.grad if joint is None or not joint.rounds_gradients else joint.gradient_part(i)

    def state(self) -> dict[str, Tensor]:
        """Flat names for a checkpoint: `<parameter>/<kind>`, such as `model.norm.weight/exp_avg`."""
        return {
            f"{self.names[parameter]}/{kind}": value
            for part in self.parts
            for parameter, kinds in part.state.items()
            for kind, value in kinds.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises:
            ValueError: the state belongs to other parameters or another optimizer.
        """
        parameters = {name: parameter for parameter, name in self.names.items()}
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        adamw = {"step", "exp_avg", "exp_avg_sq"}
        expected = {torch.optim.AdamW: adamw, MatrixAdamW: adamw, Muon: {"momentum_buffer"}}
        found: dict[str, set[str]] = {}
        for key in state:
            name, kind = key.rsplit("/", 1)
            found.setdefault(name, set()).add(kind)
        for name in sorted(found.keys() | parameters.keys()):
            known = expected[type(owner[parameters[name]])] if name in parameters else set()
            if found.get(name, set()) not in (known, set()) or name not in parameters:
                raise ValueError(
                    f"the checkpoint's optimizer state of {name!r} is {sorted(found.get(name, ()))}, "
                    f"this run's optimizer keeps {sorted(known)}: resume with the optimizer it was saved with"
                )
        for key, value in state.items():
            name, kind = key.rsplit("/", 1)
            parameter = parameters[name]
            device = "cpu" if kind == "step" and not parameter.is_cuda else parameter.device
            owner[parameter].state[parameter][kind] = value.to(device).clone()
