"""`causal_conv1d` against a loop over tokens and taps in float64, and against `nn.Conv1d`."""

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import bounds_of
from torch import nn

from qlakernels import causal_conv1d

CHANNELS = 5
LENGTHS = [1, 0, 2, 3, 9, 1, 4]


def loop(x, weight, lengths, activation):
    """x [1, T, D], token by token and tap by tap, no tap in front of the document."""
    rows, start = [], 0
    for length in lengths:
        for t in range(length):
            taps = range(min(t + 1, weight.shape[1]))
            rows.append(sum(x[0, start + t - s] * weight[:, weight.shape[1] - 1 - s] for s in taps))
        start += length
    y = torch.stack(rows)[None]
    return F.silu(y) if activation == "silu" else y


def positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_with_gradients(function, reference, x, weight):
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted_leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    y, wanted = function(*leaves), reference(*wanted_leaves)
    torch.testing.assert_close(y, wanted.float(), rtol=1e-5, atol=1e-6)
    cotangent = draw(*y.shape, seed=7)
    got = torch.autograd.grad(y, leaves, cotangent)
    expected = torch.autograd.grad(wanted, wanted_leaves, cotangent.double())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_packed_documents(width, activation):
    x, weight = draw(1, sum(LENGTHS), CHANNELS), draw(CHANNELS, width, seed=1)
    for boundaries in ({"position_ids": positions(LENGTHS)}, {"cu_seqlens": bounds_of(LENGTHS)}):
        assert_same_with_gradients(
            lambda x, weight, boundaries=boundaries: causal_conv1d(x, weight, activation=activation, **boundaries),
            lambda x, weight: loop(x, weight, LENGTHS, activation),
            x,
            weight,
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_and_positions_say_the_same(dtype):
    x, weight = draw(1, sum(LENGTHS), CHANNELS), draw(CHANNELS, 4, seed=1)
    by_positions = causal_conv1d(x, weight, position_ids=positions(LENGTHS).to(dtype))
    assert torch.equal(by_positions, causal_conv1d(x, weight, cu_seqlens=bounds_of(LENGTHS, dtype)))
    assert not torch.allclose(by_positions, causal_conv1d(x, weight))


def test_nothing_crosses_a_boundary():
    x, weight = draw(1, 12, CHANNELS), draw(CHANNELS, 4, seed=1)
    y = causal_conv1d(x, weight, cu_seqlens=bounds_of([5, 7]))
    x[:, :5] += 1
    assert torch.equal(y[:, 5:], causal_conv1d(x, weight, cu_seqlens=bounds_of([5, 7]))[:, 5:])


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 20])
def test_conv1d_of_torch(tokens, width):
    """A dense batch, also shorter than the filter."""
    conv = nn.Conv1d(CHANNELS, CHANNELS, width, groups=CHANNELS, padding=width - 1, bias=False, dtype=torch.float64)

    def reference(x, weight):
        y = torch.func.functional_call(conv, {"weight": weight[:, None]}, x.transpose(1, 2))
        return F.silu(y[..., :tokens].transpose(1, 2))

    x, weight = draw(3, tokens, CHANNELS), draw(CHANNELS, width, seed=1)
    assert_same_with_gradients(causal_conv1d, reference, x, weight)
    row_positions = torch.arange(tokens).expand(3, -1)
    assert torch.equal(causal_conv1d(x, weight), causal_conv1d(x, weight, position_ids=row_positions))


def test_positions_of_each_row():
    """Rows of a batch may hold different documents."""
    lengths = [[3, 5], [6, 2]]
    x, weight = draw(2, 8, CHANNELS), draw(CHANNELS, 4, seed=1)
    y = causal_conv1d(x, weight, position_ids=torch.cat([positions(row) for row in lengths]))
    for i, row in enumerate(lengths):
        torch.testing.assert_close(y[i : i + 1], loop(x[i : i + 1], weight, row, "silu"))


def test_a_slice_of_a_projection():
    x, weight = draw(1, 9, 3 * CHANNELS)[..., CHANNELS : 2 * CHANNELS], draw(CHANNELS, 4, seed=1)
    assert not x.is_contiguous()
    torch.testing.assert_close(causal_conv1d(x, weight), loop(x, weight, [9], "silu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_input(dtype):
    x, weight = draw(1, sum(LENGTHS), CHANNELS).to(dtype), draw(CHANNELS, 4, seed=1)
    y = causal_conv1d(x, weight, cu_seqlens=bounds_of(LENGTHS))
    assert y.dtype == dtype
    expected = loop(x.double(), weight.double(), LENGTHS, "silu")
    tolerance = 1e-6 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=4 * tolerance)


def test_no_tokens():
    assert causal_conv1d(draw(1, 0, CHANNELS), draw(CHANNELS, 4)).shape == (1, 0, CHANNELS)
