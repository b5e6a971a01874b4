"""The gated norm's Hopper kernels as they are, lanes and shuffles, with their CUDA source run on the CPU."""

import shutil

import pytest
import torch
from emulated import emulate

from qlakernels import rms_norm_gated
from qlakernels.norm.hopper import operator
from qlakernels.norm.hopper.kernels import specialisations
from qlakernels.norm.hopper.sizes import THREADS

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="the emulation needs nvcc")
EPS = 1e-6
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def launchers_of(dim, dtype, weight_dtype, folder):
    """As the operator's, both directions with the second y."""
    run = {
        name: emulate(key, THREADS, folder)
        for name, key in specialisations(dim, dtype, weight_dtype, True, with_output=True).items()
    }
    sizes = "tokens", "heads", "stretch", "eps"

    def forward(*arguments):
        names = "x", "gate", "weight", "y", "x_step", "gate_step", "y_step", *sizes
        given = dict(zip(names, arguments, strict=True))
        threads = operator._threads(given["stretch"], given["tokens"], given["heads"], dim)
        run["forward"](-(-threads // THREADS), **given)

    def backward(*arguments):
        tensors = "dy", "x", "gate", "dx", "dgate", "y"
        names = *tensors[:3], "weight", *tensors[3:], "sums", *(f"{x}_step" for x in tensors), *sizes
        given = dict(zip(names, arguments, strict=True))
        given["sums"].fill_(float("nan"))
        run["backward"](given["sums"].shape[0], blocks=given["sums"].shape[0], **given)

    return {"forward": forward, "backward": backward}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slice_of(shape, dtype, seed=None):
    """[T, H, D] in the middle of a joint tensor of sevens, and that tensor."""
    channels = shape[1] * shape[2]
    joint = torch.full((shape[0], 3 * channels), 7.0, dtype=dtype)
    x = joint[:, channels : 2 * channels].unflatten(-1, shape[1:])
    if seed is not None:
        x.copy_(draw(*shape, seed=seed))
    return x, joint


@pytest.mark.parametrize(
    ("dim", "dtype", "weight_dtype"), [(128, torch.bfloat16, torch.float32), (96, torch.float16, torch.float16)]
)
def test_forward_and_backward(dim, dtype, weight_dtype, monkeypatch, tmp_path):
    made = launchers_of(dim, *(str(x).removeprefix("torch.") for x in (dtype, weight_dtype)), tmp_path)
    monkeypatch.setattr(operator, "_launchers", lambda *_: made)
    for tokens, heads in ((1, 1), (21, 3), (70, 1)):
        shape = tokens, heads, dim
        (x, _), (gate, _), (dy, _) = (slice_of(shape, dtype, seed) for seed in (1, 2, 3))
        weight = draw(dim, seed=4).to(weight_dtype)
        (y, *joint), (dx, one), (dgate, another), (again, third) = (slice_of(shape, dtype) for _ in range(4))
        operator.launch_forward(x, gate, weight, EPS, y)
        dweight = operator.launch_backward(dy, x, gate, weight, EPS, dx, dgate, again)
        leaves = [t.double().requires_grad_() for t in (x, gate, weight)]
        expected = rms_norm_gated(*leaves, eps=EPS, backend="torch")
        gradients = torch.autograd.grad(expected, leaves, dy.double())
        unit = UNIT[dtype]
        for got, wanted in zip((y, dx, dgate), (expected.detach(), *gradients[:2]), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=2.1 * unit, atol=1e-4)  # rounded twice
        assert (dweight - gradients[2]).norm() <= unit * gradients[2].norm()
        assert torch.equal(again, y)
        for whole in (*joint, one, another, third):
            assert (whole[:, : heads * dim] == 7).all() and (whole[:, 2 * heads * dim :] == 7).all()
