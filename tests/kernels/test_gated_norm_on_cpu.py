"""The arithmetic of the gated norm's Hopper kernels, run on the CPU in float32, a thread, and so a row, at a time."""

import shutil

import pytest
import torch
from on_cpu import compile_for_cpu

from qlakernels import rms_norm_gated
from qlakernels.norm.hopper import backward, forward, rows

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="kernels for the CPU need g++")
NAN = float("nan")
EPS = 1e-2  # not small beside the mean square: it shows where it is


def one_thread_a_block(dim, monkeypatch):
    """Which has a row of D elements for itself."""
    for module in (forward, backward, rows):
        monkeypatch.setattr(module, "PIECE", dim)
    for module in (forward, backward):
        monkeypatch.setattr(module, "THREADS", 1)
        monkeypatch.setitem(module.LANES, dim, 1)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slice_of(tokens, channels, dim, seed=None):
    """[T, C] as a slice of a projection, the rest of it NaN, and all of it without a seed; the row that a kernel takes,
    and its step."""
    step = channels + 2 * dim
    whole = torch.full((tokens, step), NAN)
    x = whole[:, dim : dim + channels]
    if seed is not None:
        x.copy_(draw(tokens, channels, seed=seed))
    return x, whole.flatten()[dim : dim + (tokens - 1) * step + channels], step // dim


@pytest.mark.parametrize(("dim", "with_output"), [(8, False), (16, True)])
def test_forward_and_backward(dim, with_output, monkeypatch):
    one_thread_a_block(dim, monkeypatch)
    options = dim, "float32", "float32"
    run_forward = compile_for_cpu(forward.forward_kernel, *options, monkeypatch=monkeypatch)
    run_backward = compile_for_cpu(backward.backward_kernel, *options, with_output, monkeypatch=monkeypatch)
    for tokens, heads in ((1, 1), (7, 3), (16, 2), (13, 1)):
        size = tokens, heads * dim
        (x, x_row, x_step), (gate, gate_row, gate_step) = (slice_of(*size, dim, seed) for seed in (1, 2))
        dy, dy_row, dy_step = slice_of(*size, dim, 3)
        weight = draw(dim, seed=4)
        leaves = [t.double().requires_grad_() for t in (x.reshape(-1, dim), gate.reshape(-1, dim), weight)]
        expected = rms_norm_gated(*leaves, eps=EPS, backend="torch")
        gradients = torch.autograd.grad(expected, leaves, dy.reshape(-1, dim).double())
        for stretch in (8, 16):
            y, y_row, y_step = slice_of(*size, dim)
            run_forward(x_row, gate_row, weight, y_row, x_step, gate_step, y_step, tokens, heads, stretch, EPS)
            (dx, dx_row, dx_step), (dgate, dgate_row, dgate_step) = slice_of(*size, dim), slice_of(*size, dim)
            again, again_row, again_step = slice_of(*size, dim)
            sums = torch.full((-(-tokens // stretch) * heads, dim), NAN)
            inputs = dy_row, x_row, gate_row, weight, dx_row, dgate_row, again_row, sums
            steps = dy_step, x_step, gate_step, dx_step, dgate_step, again_step
            run_backward(*inputs, *steps, tokens, heads, stretch, EPS)
            results = [y, dx, dgate, sums.sum(0)]
            for got, wanted in zip(results, (expected.detach(), *gradients), strict=True):
                torch.testing.assert_close(got.reshape(wanted.shape).double(), wanted, rtol=1e-5, atol=1e-5)
            if with_output:
                assert torch.equal(again, y)
            else:
                assert again.isnan().all()
