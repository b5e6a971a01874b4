"""Torch operators with autograd kernels of their own.

`torch.library.custom_op` rebuilds the schema's arguments in each call: 70 µs more where gradients are wanted.
"""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("qlakernels", "FRAGMENT")


def as_read(x: torch.Tensor) -> torch.Tensor:
    """x as kernels read it, contiguous and from a multiple of 16 bytes: itself, unless it is not."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def weight_as_read(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in float32 or `dtype`, as kernels read it."""
    return as_read(weight if weight.dtype in (torch.float32, dtype) else weight.float())


def name_of(dtype: torch.dtype) -> str:
    """As keys of kernels have it, "bfloat16" and the like."""
    return str(dtype).removeprefix("torch.")


def define(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """The operator `qlakernels::…` of a schema; `fake` makes its outputs in a trace."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qlakernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.qlakernels, name).default


def differentiate(op: torch._ops.OpOverload, kernel: Callable) -> None:
    """kernel(keyset, *inputs) is what a call of the operator does where autograd watches."""
    LIBRARY.impl(op._opname, kernel, "Autograd", with_keyset=True)


def below_autograd(op: torch._ops.OpOverload, keyset, *inputs):
    """The operator itself, from the inside of such a kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def differentiate_no_further(op: torch._ops.OpOverload, what: str) -> None:
    """For an operator that makes gradients: says that there are no second ones, when they are asked for."""

    class OfGradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *inputs):
            return below_autograd(op, keyset, *inputs)

        @staticmethod
        def backward(ctx, *_):
            raise NotImplementedError(f"{what} of the tilelang backend has no second gradients")

    def kernel(keyset, *inputs):
        if torch.is_grad_enabled():
            return OfGradients.apply(keyset, *inputs)
        return below_autograd(op, keyset, *inputs)

    differentiate(op, kernel)
