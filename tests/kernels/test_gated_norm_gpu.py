"""The gated norm's TileLang kernels on a Hopper GPU against the formula in float64 through autograd."""

import pytest
import torch

from qlakernels import rms_norm_gated
from qlakernels.norm.hopper import operator
from qlakernels.norm.hopper.sizes import LANES

pytestmark = pytest.mark.gpu
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALL = 1e-6  # beside the mean square


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def slice_of(*shape, seed, dtype):
    """[B, T, H, D] as a slice of a projection."""
    channels = shape[-2] * shape[-1]
    projection = draw(*shape[:-2], 3 * channels, seed=seed, dtype=dtype)
    return projection[..., channels : 2 * channels].unflatten(-1, shape[-2:])


def formula(x, gate, weight, dtype):
    """In float64, the normalised x rounded to `dtype` in the value, as the kernels do, and not in the gradient."""
    n = x * (x.square().mean(-1, keepdim=True) + SMALL).rsqrt()
    n = n + (n.float().to(dtype).double() - n).detach()
    return weight * n * torch.nn.functional.silu(gate)


def check(x, gate, weight):
    leaves = [x, gate, weight]
    dy = draw(*x.shape, seed=5, dtype=x.dtype)
    y = rms_norm_gated(*leaves, eps=SMALL, backend="tilelang")
    gradients = torch.autograd.grad(y, leaves, dy)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = formula(*doubles, x.dtype)
    wanted = torch.autograd.grad(expected, doubles, dy.double())
    eps = EPS[x.dtype]
    # Rounded once, eps, and sums; a normalised x halfway between two numbers, 2 eps apart, may go to either.
    torch.testing.assert_close(y.double(), expected.detach(), rtol=3.1 * eps, atol=1e-5)
    torch.testing.assert_close(gradients[1].double(), wanted[1], rtol=3.1 * eps, atol=1e-5)
    torch.testing.assert_close(gradients[0].double(), wanted[0], rtol=eps, atol=1e-4 * wanted[0].abs().max().item())
    assert (gradients[2] - wanted[2]).norm() <= (1e-4 if weight.dtype == torch.float32 else eps) * wanted[2].norm()
    assert [t.dtype for t in (y, *gradients)] == [t.dtype for t in (x, *leaves)]
    again = rms_norm_gated(*leaves, eps=SMALL, backend="tilelang")
    for first, second in zip((y, *gradients), (again, *torch.autograd.grad(again, leaves, dy)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dim", LANES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_values_and_gradients(dtype, dim):
    shape = 3, 515, 5, dim
    x = draw(*shape, dtype=dtype).requires_grad_()
    gate = slice_of(*shape, seed=1, dtype=dtype).requires_grad_()
    check(x, gate, draw(dim, seed=2).requires_grad_())
    check(x, gate, draw(dim, seed=2, dtype=dtype).requires_grad_())


@pytest.mark.parametrize("shape", [(1, 128), (33, 128), (1, 1, 1, 96), (2, 9, 3, 192), (2, 4096, 32, 128)], ids=str)
def test_shapes(shape):
    x, gate = (draw(*shape, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in (0, 1))
    check(x, gate, draw(shape[-1], seed=2).requires_grad_())


def test_no_rows():
    x, gate = (torch.empty(2, 0, 4, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    weight = draw(128).requires_grad_()
    y = rms_norm_gated(x, gate, weight, backend="tilelang")
    y.sum().backward()
    assert y.shape == x.grad.shape == gate.grad.shape == x.shape and weight.grad.abs().max() == 0


@pytest.mark.parametrize("dim", [96, 128])
def test_slices_are_written(dim):
    """Into joint tensors, and nothing beside them; the second y has the bits of the first."""
    shape = 2, 77, 3, dim
    x, gate, weight = draw(*shape, dtype=torch.bfloat16), slice_of(*shape, seed=1, dtype=torch.bfloat16), draw(dim)
    dy = draw(*shape, seed=3, dtype=torch.bfloat16)
    channels = 3 * dim
    joint = [torch.full((2, 77, 3 * channels), 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    y, dx, dgate, again = (t[..., channels : 2 * channels].unflatten(-1, (3, dim)) for t in joint)
    operator.launch_forward(x, gate, weight, SMALL, y)
    dweight = operator.launch_backward(dy, x, gate, weight, SMALL, dx, dgate, again)
    assert torch.equal(y, operator._forward_op(x, gate, weight, SMALL)) and torch.equal(y, again)
    for got, expected in zip((dx, dgate, dweight), operator._backward_op(dy, x, gate, weight, SMALL), strict=True):
        torch.testing.assert_close(got, expected)
    assert all((t[..., :channels] == 7).all() and (t[..., 2 * channels :] == 7).all() for t in joint)


def test_a_row_keeps_to_itself():
    """NaN in one head of one token stays there."""
    x, gate = (draw(1, 9, 4, 96, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    x[0, 4, 2] = float("nan")
    x.requires_grad_()
    y = rms_norm_gated(x, gate, draw(96), backend="tilelang")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for got in (y, dx):
        bad = got.isnan().any(-1)
        assert bad[0, 4, 2] and bad.sum() == 1


def test_compiled_and_in_a_graph():
    x, gate = (draw(2, 256, 8, 128, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in (0, 1))
    weight = draw(128, seed=2).requires_grad_()

    def function(x, gate, weight):
        return rms_norm_gated(x * 2, gate, weight, backend="tilelang") * 2

    compiled = torch.compile(function, fullgraph=True)
    for one, other in zip(
        torch.autograd.grad(function(x, gate, weight).float().sum(), [x, gate, weight]),
        torch.autograd.grad(compiled(x, gate, weight).float().sum(), [x, gate, weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    x, gate, weight = x.detach(), gate.detach(), weight.detach()
    expected = rms_norm_gated(x, gate, weight, backend="tilelang")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rms_norm_gated(x, gate, weight, backend="tilelang")
    graph.replay()
    assert torch.equal(y, expected)
