"""Each function beside the one of transformers that it replaces: dtypes, layouts, boundaries."""

import pytest
import torch

from qlatrain.integrations.transformers import operators
from qlatrain.integrations.transformers.families import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_family
def test_the_gated_norm(family, dtype):
    """Of every family, with its own epsilon where that shows: the same bits in half precision."""
    norm_class = getattr(family.module(), family.norm)
    for eps in (1e-6, 1e-5, 1e-1):
        norm = norm_class(24, eps=eps).to(dtype)
        norm.weight.data = draw(24, seed=1, dtype=dtype)
        x, gate = draw(200, 24, dtype=dtype), draw(200, 24, seed=2, dtype=dtype) * 3
        y, expected = operators.rms_norm_gated(norm, x, gate, backend="torch"), norm(x, gate)
        assert y.dtype == expected.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(y, expected, rtol=2e-6, atol=1e-6)
        else:
            assert torch.equal(y, expected)


def test_the_gated_norm_of_another_activation():
    norm = FAMILIES[0].module().Qwen3NextRMSNormGated(8)
    norm.activation = "gelu"
    with pytest.raises(ValueError, match="activation='gelu', and qlakernels only 'silu'"):
        operators.rms_norm_gated(norm, draw(3, 8), draw(3, 8), backend="auto")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@every_family
def test_the_convolution(family, autocast, dtype, weight_dtype):
    """Never further from float64 than theirs, which rounds to half precision before the activation and behind it."""
    theirs = family.module().causal_conv1d_fn
    x, weight = draw(2, 300, 10, dtype=dtype).transpose(1, 2), draw(10, 4, seed=1, dtype=weight_dtype)
    exact = theirs(x.double(), weight.double(), None, activation="silu")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = theirs(x, weight, None, activation="silu")
        y = operators.causal_conv1d_fn(x, weight, None, activation="silu", backend="auto")
    assert y.shape == expected.shape and y.dtype == expected.dtype == dtype
    assert (y - exact).norm() <= (expected - exact).norm() + 1e-6 * exact.norm()
    assert (y - exact).norm() <= (2**-8 if dtype == torch.bfloat16 else 1e-6) * exact.norm()


def test_a_convolution_with_a_bias():
    with pytest.raises(ValueError, match=r"the convolution has a bias of shape \[6\]"):
        operators.causal_conv1d_fn(draw(1, 6, 5), draw(6, 4), draw(6), activation="silu", backend="auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_family
def test_the_rule(family, dtype):
    """beta in the dtype of the model, g and the state in float32, a state to start from and one to end with."""
    heads, value_heads = 2, 2  # 5.17 repeats key heads before the call
    q, k = draw(2, 70, heads, 8, dtype=dtype), draw(2, 70, heads, 8, seed=1, dtype=dtype)
    v = draw(2, 70, value_heads, 12, seed=2, dtype=dtype)
    g, beta = -draw(2, 70, value_heads, seed=3).abs() / 4, draw(2, 70, value_heads, seed=4, dtype=dtype).sigmoid()
    arguments = {
        "g": g,
        "beta": beta,
        "initial_state": draw(2, value_heads, 8, 12, seed=5),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    expected, expected_state = family.module().torch_chunk_gated_delta_rule(q, k, v, **arguments)
    o, state = operators.chunk_gated_delta_rule(q, k, v, **arguments, backend="torch", use_cache=True)
    assert o.dtype == expected.dtype == dtype and state.dtype == expected_state.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert (o.float() - expected.float()).norm() <= tolerance * expected.float().norm()
    assert (state - expected_state).norm() <= 1e-5 * expected_state.norm()


def test_boundaries():
    seq_idx = torch.tensor([[4, 4, 4, 1, 2, 2]])
    assert operators.document_bounds(None, None) is None
    assert operators.document_bounds(None, seq_idx).tolist() == [0, 3, 4, 6]
    assert operators.document_bounds(None, seq_idx[:, :1]).tolist() == [0, 1]
    given = torch.tensor([0, 6], dtype=torch.int32)
    assert operators.document_bounds(given, seq_idx) is given
    bounds = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert operators.positions_at_the_end(bounds, 5).tolist() == [[0, 1, 2, 0, 1]]
    assert operators.positions_at_the_end(bounds, 7).tolist() == [[0, 1, 0, 1, 2, 0, 1]]


def test_a_backend_is_taken_where_an_operator_has_it():
    assert operators.own_backend("rms_norm_gated", "torch") == "torch"
    assert operators.own_backend("rms_norm_gated", "flash_qla") == "auto"
    assert operators.own_backend("gated_delta_rule", "flash_qla") == "flash_qla"
    assert operators.own_backend("causal_conv1d", "tilelang") == "tilelang"
    assert operators.own_backend("causal_conv1d_update", "tilelang") == "auto"  # which auto passes over
