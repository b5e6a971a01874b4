"""The whole mixer's fused form on a Hopper GPU against its operators in float64 through autograd."""

import pytest
import torch

from qlakernels import gated_delta_net
from qlakernels.gated_delta_net.api import Heads
from qlakernels.short_conv.api import positions_in_documents

pytestmark = pytest.mark.gpu
NAMES = ("joint", "conv_weight", "A_log", "dt_bias", "norm_weight", "out_weight")
SLACK = 0.005  # beside the errors of the operators one after the other


def draw(*shape, seed, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).cuda()


def problem(heads, batch, tokens, padding=0, dtype=torch.bfloat16):
    joint = draw(batch, tokens, heads.joint[-1] + padding, seed=0).to(dtype)
    weights = (
        draw(heads.convolved, 4, seed=1, scale=0.4),
        draw(heads.value_heads, seed=2).abs().log(),
        draw(heads.value_heads, seed=3),
        1 + 0.1 * draw(heads.value_dim, seed=4),
        draw(264, heads.values, seed=5, scale=heads.values**-0.5).to(dtype).float(),
    )
    return [x.requires_grad_() for x in (joint, *weights)]


def outputs(inputs, heads, backend, **options):
    out = gated_delta_net(*inputs, heads, backend=backend, **options)
    dout = draw(*out.shape, seed=9).to(inputs[0].dtype).to(out.dtype)
    return out, torch.autograd.grad(out, inputs, dout)


def terms_of(name, exact, d_joint, heads):
    """What the gradient of a parameter of the decay is the sum of, [B, T, Hv]."""
    part = slice(*heads.joint[1:3])
    y = exact[0].detach()[..., part] + exact[3].detach()
    da = d_joint[..., part]
    return da if name == "dt_bias" else da * torch.nn.functional.softplus(y) / y.sigmoid()


def error(got, right):
    return ((got.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("neg", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("heads", "padding"),
    [(Heads(2, 128, 4, 128), 0), (Heads(2, 64, 2, 128), 4), (Heads(2, 96, 6, 192), 4)],
    ids=["128/128", "64/128", "96/192"],
)
def test_against_float64(heads, padding, packed, neg):
    inputs = problem(heads, 1 if packed else 2, 515, padding)
    options = {"allow_neg_eigval": neg}
    if packed:
        cu = torch.tensor([0, 1, 130, 130, 450, 515], dtype=torch.int32, device="cuda")
        options |= {"cu_seqlens": cu, "position_ids": positions_in_documents(cu, 515)}
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, gradients = outputs(exact, heads, "torch", **options)
    got, ours = outputs(inputs, heads, "tilelang", **options)
    apart, theirs = outputs(inputs, heads, "torch", **options)  # its operators take the kernels each by itself
    assert error(got, expected) < 1.2 * error(apart, expected) + SLACK < 0.02
    for name, mine, other, right, given in zip(NAMES, ours, theirs, gradients, inputs, strict=True):
        assert mine.dtype == given.dtype
        if name in ("A_log", "dt_bias"):  # sums over tokens, of which little may be left
            terms = terms_of(name, exact, gradients[0], heads)
            torch.testing.assert_close(terms.sum((0, 1)), right, rtol=1e-5, atol=1e-6)
            assert ((mine - right).abs() < 0.05 * terms.norm(dim=1).norm(dim=0)).all(), name
        else:
            assert error(mine, right) < 1.2 * error(other, right) + SLACK < 0.02, name
    assert not padding or ours[0][..., -padding:].abs().sum() == 0
    again, once_more = outputs(inputs, heads, "tilelang", **options)
    assert torch.equal(again, got) and all(map(torch.equal, once_more, ours))


def test_a_cast_keeps_the_gradient_whole():
    """With the weight cast beforehand its gradient is not rounded to half precision; without gradients nothing is
    kept."""
    heads = Heads(2, 128, 4, 128)
    inputs = problem(heads, 1, 300)
    cast = inputs[-1].detach().bfloat16()
    out, gradients = outputs(inputs, heads, "tilelang", out_cast=cast)
    assert gradients[-1].dtype == torch.float32
    assert (gradients[-1] != gradients[-1].bfloat16().float()).any()
    with torch.no_grad():
        assert torch.equal(gated_delta_net(*inputs, heads, out_cast=cast, backend="tilelang"), out)


def test_compiled():
    heads = Heads(2, 128, 4, 128)
    inputs = problem(heads, 1, 300)
    function = lambda *x: gated_delta_net(*x, heads, backend="tilelang") * 2  # noqa: E731
    eager = function(*inputs)
    compiled = torch.compile(function, fullgraph=True)(*inputs)
    assert torch.equal(compiled, eager)
    gradients = [torch.autograd.grad(out.float().sum(), inputs) for out in (compiled, eager)]
    assert all(map(torch.equal, *gradients))
