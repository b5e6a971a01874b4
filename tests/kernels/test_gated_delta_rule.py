"""The torch backend of `chunk_gated_delta_rule` against the recurrence in float64, and that against transformers."""

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import assert_close_by_head, assert_matches_reference, bounds_of, make_inputs

from qlakernels import chunk_gated_delta_rule
from qlakernels.gated_delta_rule import recurrent_gated_delta_rule_reference

LENGTHS = [1, 0, 64, 65, 1, 0, 130, 2]


def run(inputs, **options):
    return chunk_gated_delta_rule(**inputs, backend="torch", **options)


# ---------------------------------------------------------------- against the float64 reference


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300])
def test_dense(tokens):
    assert_matches_reference(make_inputs(tokens, batch=2, key_heads=2, value_heads=4))


@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0, 5], [7, 0], [300], [1, 1, 1], [128, 64, 192]])
def test_packed(lengths):
    inputs = make_inputs(sum(lengths), documents=len(lengths), g=-0.05)
    assert_matches_reference(inputs, cu_seqlens=bounds_of(lengths))


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (8, 20), (24, 5)])
def test_grouped_heads_and_unequal_dimensions(group, key_dim, value_dim):
    inputs = make_inputs(70, key_heads=2, value_heads=2 * group, key_dim=key_dim, value_dim=value_dim)
    assert_matches_reference(inputs)


@pytest.mark.parametrize("g", [0.0, -1e-4, -20.0, "mixed", "random"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.98, 2.0, "random"])
def test_decays_and_step_sizes(beta, g):
    assert_matches_reference(make_inputs(140, beta=beta, g=g))


def test_heads_of_very_different_decay():
    """A strong head beside a slow one: each must be right at its own size."""
    inputs = make_inputs(140, key_heads=1, value_heads=4)
    inputs["g"] = torch.tensor([-20.0, -3.0, -1e-2, -1e-5]).expand_as(inputs["g"]).contiguous()
    assert_matches_reference(inputs)


@pytest.mark.parametrize("beta", [1.98, 2.0, "random"])
@pytest.mark.parametrize("g", [0.0, -1e-3])
def test_repeated_keys(beta, g):
    """One key throughout a document: every token of a chunk corrects every earlier one.

    With β near 2 that is a hundred reflections that forget nothing. The recurrence in float32 is off by 3e-6 here, the
    chunked form (ours, and transformers') by 2e-5: hence the wider tolerance.
    """
    inputs = make_inputs(150, beta=beta, g=g, documents=2)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    assert_matches_reference(inputs, tolerance=5e-5, cu_seqlens=bounds_of([100, 50]))


@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("gate", ["given", "A_log", "A_log and dt_bias"])
@pytest.mark.parametrize("beta", ["given", "sigmoid", "sigmoid, negative eigenvalues"])
def test_options_in_the_operator(l2norm, gate, beta):
    inputs = make_inputs(70, value_heads=4)
    options = {}
    if l2norm:
        inputs["q"], inputs["k"] = inputs["q"] * 3, inputs["k"] * 0.01
        options["use_qk_l2norm_in_kernel"] = True
    if gate != "given":
        inputs["g"] = (inputs["g"] + 0.5) * 6
        inputs["A_log"] = torch.tensor([0.01, 0.3, 2.0, 16.0]).log()
        options["use_gate_in_kernel"] = True
    if gate == "A_log and dt_bias":
        inputs["dt_bias"] = torch.tensor([-4.0, -1.0, 0.3, -6.0])
    if beta != "given":
        inputs["beta"] = (inputs["beta"] - 1) * 5
        options["use_beta_sigmoid_in_kernel"] = True
        options["allow_neg_eigval"] = beta != "sigmoid"
    assert_matches_reference(inputs, **options)


@pytest.mark.parametrize("given", [False, True])
def test_initial_state(given):
    inputs = make_inputs(130, batch=2, g=-0.02)
    if not given:
        del inputs["initial_state"]
    assert_matches_reference(inputs)
    if given:
        states = [inputs["initial_state"], torch.zeros_like(inputs["initial_state"])]
        o, other = (run({**inputs, "initial_state": state})[0] for state in states)
        assert (o - other).norm() > 0.1 * o.norm()


