"""SwiGLU: the plain form and an MLP around it against autograd, the kernels' arithmetic on a CPU, their resources."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from on_cpu import compile_for_cpu

from qlakernels.compiling import kernel
from qlakernels.gated_delta_rule.hopper.resources import resources
from qlakernels.swiglu import swiglu, swiglu_mlp
from qlakernels.swiglu.hopper import operator, passes
from qlakernels.swiglu.hopper.sizes import ROWS, THREADS


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(together):
    gate, up = together.chunk(2, dim=-1)
    return F.silu(gate) * up


def test_values_and_gradients():
    together, dy = draw(3, 5, 16).requires_grad_(), draw(3, 5, 8, seed=1)
    y, expected = swiglu(together), plain(together)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, together, dy)[0] for out in (y, expected)))


@pytest.mark.parametrize("keep_products", [True, False])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (3,)])
def test_an_mlp(frozen, keep_products):
    inputs = [draw(2, 5, 12), draw(16, 12, seed=1), draw(16, 12, seed=2), draw(10, 16, seed=3)]
    x, gate, up, down = (t.requires_grad_(i not in frozen) for i, t in enumerate(inputs))
    y = swiglu_mlp(x, (gate, up), torch.cat([gate, up]).detach(), down, down.detach(), keep_products)
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    wanted = [t for t in inputs if t.requires_grad]
    for got, right in zip(*(torch.autograd.grad(out.sum(), wanted) for out in (y, expected)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_an_mlp_in_half_precision_keeps_float32_gradients():
    x, weights = draw(1, 6, 8, dtype=torch.bfloat16), [draw(16, 8, seed=i).requires_grad_() for i in (1, 2)]
    down = draw(8, 16, seed=3).requires_grad_()
    y = swiglu_mlp(x, tuple(weights), torch.cat(weights).detach().bfloat16(), down, down.detach().bfloat16())
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), [*weights, down]))


def test_kernels_on_a_cpu(monkeypatch):
    monkeypatch.setattr(passes, "THREADS", 1)
    run_forward = compile_for_cpu(passes.forward_kernel, "float32", monkeypatch=monkeypatch)
    run_backward = compile_for_cpu(passes.backward_kernel, "float32", monkeypatch=monkeypatch)
    for tokens, width in ((1, 8), (ROWS, 8), (2 * ROWS + 1, 24)):
        together, dy = draw(tokens, 2 * width).requires_grad_(), draw(tokens, width, seed=1)
        expected = plain(together)
        (gradient,) = torch.autograd.grad(expected, together, dy)
        y, again = torch.full((tokens * width,), torch.nan), torch.full((tokens * width,), torch.nan)
        d_together = torch.full((2 * tokens * width,), torch.nan)
        run_forward(together.detach().flatten(), y, tokens, width // 8)
        run_backward(dy.flatten(), together.detach().flatten(), d_together, again, tokens, width // 8)
        torch.testing.assert_close(y.view_as(expected), expected.detach())
        torch.testing.assert_close(d_together.view_as(together), gradient)
        assert torch.equal(again, y)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_resources(direction):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: the kernels cannot be compiled here")
    key = (f"swiglu_{direction}", "bfloat16")
    found = resources(key)
    assert found.spilled == 0 and 0 < found.registers * THREADS * 4 <= 2**16
    assert kernel(key).get_kernel_source().count("*(uint4*)(together +") == 2


def test_operators_are_sound(monkeypatch):
    launches = []
    kernels = {
        "forward": lambda together, y, *sizes: launches.append(sizes) or y.fill_(1),
        "backward": lambda dy, together, d_together, y, *sizes: (
            launches.append(sizes) or (d_together.fill_(1), y.fill_(1))
        ),
    }
    monkeypatch.setattr(operator, "_launchers", lambda dtype: kernels)
    together, dy = draw(2, 3, 32, dtype=torch.bfloat16), draw(2, 3, 16, dtype=torch.bfloat16)
    torch.library.opcheck(operator.forward, (together,))
    torch.library.opcheck(operator.backward, (dy, together))
    assert set(launches) == {(6, 2)}
    assert operator.forward(together[:0]).shape == (0, 3, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 33, 208), (1, 4096, 12288)], ids=str)
def test_on_a_gpu(shape, dtype):
    together = draw(*shape, dtype=dtype).cuda().requires_grad_()
    y = swiglu(together, backend="tilelang")
    dy = draw(*y.shape, seed=1, dtype=dtype).cuda()
    exact = together.detach().double().requires_grad_()
    expected = plain(exact)
    eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(y.double(), expected.detach(), rtol=eps, atol=1e-5)
    gradients = (
        torch.autograd.grad(out, leaf, dy.to(out.dtype))[0] for out, leaf in ((y, together), (expected, exact))
    )
    got, right = gradients
    torch.testing.assert_close(got.double(), right, rtol=eps, atol=1e-5)
    assert torch.equal(torch.ops.qlakernels.swiglu_backward(dy, together.detach())[1], y)
