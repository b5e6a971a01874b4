"""The gated norm's Hopper operator as PyTorch sees it, on the CPU: launches are taken by PyTorch in float32."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

from qlakernels import backends, rms_norm_gated
from qlakernels.norm.hopper import operator
from qlakernels.norm.hopper.sizes import LANES, PIECE, THREADS

B, T, H, D = 2, 7, 3, 64
EPS = 1e-6


def by_torch(x, gate, weight, eps):
    return rms_norm_gated(x, gate, weight, eps=eps, backend="torch")


def gradients_of(dy, x, gate, weight, eps):
    """By hand, all [T, H, D] in float32: below autograd, where an operator runs, nothing is recorded."""
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, sigmoid = x * r, gate.sigmoid()
    p = dy * gate * sigmoid
    dx = r * (weight * p - n * (weight * p * n).mean(-1, keepdim=True))
    return dx, dy * weight * n * sigmoid * (1 + gate * (1 - sigmoid)), (p * n).sum((0, 1))


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The names of the kernels launched, in order."""
    names = []

    def launchers(dim, dtype, weight_dtype, keep, with_output):
        def tensor(row, step, tokens, heads):
            step *= PIECE
            assert row.numel() == (tokens - 1) * step + heads * dim and row.dtype == dtype
            return row.as_strided((tokens, heads, dim), (step, dim, 1))

        def forward(x, gate, weight, y, x_step, gate_step, y_step, tokens, heads, stretch, eps):
            names.append("forward")
            assert weight.dtype == weight_dtype
            x, gate = tensor(x, x_step, tokens, heads), tensor(gate, gate_step, tokens, heads)
            tensor(y, y_step, tokens, heads).copy_(by_torch(x, gate, weight, eps))

        def backward(dy, x, gate, weight, dx, dgate, y, sums, *numbers):
            names.append("backward")
            *steps, tokens, heads, stretch, eps = numbers
            assert weight.dtype == weight_dtype
            assert sums.shape == (-(-(-(-tokens // stretch) * heads * LANES[dim]) // THREADS), dim)
            dy, x, gate, dx, dgate, y = (
                tensor(row, step, tokens, heads) for row, step in zip((dy, x, gate, dx, dgate, y), steps, strict=True)
            )
            inputs = dy.float(), x.float(), gate.float(), weight.float()
            results = gradients_of(*inputs, eps)
            for place, result in zip((dx, dgate), results[:2], strict=True):
                place.copy_(result)
            sums.copy_((results[2] / sums.shape[0]).expand_as(sums))
            if with_output:
                y.copy_(by_torch(x, gate, weight, eps))

        return {"forward": forward, "backward": backward} if keep else {"forward": forward}

    monkeypatch.setattr(operator, "_launchers", launchers)
    return names


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(dtype=torch.bfloat16, weight_dtype=torch.float32, shape=(B, T, H, D)):
    x, gate = (draw(*shape, seed=seed).to(dtype).requires_grad_() for seed in (0, 1))
    return x, gate, draw(shape[-1], seed=2).to(weight_dtype).requires_grad_()


def check(x, gate, weight, dy=None):
    """The operator, output and gradients, against the torch backend in float64 on the same numbers."""
    leaves = [x, gate, weight]
    y = operator.run(*leaves, EPS)
    dy = draw(*y.shape, seed=3).to(y.dtype) if dy is None else dy
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = by_torch(*doubles, EPS)
    for got, wanted, like in zip(
        results, [expected, *torch.autograd.grad(expected, doubles, dy.double())], [x, *leaves], strict=True
    ):
        assert got.dtype == like.dtype and got.shape == like.shape
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(B, T, H, D), (5, D), (D,), (1, 1, 1, D), (4, 3, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, shape, launches):
    check(*inputs(dtype, shape=shape))
    assert launches == ["forward", "backward"]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_the_weight(weight_dtype):
    check(*inputs(torch.float16, weight_dtype))


def test_layouts():
    """A slice of a projection is read where it lies; what accesses of 16 bytes do not fit is copied."""
    channels = H * D
    projection = draw(B, T, 3 * channels).bfloat16()
    for x, copied in (
        (projection[..., channels : 2 * channels].unflatten(-1, (H, D)), False),
        (projection[..., 4 : 4 + channels].unflatten(-1, (H, D)), True),
        (draw(B, T, channels + 4).bfloat16()[..., :channels].unflatten(-1, (H, D)), True),
        (projection.unflatten(-1, (H, 3 * D))[..., D : 2 * D], True),  # each head of a token apart
        (draw(B, T, D, H).bfloat16().transpose(2, 3), True),
        (projection[:, ::2, :channels].unflatten(-1, (H, D)), True),  # the batch does not lie behind itself
        (projection[0, :, D : 2 * D], False),
        (projection[:1, :1, :channels].unflatten(-1, (H, D)), False),
        (draw(channels).bfloat16().expand(B, T, channels).unflatten(-1, (H, D)), True),
    ):
        row, step = operator.as_rows(x)
        assert (row.data_ptr() != x.data_ptr()) == copied
        tokens, heads = operator._tokens_and_heads(x)
        assert torch.equal(row.as_strided((tokens, heads, D), (step * PIECE, D, 1)).view(x.shape), x)
        weight = draw(D).requires_grad_()
        check(draw(*x.shape, seed=4).bfloat16().requires_grad_(), x.detach().requires_grad_(), weight)
    check(*inputs(), dy=torch.ones(1).bfloat16().expand(B, T, H, D))


def test_a_weight_that_is_not_aligned():
    x, gate, _ = inputs()
    check(x, gate, draw(D + 1)[1:].requires_grad_())


def test_what_a_caller_gives_is_written(launches):
    """Into slices of joint tensors, and nothing beside them."""
    x, gate, weight = (t.detach() for t in inputs())
    dy = draw(B, T, H, D, seed=3).bfloat16()
    joint = [torch.full((B, T, 3 * H * D), 7.0).bfloat16() for _ in range(4)]
    y, dx, dgate, again = (t[..., H * D : 2 * H * D].unflatten(-1, (H, D)) for t in joint)
    operator.launch_forward(x, gate, weight, EPS, y)
    dweight = operator.launch_backward(dy, x, gate, weight, EPS, dx, dgate, again)
    alone = torch.empty_like(x), torch.empty_like(x)
    assert torch.equal(operator.launch_backward(dy, x, gate, weight, EPS, *alone), dweight)
    assert launches == ["forward", "backward", "backward"]
    assert torch.equal(y, operator._forward_op(x, gate, weight, EPS)) and torch.equal(y, again)
    for got, expected in zip((dx, dgate, dweight), operator._backward_op(dy, x, gate, weight, EPS), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(dx, alone[0]) and torch.equal(dgate, alone[1])
    assert all((t[..., : H * D] == 7).all() and (t[..., 2 * H * D :] == 7).all() for t in joint)


@pytest.mark.parametrize("name", ["y", "dx", "dgate", "the second y"])
def test_what_cannot_be_written(name):
    x, gate, weight = (t.detach() for t in inputs())
    bad = torch.empty(B, H, T, D).bfloat16().transpose(1, 2)
    good = torch.empty_like(x)
    with pytest.raises(ValueError, match=rf"{name[-1] if 'y' in name else name} of shape .* has strides"):
        if name == "y":
            operator.launch_forward(x, gate, weight, EPS, bad)
        elif name == "dx":
            operator.launch_backward(x, x, gate, weight, EPS, bad, good)
        elif name == "dgate":
            operator.launch_backward(x, x, gate, weight, EPS, good, bad)
        else:
            operator.launch_backward(x, x, gate, weight, EPS, good, torch.empty_like(x), bad)


def test_no_tokens(launches):
    x, gate, weight = inputs(shape=(B, 0, H, D))
    y = operator.run(x, gate, weight, EPS)
    assert y.shape == (B, 0, H, D) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.shape == gate.grad.shape == x.shape and weight.grad.abs().max() == 0
    assert launches == []


def test_what_is_kept():
    x, gate, weight = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        operator.run(x, gate, weight, EPS)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, gate, weight)}


def test_opcheck():
    x, gate, weight = inputs()
    opcheck(operator._forward_op, (x, gate, weight, EPS))
    x, gate, weight = x.detach(), gate.detach(), weight.detach()
    opcheck(operator._forward_op, (x, gate, weight, EPS))
    opcheck(operator._backward_op, (torch.ones_like(x), x, gate, weight, EPS))


def test_compiled_is_eager():
    torch._dynamo.reset()

    def function(x, gate, weight):
        return operator.run(x * 2, gate, weight, EPS) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for variant in (function, compiled):
        leaves = inputs()
        y = variant(*leaves)
        results.append([y, *torch.autograd.grad(y.float().sum(), leaves)])
    assert all(torch.equal(eager, other) for eager, other in zip(*results, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, launches):
    leaves = inputs()

    def function(x, gate, weight):
        return operator.run(x, gate, weight, EPS).float()

    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    launches.clear()
    torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=use_reentrant).sum().backward()
    assert launches == ["forward", "forward", "backward"]
    assert all(torch.equal(leaf.grad, wanted) for leaf, wanted in zip(leaves, expected, strict=True))


def test_no_second_gradients():
    x, gate, weight = inputs()
    (dx,) = torch.autograd.grad(operator.run(x, gate, weight, EPS).float().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second gradients"):
        dx.float().sum().backward()


def test_stretches():
    """Long ones where there is enough to do, shorter ones where threads would be too few."""
    assert operator.stretch_of("forward", 65536, 64, 128) == 32
    assert operator.stretch_of("backward", 65536, 64, 128) == 64
    assert operator.stretch_of("backward", 8192, 8, 128) < 64
    for name in ("forward", "backward"):
        assert operator.stretch_of(name, 1, 1, 64) == operator.LEAST_STRETCH


def test_through_the_public_function(launches, monkeypatch):
    """Compiled whole, traced anew once for all lengths."""
    torch._dynamo.reset()
    ours = backends._registry["rms_norm_gated"]["tilelang"]
    runs = dataclasses.replace(ours, refuses=lambda call: None)
    monkeypatch.setitem(backends._registry["rms_norm_gated"], "tilelang", runs)
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(backends, "_said", set())
    x, gate, weight = (t.detach() for t in inputs())
    rms_norm_gated(x, gate, weight, backend="torch")
    assert launches == []
    rms_norm_gated(x, gate, weight)  # the decision is logged, which a trace cannot
    assert launches == ["forward"]
    assert "rms_norm_gated: backend tilelang on cpu (first choice)" in backends.decisions()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, gate):
        return rms_norm_gated(x, gate, weight)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for tokens in (T, 30, 40, 50):
        x, gate, _ = inputs(shape=(B, tokens, H, D))
        x, gate = x.detach(), gate.detach()
        assert torch.equal(compiled(x, gate), function(x, gate))
    assert counter.frame_count == 2


def test_what_is_refused(monkeypatch):
    """Where the GPU would do: sizes without kernels, and a gate in another dtype."""
    monkeypatch.setattr("qlakernels.norm.api.refused_by_hopper", lambda call: None)
    weight = draw(80)
    for gate, reason in (
        (draw(2, 80).bfloat16(), r"takes D in \(64, 96, 128, 192, 256\), not D=80"),
        (draw(2, 64), "takes a gate in x's dtype only"),
    ):
        dim = gate.shape[-1]
        with pytest.raises(backends.BackendRefused, match=reason):
            rms_norm_gated(draw(2, dim).bfloat16(), gate, weight[:dim], backend="tilelang")