def test_a_state_carried_over_is_the_whole_sequence():
    inputs = make_inputs(200, batch=2, g=-0.02)
    o, final_state = run(inputs, output_final_state=True)
    cut, state, parts = 90, inputs.pop("initial_state"), []
    for part in (slice(None, cut), slice(cut, None)):
        here = {name: x[:, part] for name, x in inputs.items()}
        o_part, state = run({**here, "initial_state": state}, output_final_state=True)
        parts.append(o_part)
    assert_close_by_head("o", torch.cat(parts, 1), o, 1e-5)
    assert_close_by_head("final_state", state, final_state, 1e-5)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_scale(scale):
    inputs = make_inputs(70)
    assert_matches_reference(inputs, scale=scale)
    factor = inputs["q"].shape[-1] ** -0.5 if scale is None else scale
    torch.testing.assert_close(run(inputs, scale=scale)[0], run(inputs, scale=1.0)[0] * factor)


# ---------------------------------------------------------------- packing


def test_slow_decay_packed_is_each_document_alone():
    """A = 0.05 keeps a state for hundreds of tokens, so that a document that sees its neighbour is far off."""
    lengths = [65, 1, 200, 0, 64, 30]
    inputs = make_inputs(sum(lengths), value_heads=4, documents=len(lengths))
    inputs["g"] = (inputs["g"] + 0.5) * 2
    inputs["A_log"], inputs["dt_bias"] = torch.full((4,), 0.05).log(), torch.full((4,), -3.0)
    options = {"use_gate_in_kernel": True, "output_final_state": True}
    o, final_state = run(inputs, cu_seqlens=bounds_of(lengths), **options)
    start = 0
    for n, length in enumerate(lengths):
        alone = {name: x[:, start : start + length] for name, x in inputs.items() if x.dim() >= 3}
        alone |= {name: inputs[name] for name in ("A_log", "dt_bias")}
        alone["initial_state"] = inputs["initial_state"][n : n + 1]
        o_alone, state_alone = run(alone, **options)
        assert_close_by_head("o", o[:, start : start + length], o_alone, 1e-5)
        assert_close_by_head("final_state", final_state[n : n + 1], state_alone, 1e-5)
        start += length
    assert start == o.shape[1]


