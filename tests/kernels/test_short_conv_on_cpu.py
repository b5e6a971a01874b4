"""The arithmetic of the short convolution's Hopper kernels, run on the CPU in float32, a thread at a time."""

import shutil

import pytest
import torch
from on_cpu import compile_for_cpu

from qlakernels import causal_conv1d
from qlakernels.short_conv.hopper import backward, forward
from qlakernels.short_conv.hopper.sizes import CHANNELS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="kernels for the CPU need g++")
NAN = float("nan")
# Documents of a row: shorter than the filter, empty of any rule about stretches, and one that begins in its middle.
PACKED = torch.cat([torch.arange(n) for n in (1, 2, 3, 1, 9, 4, 5, 3, 1)] + [torch.arange(7, 15)])[None]
ODD = torch.tensor([[5, 0, 3, 1, 2, 0, 7, 8, 9, 1, 1, 2, 2]] * 3)  # positions that nobody would count


@pytest.fixture(autouse=True)
def one_thread_a_block(monkeypatch):
    for module in (forward, backward):
        monkeypatch.setattr(module, "THREADS", 1)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slice_of(batch, tokens, channels, seed):
    """x [B, T, D] as a slice of a projection, the rest of it NaN, as the row that a kernel takes, and its step."""
    whole = torch.full((batch * tokens, channels + 16), NAN)
    whole[:, 8 : 8 + channels] = draw(batch * tokens, channels, seed=seed)
    step = channels + 16
    row = whole.flatten()[8 : 8 + (batch * tokens - 1) * step + channels]
    return whole[:, 8 : 8 + channels].reshape(batch, tokens, channels), row, step


CALLS = [(None, (2, 21)), (None, (1, 1)), (None, (3, 2)), (PACKED, PACKED.shape), (ODD, ODD.shape)]


@pytest.mark.parametrize(("width", "silu"), [(2, True), (3, False), (4, True), (4, False)])
def test_forward_and_backward(width, silu, monkeypatch):
    options = width, "float32", "float32", "int64", silu
    run_forward = compile_for_cpu(forward.forward_kernel, *options, monkeypatch=monkeypatch)
    run_backward = compile_for_cpu(backward.backward_kernel, *options, monkeypatch=monkeypatch)
    channels = 24
    for positions, (batch, length) in CALLS:
        tokens = batch * length
        x, x_row, x_step = slice_of(batch, length, channels, 1)
        dy, dy_row, dy_step = slice_of(batch, length, channels, 2)
        weight = draw(channels, width, seed=3)
        leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
        expected = causal_conv1d(*leaves, positions, activation="silu" if silu else None, backend="torch")
        expected_dx, expected_dw = torch.autograd.grad(expected, leaves, dy.double())
        given = torch.empty(0, dtype=torch.int64) if positions is None else positions.flatten()
        for stretch in (8, 16, 64):
            y, (dx, dx_row, dx_step) = torch.full((tokens * channels,), NAN), slice_of(batch, length, channels, 4)
            dx_row.fill_(NAN)
            C = CHANNELS["forward"]
            run_forward(x_row, weight.view(-1, C * width), given, y, x_step // C, tokens, length, stretch)
            torch.testing.assert_close(y.view(x.shape).double(), expected.detach(), rtol=1e-5, atol=1e-5)
            C = CHANNELS["backward"]
            sums = torch.full((-(-tokens // stretch), channels // C, C * width), NAN)
            run_backward(
                dy_row,
                x_row,
                weight.view(-1, C * width),
                given,
                dx_row,
                sums,
                dy_step // C,
                x_step // C,
                dx_step // C,
                tokens,
                length,
                stretch,
            )
            assert dx_row.isnan().sum() == dx_row.numel() - dx.numel()  # nothing beside the slice
            torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-5)
            got_dw = sums.sum(0).view(channels, width).double()
            torch.testing.assert_close(got_dw, expected_dw, rtol=1e-5, atol=2e-5)
