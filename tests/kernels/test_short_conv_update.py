"""Decoding with the short convolution: token after token as all at once, on the CPU, the kernel's arithmetic too."""

import shutil

import pytest
import torch
from on_cpu import compile_for_cpu

from qlakernels import causal_conv1d, causal_conv1d_update, conv_state_of
from qlakernels.gated_delta_rule.hopper.resources import resources
from qlakernels.short_conv.hopper import update
from qlakernels.short_conv.hopper.kernels import update_specialisation


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoded(x, weight, activation, prefilled, backend="torch"):
    """The tokens behind the first `prefilled`, one by one."""
    state = conv_state_of(x[:, :prefilled], weight.shape[1])
    tokens = [causal_conv1d_update(x[:, t], state, weight, activation, backend) for t in range(prefilled, x.shape[1])]
    assert torch.equal(state, conv_state_of(x, weight.shape[1]))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("prefilled", [0, 1, 3, 7])
def test_token_after_token(prefilled, activation):
    x, weight = draw(2, 11, 16), draw(16, 4, seed=1)
    expected = causal_conv1d(x, weight, activation=activation)[:, prefilled:]
    torch.testing.assert_close(decoded(x, weight, activation, prefilled), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="kernels for the CPU need g++")
@pytest.mark.parametrize(("width", "silu"), [(2, True), (4, False)])
def test_the_kernel_on_a_cpu(width, silu, monkeypatch):
    monkeypatch.setattr(update, "THREADS", 1)
    run = compile_for_cpu(update.update_kernel, width, "float32", "float32", silu, monkeypatch=monkeypatch)
    x, state, weight = draw(3, 16), draw(3, 16, width, seed=1), draw(16, width, seed=2)
    expected_state, y = state.clone(), torch.full((3, 4, 4), torch.nan)
    expected = causal_conv1d_update(x, expected_state, weight, "silu" if silu else None, backend="torch")
    run(x.view(3, 4, 4), state.view(3, 4, -1), weight.view(4, -1), y)
    torch.testing.assert_close(y.view(3, 16), expected)
    assert torch.equal(state, expected_state)


def test_resources():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: the kernels cannot be compiled here")
    found = resources(update_specialisation(4, "bfloat16", "float32", True))
    assert found.spilled == 0 and 0 < found.registers <= 128


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": draw(2, 8)}, "x has shape"),
        ({"conv_state": draw(2, 16, 3)}, "conv_state is torch.float32 of shape"),
        ({"conv_state": draw(2, 16, 4).double()}, "conv_state is torch.float64"),
        ({"conv_state": draw(2, 4, 16).mT}, "conv_state has strides"),
        ({"activation": "gelu"}, "activation='gelu'"),
    ],
)
def test_bad_arguments(changed, message):
    arguments = {"x": draw(2, 16), "conv_state": draw(2, 16, 4), "weight": draw(16, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(**arguments | changed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "channels", "width"), [(1, 8, 2), (3, 1160, 3), (64, 8192, 4)])
def test_on_a_gpu(rows, channels, width, dtype):
    x, weight = draw(rows, 9, channels, dtype=dtype).cuda(), draw(channels, width, seed=1).cuda()
    expected = causal_conv1d(x.double(), weight.double(), backend="torch")[:, 4:]
    got = decoded(x, weight, "silu", 4, backend="tilelang")
    eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=1e-5)
