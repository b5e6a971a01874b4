"""`rms_norm_gated` against its formula in float64, and against transformers bit for bit in half precision."""

import pytest
import torch

from qlakernels import rms_norm_gated


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formula(x, gate, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gate / (1 + (-gate).exp())


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("shape", [(7, 8), (2, 5, 3, 24), (0, 8)])
def test_formula_and_gradients(shape, size, eps):
    inputs = [draw(*shape) * size, draw(*shape, seed=1) * 3, draw(shape[-1], seed=2)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted_leaves = [x.double().requires_grad_() for x in inputs]
    y, wanted = rms_norm_gated(*leaves, eps=eps), formula(*wanted_leaves, eps)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, wanted.float(), rtol=1e-5, atol=1e-6)
    cotangent = draw(*shape, seed=3)
    got = torch.autograd.grad(y, leaves, cotangent)
    expected = torch.autograd.grad(wanted, wanted_leaves, cotangent.double())
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_of_transformers(dtype):
    """The normalised x is rounded before the weight; rounding once, at the end, gives other bits."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

    x, gate, weight = (y.to(dtype) for y in (draw(50, 4, 32), draw(50, 4, 32, seed=1), draw(32, seed=2)))
    norm = Qwen3_5RMSNormGated(32, eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        expected = norm(x, gate)
    y = rms_norm_gated(x, gate, weight, eps=1e-6)
    assert y.dtype == expected.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(y, expected)
    else:
        assert torch.equal(y, expected)


def test_a_float32_weight_beside_half_precision():
    x, gate = draw(9, 16).bfloat16(), draw(9, 16, seed=1).bfloat16()
    weight = draw(16, seed=2)
    y = rms_norm_gated(x, gate, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.double(), formula(x.double(), gate.double(), weight.double(), 1e-6), rtol=2e-2, atol=1e-2
    )


def test_zeros_stay_zero():
    x = torch.zeros(3, 8, requires_grad=True)
    y = rms_norm_gated(x, draw(3, 8), draw(8))
    y.sum().backward()
    assert y.abs().max() == 0 and x.grad.isfinite().all()
