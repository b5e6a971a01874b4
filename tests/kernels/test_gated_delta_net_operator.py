"""The mixer as one operator on the CPU, its kernels replaced by plain operators: what it gives them, and what it makes
of what they give."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.library import opcheck

from qlakernels import backends, causal_conv1d, chunk_gated_delta_rule, gated_delta_net, rms_norm_gated
from qlakernels.gated_delta_net import fused
from qlakernels.gated_delta_net.api import Heads

HEADS = Heads(2, 16, 4, 8)
CU = torch.tensor([0, 5, 21], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(5), torch.arange(16)])[None]


def gradients(function, inputs, dy):
    """On a thread of its own, as here, below autograd, nothing is recorded."""

    def work():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, dy)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    given = {}

    def rule(q, k, v, a, b, A_log, dt_bias, cu, neg):
        return chunk_gated_delta_rule(
            q, k, v, a, b, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
            use_beta_sigmoid_in_kernel=True, allow_neg_eigval=neg, cu_seqlens=cu, backend="torch",
        )[0]  # fmt: skip

    def rule_forward(q, k, v, a, b, cu, A_log, dt_bias, state, scale, final, l2norm, gate, sigmoid, neg, keep):
        assert state is None and not final and l2norm and gate and sigmoid and scale == HEADS.key_dim**-0.5
        given["v"] = v.clone()  # the kernels keep W for it
        o = rule(q, k, v, a, b, A_log, dt_bias, cu, neg)
        tokens = q.shape[0] * q.shape[1]
        _, _, W, states, firsts, order = fused.rule._forward_fake(
            q, k, v, a, b, cu, A_log, dt_bias, None, scale, False, True, True, True, neg, keep
        )
        assert W.shape[0] == (tokens if keep else 0)
        return o, None, W.zero_(), states.zero_(), firsts, order.zero_()

    def rule_backward(q, k, a, b, W, states, firsts, do, d_final, cu, order, A_log, dt_bias, initial, *options):
        *_, neg, _, into = options
        assert d_final is None and not initial and firsts.numel() == 0
        inputs = q, k, given["v"], a, b, A_log, dt_bias
        dq, dk, dv, da, db, dA, ddt = gradients(lambda *x: rule(*x, cu, neg), inputs, do)
        for x, gradient in zip(into, (dq, dk, dv, da, db), strict=True):
            x.copy_(gradient)
        return *into, torch.stack([dA, ddt]), None

    def conv_backward(dy, x, weight, positions, silu, dx):
        assert silu
        gx, gw = gradients(lambda x, w: causal_conv1d(x, w, positions, backend="torch"), (x, weight), dy)
        dx.copy_(gx)
        return gw

    def norm_backward(dy, x, gate, weight, eps, dx, dgate, y):
        gx, ggate, gw = gradients(lambda *t: rms_norm_gated(*t, eps, backend="torch"), (x, gate, weight), dy)
        dx.copy_(gx)
        dgate.copy_(ggate)
        y.copy_(rms_norm_gated(x, gate, weight, eps, backend="torch"))
        return gw

    monkeypatch.setattr(fused.rule, "_forward", rule_forward)
    monkeypatch.setattr(fused.rule, "_backward", rule_backward)
    conv_forward = lambda x, w, positions, silu, keep, y: y.copy_(causal_conv1d(x, w, positions, backend="torch"))  # noqa: E731
    monkeypatch.setattr(fused.convolution, "launch_forward", conv_forward)
    monkeypatch.setattr(fused.convolution, "launch_backward", conv_backward)
    norm_forward = lambda x, gate, w, eps, y: y.copy_(rms_norm_gated(x, gate, w, eps, backend="torch"))  # noqa: E731
    monkeypatch.setattr(fused.norm, "launch_forward", norm_forward)
    monkeypatch.setattr(fused.norm, "launch_backward", norm_backward)
    ours = backends._registry["gated_delta_net"]["tilelang"]
    monkeypatch.setitem(
        backends._registry["gated_delta_net"], "tilelang", dataclasses.replace(ours, refuses=lambda call: None)
    )
    monkeypatch.setattr(backends, "_decided", {})


def problem(padding=3, batch=1):
    shapes = [(batch, 21, HEADS.joint[-1] + padding), (HEADS.convolved, 4), (4,), (4,), (8,), (24, HEADS.values)]
    draws = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes))
    return [x.requires_grad_() for x in draws]


PACKED = {"cu_seqlens": CU, "position_ids": POSITIONS}


@pytest.mark.parametrize("neg", [False, True])
@pytest.mark.parametrize("options", [{}, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("keep_convolved", [False, True])
def test_it_is_its_operators(options, neg, cast, keep_convolved):
    inputs = problem(batch=1 if options else 2)
    options = options | {"allow_neg_eigval": neg, "eps": 1e-5, "keep_convolved": keep_convolved}
    if cast:
        options["out_cast"] = inputs[-1].detach() + 1
    expected = gated_delta_net(*inputs, HEADS, backend="torch", **options)
    got = gated_delta_net(*inputs, HEADS, backend="tilelang", **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn(got.shape, generator=torch.Generator().manual_seed(9))
    for mine, right in zip(*(torch.autograd.grad(out, inputs, dout) for out in (got, expected)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def test_without_gradients_nothing_is_kept():
    inputs = [x.detach() for x in problem()]
    sizes = [HEADS.key_heads, HEADS.key_dim, HEADS.value_heads, HEADS.value_dim]
    out, *kept = fused._forward_op(*inputs, inputs[-1], None, None, sizes, 1e-6, False, False, True)
    assert sum(x.numel() for x in kept) == 0
    assert torch.equal(out, gated_delta_net(*inputs, HEADS, backend="tilelang"))


def test_operators_are_sound():
    inputs, sizes = problem(), [HEADS.key_heads, HEADS.key_dim, HEADS.value_heads, HEADS.value_dim]
    cast = inputs[-1].detach()
    for cu, positions in ((None, None), (CU, POSITIONS)):
        opcheck(fused._forward_op, (*inputs, cast, positions, cu, sizes, 1e-6, False, True, True))
        joint, *weights, _ = (x.detach() for x in inputs)
        out, *kept = fused._forward_op(*inputs, cast, positions, cu, sizes, 1e-6, False, True, True)
        kept = [x.detach() for x in kept]
        dout = torch.ones_like(out)
        arguments = dout, joint, *kept, *weights, cast, positions, cu, sizes, 1e-6, False, torch.float32
        opcheck(fused._backward_op, arguments)


def test_there_are_no_second_gradients():
    inputs = problem()
    out = gated_delta_net(*inputs, HEADS, backend="tilelang")
    (d_joint,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="the mixer of the tilelang backend has no second gradients"):
        d_joint.sum().backward()
