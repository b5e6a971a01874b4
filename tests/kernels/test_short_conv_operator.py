"""The short convolution's Hopper operator as PyTorch sees it, on the CPU: launches are taken by PyTorch in float32."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

from qlakernels import backends, causal_conv1d
from qlakernels.short_conv.hopper import operator

B, T, D, W = 2, 21, 16, 4
POSITIONS = torch.cat([torch.arange(n) for n in (5, 1, 15, 20, 1)]).view(B, T)


def conv(x, weight, positions, silu):
    return causal_conv1d(x.float(), weight.float(), positions, activation="silu" if silu else None, backend="torch")


def by_torch(x, weight, positions, activation):
    return causal_conv1d(x, weight, positions, activation=activation, backend="torch")


def gradients_of(dy, x, weight, positions, silu):
    """By hand: below autograd, where an operator runs, nothing is recorded."""
    width, length = weight.shape[1], x.shape[1]
    if silu:
        p = conv(x, weight, positions, False)
        dy = dy * p.sigmoid() * (1 + p * (1 - p.sigmoid()))
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    for s in range(width):
        late = dy[:, s:] if positions is None else dy[:, s:].masked_fill((positions[:, s:] < s)[..., None], 0)
        dx[:, : length - s] += weight[:, width - 1 - s] * late
        dweight[:, width - 1 - s] = (late * x[:, : length - s]).sum((0, 1))
    return dx, dweight


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The names of the kernels launched, in order."""
    names = []

    def launchers(width, dtype, weight_dtype, position_dtype, silu, keep):
        def tensor(row, C, step, tokens, length, groups):
            assert row.numel() == (tokens - 1) * step * C + groups * C and row.dtype == dtype
            return row.as_strided((tokens // length, length, groups * C), (length * step * C, step * C, 1))

        def parts(x, weight, positions, step, tokens, length):
            groups, C = weight.shape[0], weight.shape[1] // width
            assert weight.dtype == weight_dtype and positions.dtype == position_dtype
            positions = positions.view(-1, length) if positions.numel() else None
            return tensor(x, C, step, tokens, length, groups), weight.view(-1, width), positions

        def forward(x, weight, positions, y, step, tokens, length, stretch):
            names.append("forward")
            x, weight, positions = parts(x, weight, positions, step, tokens, length)
            y.copy_(conv(x, weight, positions, silu).flatten())

        def backward(dy, x, weight, positions, dx, sums, dy_step, x_step, dx_step, tokens, length, stretch):
            names.append("backward")
            assert sums.shape[0] == -(-tokens // stretch)
            dy = tensor(dy, weight.shape[1] // width, dy_step, tokens, length, weight.shape[0])
            x, weight, positions = parts(x, weight, positions, x_step, tokens, length)
            gradients = gradients_of(dy.float(), x.float(), weight.float(), positions, silu)
            dx.copy_(gradients[0].flatten())
            sums.copy_((gradients[1].view(sums.shape[1:]) / sums.shape[0]).expand_as(sums))

        return {"forward": forward, "backward": backward}

    monkeypatch.setattr(operator, "_launchers", launchers)
    return names


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(dtype=torch.bfloat16, weight_dtype=torch.float32):
    return draw(B, T, D).to(dtype).requires_grad_(), draw(D, W, seed=1).to(weight_dtype).requires_grad_()


def check(x, weight, positions, activation, dy=None):
    """The operator, output and both gradients, against the torch backend on the same numbers."""
    results = []
    for function in (operator.run, by_torch):
        y = function(x, weight, positions, activation)
        cotangent = draw(*y.shape, seed=2).to(y.dtype) if dy is None else dy
        results.append([y, *torch.autograd.grad(y, [x, weight], cotangent)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(
    "positions", [None, POSITIONS, POSITIONS.int(), POSITIONS[:1]], ids=["dense", "int64", "int32", "row"]
)
def test_values_and_gradients(positions, activation, launches):
    if positions is not None and positions.shape[0] == 1:
        positions = positions.expand(B, T)
    check(*inputs(), positions, activation)
    assert launches == ["forward", "backward"]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_the_weight(weight_dtype):
    check(*inputs(torch.float16, weight_dtype), POSITIONS, "silu")


def test_layouts():
    """A slice of a projection is read where it lies; what loads of 16 bytes do not fit is copied."""
    projection = draw(B, T, 3 * D).bfloat16()
    for x, copied in (
        (projection[..., D : 2 * D], False),
        (projection[..., 4 : 4 + D], True),
        (draw(B, T, D + 4).bfloat16()[..., :D], True),
        (draw(B, D, T).bfloat16().transpose(1, 2), True),
        (projection[:, ::2, :D], True),  # the batch does not lie behind itself
        (projection[:1, :1, :D], False),
        (draw(D).bfloat16().expand(B, T, D), True),
    ):
        row, step = operator.as_row(x)
        assert (row.data_ptr() != x.data_ptr()) == copied
        tokens = x.shape[0] * x.shape[1]
        assert torch.equal(row.as_strided((tokens, D), (step, 1)).view(x.shape), x)
        y = operator.run(x, draw(D, W), None, "silu")
        torch.testing.assert_close(y.float(), conv(x, draw(D, W), None, True), rtol=1e-2, atol=1e-2)
    check(*inputs(), None, "silu", dy=torch.ones(1).bfloat16().expand(B, T, D))


def test_a_weight_that_is_not_aligned():
    x, _ = inputs()
    weight = draw(D * W + 1)[1:].view(D, W).requires_grad_()
    check(x, weight, None, "silu")


def test_no_tokens():
    x, weight = draw(B, 0, D).bfloat16().requires_grad_(), draw(D, W).requires_grad_()
    y = operator.run(x, weight, None, "silu")
    assert y.shape == (B, 0, D) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.shape == x.shape and weight.grad.abs().max() == 0


def test_what_is_kept():
    x, weight = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        operator.run(x, weight, POSITIONS, "silu")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, weight, POSITIONS)}


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["dense", "packed"])
def test_opcheck(positions):
    x, weight = inputs()
    opcheck(operator._forward_op, (x, weight, positions, True))
    x, weight = x.detach(), weight.detach()
    opcheck(operator._forward_op, (x, weight, positions, True))
    opcheck(operator._backward_op, (torch.ones_like(x), x, weight, positions, True))


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["dense", "packed"])
def test_compiled_is_eager(positions):
    torch._dynamo.reset()

    def function(x, weight):
        return operator.run(x * 2, weight, positions, "silu") * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for variant in (function, compiled):
        x, weight = inputs()
        y = variant(x, weight)
        results.append([y, *torch.autograd.grad(y.float().sum(), [x, weight])])
    assert all(torch.equal(eager, other) for eager, other in zip(*results, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, launches):
    x, weight = inputs()

    def function(x, weight):
        return operator.run(x, weight, None, "silu").float()

    expected = torch.autograd.grad(function(x, weight).sum(), [x, weight])
    launches.clear()
    torch.utils.checkpoint.checkpoint(function, x, weight, use_reentrant=use_reentrant).sum().backward()
    assert launches == ["forward", "forward", "backward"]
    assert torch.equal(x.grad, expected[0]) and torch.equal(weight.grad, expected[1])


def test_no_second_gradients():
    x, weight = inputs()
    (dx,) = torch.autograd.grad(operator.run(x, weight, None, "silu").float().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second gradients"):
        dx.float().sum().backward()


def test_stretches():
    """Long ones where there is enough to do, shorter ones where threads would be too few."""
    assert operator.stretch_of("forward", 65536, 8192) == 32
    assert operator.stretch_of("backward", 65536, 8192) == 128
    assert operator.stretch_of("backward", 8192, 1024) < 128
    assert operator.stretch_of("forward", 1, 8) == operator.stretch_of("backward", 1, 8) == operator.LEAST_STRETCH


def test_through_the_public_function(launches, monkeypatch):
    """Compiled whole, traced anew once for all lengths."""
    torch._dynamo.reset()
    ours = backends._registry["causal_conv1d"]["tilelang"]
    runs = dataclasses.replace(ours, refuses=lambda call: None)
    monkeypatch.setitem(backends._registry["causal_conv1d"], "tilelang", runs)
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(backends, "_said", set())
    weight = draw(D, W)
    x = draw(B, T, D).bfloat16()
    causal_conv1d(x, weight, backend="torch")
    assert launches == []
    causal_conv1d(x, weight)  # the decision is logged, which a trace cannot
    assert launches == ["forward"]
    assert "causal_conv1d: backend tilelang on cpu (first choice)" in backends.decisions()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: causal_conv1d(x, weight), fullgraph=True, backend=counter)
    for tokens in (T, 30, 40, 50):
        x = draw(B, tokens, D).bfloat16()
        assert torch.equal(compiled(x), causal_conv1d(x, weight))
    assert counter.frame_count == 2