def test_a_document_has_no_gradient_from_its_neighbours():
    inputs = make_inputs(140, g=-1e-3, documents=2)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o, _ = run(leaves, cu_seqlens=bounds_of([70, 70]))
    o[:, 70:].sum().backward()
    for name in ("q", "k", "v", "g", "beta"):
        assert leaves[name].grad[:, :70].abs().max() == 0, name
        assert leaves[name].grad[:, 70:].abs().max() > 0, name
    assert leaves["initial_state"].grad[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("on_host_too", [False, True])
def test_boundaries_of_either_integer_type(dtype, on_host_too):
    inputs = make_inputs(sum(LENGTHS), documents=len(LENGTHS))
    expected = run(inputs, cu_seqlens=bounds_of(LENGTHS))[0]
    cu_seqlens = bounds_of(LENGTHS, dtype)
    o, _ = run(inputs, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens if on_host_too else None)
    assert torch.equal(o, expected)


def test_dense_batch_is_packed_equal_lengths():
    inputs = make_inputs(70, batch=3)
    flat = {name: x if name == "initial_state" else x.flatten(0, 1)[None] for name, x in inputs.items()}
    o, final_state = run(inputs, output_final_state=True)
    o_flat, final_flat = run(flat, cu_seqlens=bounds_of([70] * 3), output_final_state=True)
    assert torch.equal(o.flatten(0, 1)[None], o_flat) and torch.equal(final_state, final_flat)


# ---------------------------------------------------------------- layouts and dtypes


def test_strided_slices_of_one_projection():
    """As a model hands them over: views into one tensor, in a layout that no operation of ours has made."""
    heads, key_dim, value_dim = 2, 16, 24
    sizes = [heads * key_dim, heads * key_dim, heads * value_dim]
    inputs = make_inputs(100, key_heads=heads, value_heads=heads, key_dim=key_dim, value_dim=value_dim)
    del inputs["initial_state"]
    projection = torch.cat([inputs[name].flatten(2) for name in "qkv"], -1).requires_grad_()
    gates = torch.stack([inputs["g"], inputs["beta"]], -1).requires_grad_()

    def sliced(projection, gates):
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in projection.split(sizes, -1))
        return {"q": q, "k": k, "v": v, "g": gates[..., 0], "beta": gates[..., 1]}

    slices = sliced(projection, gates)
    assert not any(x.is_contiguous() for x in slices.values())
    o, _ = run(slices)
    expected, _ = recurrent_gated_delta_rule_reference(**sliced(projection.double(), gates.double()))
    assert_close_by_head("o", o, expected, 1e-5)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((o * weights).sum(), [projection, gates])
    wanted = torch.autograd.grad((expected * weights).sum(), [projection, gates])
    for name, x, reference in zip("qkv", *(grad[0].split(sizes, -1) for grad in (got, wanted)), strict=True):
        x, reference = (y.unflatten(-1, (heads, -1)) for y in (x, reference))
        assert_close_by_head(name, x, reference, 1e-5)
    for i, name in enumerate(["g", "beta"]):
        assert_close_by_head(name, got[1][..., i], wanted[1][..., i], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Float32 inside: only the inputs and the outputs are rounded, so the error is one rounding, not a sum of them."""
    inputs = make_inputs(300, value_heads=4, g=-0.02, documents=2)
    state = inputs.pop("initial_state")
    inputs = {name: x.to(dtype) for name, x in inputs.items()} | {"initial_state": state}
    o, final_state = run(inputs, cu_seqlens=bounds_of([130, 170]), output_final_state=True)
    assert o.dtype == dtype and final_state.dtype == torch.float32
    expected, expected_state = recurrent_gated_delta_rule_reference(**inputs, cu_seqlens=bounds_of([130, 170]))
    assert_close_by_head("o", o, expected, 3e-3)
    assert_close_by_head("final_state", final_state, expected_state, 1e-5)
    assert_matches_reference(inputs, tolerance=1e-2, cu_seqlens=bounds_of([130, 170]))


def test_float64():
    assert_matches_reference(
        {name: x.double() for name, x in make_inputs(130, value_heads=4, batch=2).items()}, tolerance=1e-12
    )


@pytest.mark.parametrize("l2norm", [False, True])
def test_gradcheck(l2norm):
    """Finite differences, which share no line with the reference; two chunks, so that the scan takes part."""
    inputs = make_inputs(68, key_heads=1, value_heads=1, key_dim=2, value_dim=1, documents=2)
    leaves = [x.double().requires_grad_() for x in inputs.values()]

    def function(*values):
        return run(
            dict(zip(inputs, values, strict=True)),
            output_final_state=True,
            use_qk_l2norm_in_kernel=l2norm,
            cu_seqlens=bounds_of([66, 2]),
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_contract_of_the_outputs():
    inputs = make_inputs(10, batch=3, key_heads=2, value_heads=4, key_dim=8, value_dim=5)
    o, final_state = run(inputs)
    assert o.shape == (3, 10, 4, 5) and o.dtype == torch.float32 and final_state is None
    o, final_state = run(inputs, output_final_state=True)
    assert final_state.shape == (3, 4, 8, 5) and final_state.dtype == torch.float32


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 0, 0])])
def test_no_tokens(cu_seqlens):
    """The state passes through documents that are all empty."""
    documents = 1 if cu_seqlens is None else 2
    inputs = make_inputs(0, documents=documents)
    o, final_state = run(inputs, cu_seqlens=cu_seqlens, output_final_state=True)
    assert o.shape == (1, 0, 2, 24)
    assert torch.equal(final_state, inputs["initial_state"])


def test_no_rows():
    o, final_state = run(make_inputs(5, batch=0), output_final_state=True)
    assert o.shape == (0, 5, 2, 24) and final_state.shape == (0, 2, 16, 24)


def test_inputs_are_left_as_they_were():
    inputs = make_inputs(70)
    before = {name: x.clone() for name, x in inputs.items()}
    run(inputs, use_qk_l2norm_in_kernel=True, output_final_state=True)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


def test_float32_inside_whatever_autocast_says():
    """Mixed-precision training calls the operator under autocast; its products stay float32 as documented."""
    inputs = make_inputs(130)
    expected, expected_state = run(inputs, output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        o, final_state = run(inputs, output_final_state=True)
    assert torch.equal(o, expected) and torch.equal(final_state, expected_state)


def test_training_after_inference_mode():
    """What one call keeps for the next must not carry the first one's mode along."""
    inputs = make_inputs(77)  # a length that no other test has, so that nothing about it is kept yet
    with torch.inference_mode():
        run(inputs)
    assert_matches_reference(inputs)


# ---------------------------------------------------------------- an oracle from elsewhere


@pytest.mark.parametrize("form", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_transformers_agrees(form):
    """Keys of length 1e-3 and less, where it shows whether the 1e-6 of the norm stands inside the root."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    inputs = make_inputs(150, batch=2, key_heads=2, value_heads=6, g=-0.05)
    state = inputs.pop("initial_state")
    inputs["q"] = inputs["q"] * torch.logspace(-4, 1, 150)[:, None, None]
    inputs["k"] = inputs["k"] * torch.logspace(1, -4, 150)[:, None, None]
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    theirs = {{"q": "query", "k": "key", "v": "value"}.get(name, name): x for name, x in inputs.items()}
    o_theirs, state_theirs = getattr(modeling_qwen3_5, form)(**theirs, **options)
    o, final_state = run(inputs, **options)
    assert_close_by_head("o", o, o_theirs, 1e-5)
    assert_close_by_head("final_state", final_state, state_theirs, 1e-5)
    reference, reference_state = recurrent_gated_delta_rule_reference(
        **inputs, initial_state=state, use_qk_l2norm_in_kernel=True
    )
    assert_close_by_head("o", o_theirs, reference, 1e-5)
    assert_close_by_head("final_state", state_theirs, reference_state, 1e-5)


def test_one_step_by_hand():
    """S = ½ S₀ + k ⊗ β (v − (½ S₀)ᵀ k), o = scale · Sᵀ q in numbers."""
    one = torch.ones(1, 1, 1)
    o, state = run(
        {
            "q": torch.tensor([[[[1.0, 2.0]]]]),
            "k": torch.tensor([[[[0.0, 1.0]]]]),
            "v": torch.tensor([[[[5.0, 7.0]]]]),
            "g": one * torch.tensor(0.5).log(),
            "beta": one * 0.5,
            "initial_state": torch.tensor([[[[2.0, 4.0], [6.0, 2.0]]]]),
        },
        scale=1.0,
        output_final_state=True,
    )
    # ½ S₀ = [[1, 2], [3, 1]]; (½ S₀)ᵀ k = [3, 1]; β (v − …) = [1, 3]; S = [[1, 2], [4, 4]]
    torch.testing.assert_close(state, torch.tensor([[[[1.0, 2.0], [4.0, 4.0]]]]))
    torch.testing.assert_close(o, torch.tensor([[[[9.0, 10.0]]]]))


@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_gates_by_hand(allow_neg_eigval):
    """The operator on raw gates is the operator on gates that torch's own functions have computed."""
    inputs = make_inputs(70)
    inputs["g"], inputs["beta"] = inputs["g"] * 4, (inputs["beta"] - 1) * 4
    A_log, dt_bias = torch.tensor([0.3, -2.0]), torch.tensor([-1.0, 0.5])
    o, _ = run(
        inputs,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=allow_neg_eigval,
    )
    g = -A_log.exp() * F.softplus(inputs["g"] + dt_bias)
    beta = torch.sigmoid(inputs["beta"]) * (2 if allow_neg_eigval else 1)
    assert_close_by_head("o", o, run({**inputs, "g": g, "beta": beta})[0], 1e-5)
