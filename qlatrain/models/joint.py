"""Projections in half precision over float32 weights: cast once a step, and one product for those that share an input.

Under autocast every use of a weight casts it anew, in the forward and where activations are recomputed. Here the casts
of all weights of a module lie below each other in one tensor, which `refresh` brings up to date in front of a forward
when an optimizer, or anybody else, has changed a weight since.
"""

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from qlakernels.products import product_with

ALIGNED = 8  # rows of `cast` are a multiple of this, so that rows of its products begin at 16 bytes


class Joint:
    """Linear layers of one module that are given the same input.

    `cast` is None where they go their own ways: without autocast on a GPU, or when one of them is not a plain
    `nn.Linear` without a bias (an adapter has been put around it).

    rounds_gradients: gradients are left in `gradient`, of all weights below each other and in `cast`'s dtype, instead
    of in each weight's `grad`. It is what autocast makes of them, without the copy in float32.
    """

    def __init__(self, owner: nn.Module, *names: str):
        self._owner, self._names = owner, names
        self.cast: torch.Tensor | None = None
        self.rounds_gradients = False
        self._receiver: torch.Tensor | None = None  # a leaf of autograd that shares its memory with the cast
        self._seen: tuple = ()

    def weights(self) -> tuple[torch.Tensor, ...]:
        return tuple(layer.weight for layer in self.layers())

    def receivers(self) -> tuple[torch.Tensor, ...]:
        """What products with `cast` are to hand the gradients to: the weights, or one tensor for all of them."""
        if self._receiver is not None and self.rounds_gradients:
            return (self._receiver,)
        return self.weights()

    @property
    def gradient(self) -> torch.Tensor | None:
        """Of the weights below each other, where `rounds_gradients`; None where nothing has arrived."""
        return None if self._receiver is None else self._receiver.grad

    def gradient_part(self, i: int) -> torch.Tensor | None:
        """A weight's, a view of `gradient`."""
        return None if self.gradient is None else self._parts(self.gradient, 0)[i]

    def drop_gradient(self) -> None:
        if self._receiver is not None:
            self._receiver.grad = None

    def refresh(self, dtype: torch.dtype | None) -> None:
        """Makes `cast` hold the weights as they are now in `dtype`; None: drops it."""
        if dtype is None or not self.plain:
            self.cast, self._receiver, self._seen = None, None, ()
            return
        weights = self.weights()
        if self.cast is None or self.cast.dtype != dtype or self.cast.device != weights[0].device:
            rows = sum(weight.shape[0] for weight in weights)
            self.cast = weights[0].new_zeros(-(-rows // ALIGNED) * ALIGNED, weights[0].shape[1], dtype=dtype)
            self._receiver = self.unpadded.detach().requires_grad_()
            self._seen = ()
        if not self.is_fresh():
            with torch.no_grad():
                torch._foreach_copy_(list(self._parts(self.cast, 0)), list(weights))
            self.accept()

    def is_fresh(self) -> bool:
        """Whether there is a cast, of the weights as they are now."""
        return self.cast is not None and self._seen == self._state()

    def accept(self) -> None:
        """Takes the cast for one of the weights as they are now: whoever changed them has changed it too."""
        self._seen = self._state()

    def part(self, i: int) -> torch.Tensor | None:
        """The cast of a weight, a view; None where there is none."""
        return None if self.cast is None else self._parts(self.cast, 0)[i]

    def _state(self) -> tuple:
        return tuple((weight.data_ptr(), weight._version) for weight in self.weights())

    @property
    def plain(self) -> bool:
        """Whether all are linear layers as they come, without a bias."""
        return all(type(layer) is nn.Linear and layer.bias is None for layer in self.layers())

    @property
    def unpadded(self) -> torch.Tensor:
        """`cast` without what is below the weights."""
        return self.cast[: sum(weight.shape[0] for weight in self.weights())]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Their outputs side by side, [..., `cast` rows], in `cast`'s dtype; needs a cast."""
        return product_with(x.to(self.cast.dtype), self.receivers(), self.cast)

    def apart(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output of each."""
        if self.cast is None:
            return tuple(layer(x) for layer in self.layers())
        return self.split(self(x))

    def split(self, products: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output of each, of those side by side."""
        return self._parts(products, -1)

    def layers(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self._owner, name) for name in self._names)

    def _parts(self, together: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        rows = [weight.shape[0] for weight in self.weights()]
        return together.split([*rows, together.shape[dim] - sum(rows)], dim)[: len(rows)]


def _count_update(optimizer: torch.optim.Optimizer, *_) -> None:
    """torch's fused optimizers change weights without counting it in their versions, as everybody else does."""
    if getattr(optimizer, "counts_updates", False):
        return
    for group in optimizer.param_groups:
        increment_version([parameter for parameter in group["params"] if parameter.grad is not None])


register_optimizer_step_post_hook(_count_update)


def joints(module: nn.Module) -> list[Joint]:
    """All in a module and below."""
    return [value for part in module.modules() for value in vars(part).values() if isinstance(value, Joint)]


def cast_dtype(device_type: str) -> torch.dtype | None:
    """What weights are cast to: autocast's dtype on a GPU; None where layers go their own ways."""
    if device_type != "cuda" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
