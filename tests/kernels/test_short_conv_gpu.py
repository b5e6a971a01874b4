"""The short convolution's TileLang kernels on a Hopper GPU against the formula in float64 through autograd."""

import pytest
import torch

from qlakernels import causal_conv1d

pytestmark = pytest.mark.gpu
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def positions_of(batch, tokens, seed):
    """Documents of a few tokens to many, one after the other in each row."""
    ends = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < 0.1
    rows = [[0] for _ in range(batch)]
    for row, ending in zip(rows, ends.tolist(), strict=True):
        for end in ending[:-1]:
            row.append(0 if end else row[-1] + 1)
    return torch.tensor(rows, device="cuda")


def check(x, weight, positions, activation):
    dy = draw(*x.shape, seed=5, dtype=x.dtype)
    y = causal_conv1d(x, weight, positions, activation=activation, backend="tilelang")
    dx, dweight = torch.autograd.grad(y, [x, weight], dy)
    leaves = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = causal_conv1d(*leaves, positions, activation=activation, backend="torch")
    expected_dx, expected_dweight = torch.autograd.grad(expected, leaves, dy.double())
    eps = EPS[x.dtype]
    torch.testing.assert_close(
        y.double(), expected.detach(), rtol=eps, atol=1e-5
    )  # rounded once: half of eps, and sums
    torch.testing.assert_close(dx.double(), expected_dx, rtol=eps, atol=1e-5)
    weight_eps = 1e-5 if weight.dtype == torch.float32 else eps
    torch.testing.assert_close(
        dweight.double(), expected_dweight, rtol=weight_eps, atol=weight_eps * x.shape[0] ** 0.5 * x.shape[1] ** 0.5
    )
    assert dx.dtype == x.dtype and dweight.dtype == weight.dtype
    again = causal_conv1d(x, weight, positions, activation=activation, backend="tilelang")
    for first, second in zip((y, dx, dweight), (again, *torch.autograd.grad(again, [x, weight], dy)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_values_and_gradients(dtype, width, activation, packed):
    batch, tokens, channels = 3, 515, 1160
    x = draw(batch, tokens, channels, dtype=dtype).requires_grad_()
    weight = draw(channels, width, seed=1).requires_grad_()
    check(x, weight, positions_of(batch, tokens, 2) if packed else None, activation)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 8), (1, 33, 16), (5, 129, 2048), (2, 4096, 8192)], ids=str)
def test_shapes(shape):
    x = draw(*shape, dtype=torch.bfloat16).requires_grad_()
    check(x, draw(shape[2], 4, seed=1).requires_grad_(), None, "silu")
    check(
        x, draw(shape[2], 4, seed=1, dtype=torch.bfloat16).requires_grad_(), positions_of(*shape[:2], 3).int(), "silu"
    )


def test_a_slice_of_a_projection():
    x = draw(2, 300, 4096, dtype=torch.bfloat16)[..., 1024:2048].detach().requires_grad_()
    check(x, draw(1024, 4, seed=1).requires_grad_(), positions_of(2, 300, 4), "silu")


def test_nothing_crosses_a_boundary():
    """NaN in one document stays there, in both directions."""
    x = draw(1, 64, 256, dtype=torch.bfloat16)
    x[:, 20:40] = float("nan")
    x.requires_grad_()
    bounds = torch.tensor([0, 20, 40, 64], device="cuda")
    y = causal_conv1d(x, draw(256, 4), cu_seqlens=bounds, backend="tilelang")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for got in (y, dx):
        assert got[:, :20].isfinite().all() and got[:, 40:].isfinite().all() and got[:, 20:40].isnan().all()


def test_compiled_and_in_a_graph():
    x, weight = draw(2, 256, 512, dtype=torch.bfloat16).requires_grad_(), draw(512, 4, seed=1).requires_grad_()

    def function(x, weight):
        return causal_conv1d(x * 2, weight, backend="tilelang") * 2

    compiled = torch.compile(function, fullgraph=True)
    for one, other in zip(
        torch.autograd.grad(function(x, weight).float().sum(), [x, weight]),
        torch.autograd.grad(compiled(x, weight).float().sum(), [x, weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    x, weight = x.detach(), weight.detach()
    expected = causal_conv1d(x, weight, backend="tilelang")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = causal_conv1d(x, weight, backend="tilelang")
    graph.replay()
    assert torch.equal(y, expected)
