"""The arithmetic of the simple Hopper kernels, run on the CPU."""

import math
import shutil

import pytest
import tilelang.language as T
import torch
import torch.nn.functional as F
from on_cpu import compile_for_cpu

from qlakernels.gated_delta_rule.hopper import boundaries, reach
from qlakernels.gated_delta_rule.hopper.boundaries import boundaries_kernel
from qlakernels.gated_delta_rule.hopper.gate_gradients import WIDTH, gate_gradients_kernel
from qlakernels.gated_delta_rule.hopper.reach import decay_kernel
from qlakernels.gated_delta_rule.hopper.sizes import GATE_TOKENS as TOKENS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="kernels for the CPU need g++")
NAN = float("nan")


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_gate_gradients(gate, sigmoid, monkeypatch):
    kernel = compile_for_cpu(gate_gradients_kernel, gate, sigmoid, "float32", "float32", monkeypatch=monkeypatch)
    for tokens, heads in ((1, 1), (TOKENS, WIDTH), (2 * TOKENS + 22, 3), (3 * TOKENS + 1, 2 * WIDTH + 5)):
        random = torch.Generator().manual_seed(tokens)
        dg, dbeta, g, beta = (torch.randn(tokens, heads, generator=random) for _ in range(4))
        A_log, dt_bias = (torch.randn(heads, generator=random) for _ in range(2))
        g, beta = 3 * g, 3 * beta
        extremes = torch.tensor([-200.0, -100, -30, -17, 0, 17, 30, 100, 200])
        g[: len(extremes), 0], beta[: len(extremes), 0] = extremes[:tokens], extremes[:tokens]
        dg_raw, dbeta_raw = (torch.full((tokens, heads), NAN) for _ in range(2))
        sums = torch.full((2, -(-tokens // TOKENS), heads), NAN)
        kernel(dg, dbeta, g, beta, A_log, dt_bias, dg_raw, dbeta_raw, sums, 2.0)

        a, b, A_log, dt_bias = (x.double().requires_grad_() for x in (g, beta, A_log, dt_bias))
        decay = -A_log.exp() * F.softplus(a + dt_bias) if gate else a
        step = 2 * b.sigmoid() if sigmoid else b
        exact = torch.autograd.grad([decay, step], [a, b], [dg.double(), dbeta.double()], retain_graph=True)
        for got, expected in zip((dg_raw, dbeta_raw), exact, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-14)
        if gate:
            exact = torch.autograd.grad(decay, [A_log, dt_bias], dg.double())
            for got, expected in zip(sums.sum(1), exact, strict=True):
                torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * tokens**0.5)


@pytest.mark.parametrize("most", [boundaries.MOST, 100])
def test_order_of_documents(most, monkeypatch):
    monkeypatch.setattr(boundaries, "MOST", most)
    monkeypatch.setattr(boundaries, "REQUIREMENTS", None)
    kernel = compile_for_cpu(boundaries_kernel, monkeypatch=monkeypatch)
    random = torch.Generator().manual_seed(0)
    for lengths in (
        [5],
        [0, 0, 0],
        [3, 70, 0, 70, 1, 64, 3],
        list(range(200)),
        torch.randint(0, 20, (1000,), generator=random).tolist(),
    ):
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        order = torch.full((len(lengths),), -1, dtype=torch.int32)
        kernel(cu_seqlens, order, int(cu_seqlens[-1]))
        expected = range(len(lengths))
        if len(lengths) <= most:
            expected = sorted(expected, key=lambda n: -lengths[n])
        assert order.tolist() == list(expected)


@pytest.mark.parametrize("inside", [False, True])
def test_bounds_of_what_chunks_leave(inside, monkeypatch):
    """Of each document's own chunks, at the slots that are theirs."""
    monkeypatch.setattr(reach, "log2", T.log2)
    lengths, heads = [70, 0, 1, 200, 64], 19
    options, sizes = (inside, inside, "float32", "float32"), {"documents": len(lengths)}
    kernel = compile_for_cpu(decay_kernel, *options, monkeypatch=monkeypatch, sizes=sizes)
    random = torch.Generator().manual_seed(0)
    g, beta = (torch.randn(sum(lengths), heads, generator=random) for _ in range(2))
    A_log, dt_bias = (torch.randn(heads, generator=random) for _ in range(2))
    if not inside:
        g, beta = -g.abs(), 3 * beta.sigmoid()
        g[5, 3] = -1e30  # one decay that float32 cannot tell from zero
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    bounds = torch.full((sum(lengths) // 64 + len(lengths), heads), NAN)
    kernel(g, beta, A_log, dt_bias, cu_seqlens, bounds, 3.0, 3)

    log, step = g.double(), beta.double()
    if inside:
        log = -A_log.double().exp() * F.softplus(log + dt_bias.double())
        step = 3 * step.sigmoid()
    log = log.clamp(min=reach.LEAST_DECAY) / math.log(2) + (1 - step).abs().clamp(min=1).log2()
    for n, length in enumerate(lengths):
        first = int(cu_seqlens[n])
        for c, chunk in enumerate(log[first : first + length].split(64) if length else ()):
            torch.testing.assert_close(bounds[first // 64 + n + c].double(), chunk.sum(0), rtol=1e-5, atol=1e-4)
