"""The arithmetic of the AdamW kernel, run on the CPU in float32, a thread at a time."""

import shutil

import pytest
import torch
from on_cpu import compile_for_cpu

from qlakernels.adamw.hopper import update
from qlakernels.adamw.hopper.sizes import AHEAD, PIECE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="kernels for the CPU need g++")
LR, BETAS, EPS, WEIGHT_DECAY = 2**-7, (0.875, 0.96875), 2**-10, 0.25  # float32 has them without a rounding
SIZES = (1, 3, 4, 5, 8, 9, 31, 64, 1001)
NO, YES, ONE = torch.zeros(1), torch.ones(1), torch.ones(1)


@pytest.fixture(scope="module")
def runs():
    """The kernel, with one thread a block: on tensors of float32, with a cast or without, or a half-precision g."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "THREADS", 1)
        kernels = {
            (cast, gradient): compile_for_cpu(update.update_kernel, cast, gradient, monkeypatch=patch)
            for cast, gradient in (("none", "float32"), ("float32", "float32"), ("none", "float16"))
        }

    def run(p, m, v, g, cast, step, factor=ONE, skip=NO, betas=BETAS, eps=EPS):
        kernel = kernels["none" if cast is None else "float32", str(g.dtype).removeprefix("torch.")]
        blocks = max(1, -(-(p.numel() // PIECE) // AHEAD))
        settings = LR, *betas, eps, WEIGHT_DECAY
        kernel(p, m, v, g, p if cast is None else cast, step, factor, skip, blocks, *settings)

    return run


def draw(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def in_float64(start, betas=BETAS, eps=EPS):
    parameter = torch.nn.Parameter(start.double())
    return parameter, torch.optim.AdamW([parameter], LR, betas, eps, WEIGHT_DECAY)


@pytest.mark.parametrize("with_cast", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_several_steps(size, with_cast, runs):
    p, m, v = draw(size, 0), torch.zeros(size), torch.zeros(size)
    parameter, judge = in_float64(p)
    cast = torch.full((size,), torch.nan) if with_cast else None
    for step in range(1, 6):
        g, factor = draw(size, step) * 10.0**step, torch.tensor([2.0**-step])
        before = g.clone()
        runs(p, m, v, g, cast, torch.tensor([float(step)]), factor)
        parameter.grad = before.double() * factor.double()
        judge.step()
        assert torch.equal(g, before)
        assert cast is None or torch.equal(cast, p)
    kept = judge.state[parameter]
    torch.testing.assert_close(p.double(), parameter.detach(), rtol=1e-6, atol=1e-7)
    largest = kept["exp_avg"].abs().max().item()  # of a few gradients that may cancel
    torch.testing.assert_close(m.double(), kept["exp_avg"], rtol=1e-6, atol=1e-6 * largest)
    torch.testing.assert_close(v.double(), kept["exp_avg_sq"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [3, 9, 64])
def test_a_gradient_in_half_precision(size, runs):
    """The very same as with its values in float32."""
    g = draw(size, 7).half()
    results = []
    for gradient in (g, g.float()):
        p, m, v = draw(size, 0), draw(size, 1), draw(size, 2).square()
        runs(p, m, v, gradient, None, torch.tensor([3.0]), torch.tensor([0.25]))
        results.append((p, m, v))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_step_left_out(runs):
    for size in (7, 64):
        kept = [draw(size, seed) for seed in range(5)]
        kept[2].abs_()
        before = [x.clone() for x in kept]
        kept[3].fill_(torch.inf)
        before[3].fill_(torch.inf)
        runs(*kept, torch.tensor([0.0]), ONE, YES)  # at step 0 there is no bias correction
        assert all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))


def test_gradients_from_tiny_to_large(runs):
    """The usual β₂ and ε: roots of squares near the smallest numbers, gradients of zero, and large ones."""
    betas, eps = (0.9, 0.999), 1e-8
    as_float32 = tuple(torch.tensor(betas).tolist())
    g = torch.tensor([0.0, 1e-30, -1e-22, 1e-19, -1e-12, 1e-8, 1e-4, -1.0, 1e4, 1e15] * 2)
    start = torch.zeros_like(g)
    p, m, v = start.clone(), start.clone(), start.clone()
    parameter, judge = in_float64(start, as_float32, torch.tensor(eps).item())
    for step in range(1, 4):
        runs(p, m, v, g, None, torch.tensor([float(step)]), betas=betas, eps=eps)
        parameter.grad = g.double()
        judge.step()
    # 1 − β₂^t is a few thousandths, and β₂^t in float32 is right to 2⁻²⁴ or two
    torch.testing.assert_close(p.double(), parameter.detach(), rtol=1e-4, atol=1e-28)
    assert p.isfinite().all() and (p[g != 0] != 0).all() and not p[g == 0].any()


def test_steps_far_on(runs):
    p, g, start = draw(8, 0), draw(8, 1), draw(8, 0)
    m, v = 0.1 * g, 0.1 * g * g
    runs(p, m, v, g, None, torch.tensor([1e6]))
    expected_m = 0.1 * g * BETAS[0] + (1 - BETAS[0]) * g
    expected_v = 0.1 * g * g * BETAS[1] + (1 - BETAS[1]) * g * g
    expected = start * (1 - LR * WEIGHT_DECAY) - LR * expected_m / (expected_v.sqrt() + EPS)
    torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-6)
